"""Whether the hosts reach each other, fast enough, and share what they have to share."""

import ipaddress
from collections.abc import Sequence

from horovod_megdet.cluster.doctor.examination import Examination, Finding, error, ok, warning
from horovod_megdet.cluster.doctor.facts import Facts, Interface, Network
from horovod_megdet.cluster.doctor.naming import grouped, where
from horovod_megdet.wording import seconds, size, some

CLOCK_TOLERANCE = 1.0
"""Seconds. A larger difference makes file times, credentials, and the logs of two hosts side by side misleading."""

SMALL_MESSAGE, SLOW_SMALL_MESSAGE = 4096, 0.005
"""Bytes of a normalization layer's message, and seconds from which a hundred of them cost more than a step."""

SLOW_BANDWIDTH = 1.2
"""Gbit/s between hosts; an office network, or the wrong interface, is not faster."""

VIRTUAL = ("docker", "br-", "virbr", "podman", "cni", "veth", "lxc", "lxd")
"""How the names of interfaces begin that lead to containers and virtual machines on the same host."""

SELECTING = {"OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude", "HOROVOD_GLOO_IFACE"}
"""The environment variables that keep MPI and Gloo from trying every interface."""


def check_interfaces(examination: Examination) -> list[Finding]:
    """Whether the selected interfaces exist, and whether it is clear which ones lead to the other hosts."""
    hosts = examination.host_ranks
    known = [(facts, facts.network) for facts in hosts if facts.network]
    if not known:
        return []
    several_hosts = any(facts.place.size > facts.place.local_size for facts in hosts)
    findings = _unusable_interfaces(hosts, several_hosts)
    if several_hosts:
        findings += _misleading_interfaces(hosts)
    facts, network = known[0]
    names = some(interface.name for interface in usable_interfaces(network.interfaces)) or "only loopback"
    selected = ", ".join(f"{variable}={value}" for variable, value in network.selected.items())
    return findings or [ok(selected or f"none is selected; {facts.place.host} has {names}")]


def check_names(examination: Examination) -> list[Finding]:
    """Whether every host resolves every host's name, and to the right one."""
    hosts = examination.host_ranks
    known = [(facts, facts.resolved) for facts in hosts if facts.resolved is not None]
    if len(examination.hosts) < 2 or not known:
        return []
    own = {facts.place.host: set(facts.machine.addresses) for facts in hosts if facts.machine}
    unknown, wrong, loopback = [], [], []
    for facts, resolved in known:
        for host, addresses in resolved.items():
            if not addresses:
                unknown.append((facts, host))
            elif host == facts.place.host:
                loopback += [facts] if all(ipaddress.ip_address(address).is_loopback for address in addresses) else []
            elif own.get(host) and not own[host] & set(addresses):
                wrong.append((facts, (host, some(addresses), some(sorted(own[host])))))
    remedy = "Correct the name server, or /etc/hosts, which should be the same on all hosts."
    findings = [
        error(f"the name {host} does not resolve on {where(who, hosts)}", remedy)
        for host, who in grouped(unknown).items()
    ]
    findings += [
        error(f"{host} resolves to {found} on {where(who, hosts)}, but its address is {right}", remedy)
        for (host, found, right), who in grouped(wrong).items()
    ]
    findings += _names_for_loopback(loopback, hosts)
    return findings or [ok("every host resolves every host's name")]


def check_clocks(examination: Examination) -> list[Finding]:
    """Whether the hosts' clocks agree, as far as that can be measured."""
    if not examination.clocks:
        return []
    worst_first = sorted(examination.clocks, key=lambda clock: -abs(clock.offset))
    remedy = "Synchronize the clocks with chrony or ntpd: otherwise file times, logs and credentials go wrong."
    findings = {}
    for clock in worst_first:
        if abs(clock.offset) - clock.uncertainty > CLOCK_TOLERANCE and clock.host not in findings:
            direction = "ahead of" if clock.offset > 0 else "behind"
            sentence = f"the clock of {clock.host} is {seconds(abs(clock.offset))} {direction} that of rank 0"
            findings[clock.host] = warning(sentence, remedy)
    worst = abs(worst_first[0].offset) + worst_first[0].uncertainty
    return list(findings.values()) or [ok(f"all clocks agree to within {seconds(worst)}")]


def check_run_directory(examination: Examination) -> list[Finding]:
    """Whether all hosts see the run directory, and can write to it."""
    findings = []
    for view in examination.run_directory:
        remedy = "Put the run directory (--run-dir) on a file system that all hosts mount at the same path."
        if view.unseen:
            sentence = f"{view.host} does not see what rank 0 writes to {view.folder}: {view.unseen}"
            findings.append(error(sentence, remedy))
        elif view.unwritable:
            # Rank 0 writes the checkpoints; the others only write what helps to find out why they failed.
            severity = error if view.rank == 0 else warning
            remedy = "Change its owner or permissions, or choose another one with --run-dir."
            findings.append(severity(f"{view.host} cannot write to {view.folder}: {view.unwritable}", remedy))
        elif not view.arrived:
            findings.append(error(f"rank 0 does not see what {view.host} writes to {view.folder}", remedy))
    if findings or not examination.run_directory:
        return findings
    return [ok(f"every host can read and write {examination.run_directory[0].folder}")]


def check_allreduce(examination: Examination) -> list[Finding]:
    """Whether messages are as fast as the network and the launch settings should make them."""
    timings, ranks = examination.timings, len(examination.ranks)
    if not timings or ranks == 1:
        return []
    findings = []
    small = max((timing for timing in timings if timing.bytes <= SMALL_MESSAGE), key=lambda timing: timing.bytes)
    best = max(timing.bandwidth(ranks) for timing in timings)
    if small.horovod > SLOW_SMALL_MESSAGE:
        compared = f", with bare MPI {seconds(small.mpi)}" if small.mpi else ""
        sentence = f"an allreduce of {size(small.bytes)} takes {seconds(small.horovod)}{compared}"
        remedy = (
            "Check the cores first (more ranks than cores? mpi_yield_when_idle 0?), then HOROVOD_CYCLE_TIME and the "
            "interface in use: cross-GPU batch normalization sends a hundred such messages in each step."
        )
        findings.append(warning(sentence, remedy))
    if len(examination.hosts) > 1 and best < SLOW_BANDWIDTH:
        step = examination.gradient_bytes * 8 / 1e9 / best * 2 * (ranks - 1) / ranks
        sentence = f"only {best:.2g} Gbit/s between the ranks: the gradients of a step take {seconds(step)}"
        remedy = "Select the fast network with `megdet launch --interface`, or set solver.compression: fp16."
        findings.append(warning(sentence, remedy))
    text = f"{size(small.bytes)} takes {seconds(small.horovod)}, large messages reach {best:.3g} Gbit/s"
    return findings or [ok(text)]


def usable_interfaces(interfaces: Sequence[Interface]) -> list[Interface]:
    """Those that may lead to other hosts."""
    return [interface for interface in interfaces if interface.up and interface.addresses and not interface.loopback]


def _unusable_interfaces(hosts: list[Facts], several_hosts: bool) -> list[Finding]:
    """Interfaces that environment variables select and that cannot be used."""
    faults: list[tuple[Facts, tuple[str, str]]] = []
    for facts in hosts:
        network = facts.network or Network([], {})
        names = some(interface.name for interface in network.interfaces)
        for variable, value in network.selected.items():
            if variable != "NCCL_SOCKET_IFNAME" or facts.gpus:
                fault = _interface_fault(network.interfaces, variable, value, several_hosts)
                faults += [(facts, (f"{variable} is {value}", f"{fault} (interfaces: {names})"))] if fault else []
    remedy = "Select an interface that all hosts have with `megdet launch --interface NAME`; `ip -br addr` lists them."
    return [
        error(f"{setting} on {where(who, hosts)}: {fault}", remedy) for (setting, fault), who in grouped(faults).items()
    ]


def _interface_fault(interfaces: Sequence[Interface], variable: str, value: str, several_hosts: bool) -> str:
    """Why the interfaces that an environment variable selects cannot be used; empty if they can."""
    if variable.endswith("_exclude") or value.startswith("^"):
        return ""
    by_prefix = variable == "NCCL_SOCKET_IFNAME" and not value.startswith("=")
    words = value.removeprefix("=").split(",")
    selected = [interface for interface in interfaces if any(_selects(word, interface, by_prefix) for word in words)]
    if not selected:
        return "there is no such interface"
    if not any(interface.up for interface in selected):
        return "it is down"
    if several_hosts and all(interface.loopback for interface in selected):
        return "it does not lead to other hosts"
    return ""


def _selects(word: str, interface: Interface, by_prefix: bool) -> bool:
    if "/" in word:  # Open MPI also takes a subnet
        subnet = ipaddress.ip_network(word, strict=False)
        return any(ipaddress.ip_address(address) in subnet for address in interface.addresses)
    return interface.name.startswith(word) if by_prefix else interface.name == word


def _misleading_interfaces(hosts: list[Facts]) -> list[Finding]:
    """Interfaces that lead to no other host, such as docker0, and that MPI or Gloo may try where none is selected."""
    internal, addresses = [], []
    for facts in hosts:
        if not facts.network or SELECTING & facts.network.selected.keys():
            continue
        for interface in usable_interfaces(facts.network.interfaces):
            if interface.name.startswith(VIRTUAL):
                internal.append((facts, f"{interface.name} ({some(interface.addresses)})"))
            else:
                addresses += [(facts, f"{address} ({interface.name})") for address in interface.addresses]
    remedy = "Select the interface between the hosts with `megdet launch --interface`: otherwise the start may hang."
    return [
        warning(f"MPI may try {name} on {where(who, hosts)}, which does not lead to other hosts", remedy)
        for name, who in grouped(internal).items()
    ] + [
        warning(f"{where(who, hosts)} have the same address {address}", remedy)
        for address, who in grouped(addresses).items()
        if len(who) > 1
    ]


def _names_for_loopback(loopback: list[Facts], hosts: list[Facts]) -> list[Finding]:
    """Hosts that resolve their own name to a loopback address, which Gloo gives to the others."""
    if not loopback:
        return []
    sentence = f"on {where(loopback, hosts)}, the host's own name resolves to a loopback address, useless to others"
    remedy = "Remove the name from the line with 127.0.1.1 in /etc/hosts there, or add --interface to the launch."
    gloo = any(facts.build and facts.build.controller == "gloo" for facts in loopback)
    selected = all(facts.network and "HOROVOD_GLOO_IFACE" in facts.network.selected for facts in loopback)
    return [error(sentence, remedy) if gloo and not selected else warning(sentence, remedy)]
