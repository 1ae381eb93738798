"""Whether the hosts reach each other, fast enough, and share what they have to share."""

import ipaddress
from collections.abc import Sequence

from horovod_megdet.cluster.doctor.examination import Examination, Finding, Severity
from horovod_megdet.cluster.doctor.facts import Facts, Interface
from horovod_megdet.cluster.doctor.naming import grouped, where
from horovod_megdet.wording import seconds, size, some

CLOCK_TOLERANCE = 1.0
"""Seconds. More confuses file dates, credentials, and whoever reads the logs of two hosts side by side."""

SMALL_MESSAGE, SLOW_SMALL_MESSAGE = 4096, 0.005
"""Bytes of a normalisation layer's message, and seconds from which on a hundred of them cost more than a step."""

SLOW_BANDWIDTH = 1.2
"""Gbit/s between hosts up to which it is an office network, or the wrong interface."""

VIRTUAL = ("docker", "br-", "virbr", "podman", "cni", "veth", "lxc", "lxd")
"""How the names of interfaces begin that lead to containers and virtual machines of the same host."""

Fault = tuple[str, str, str, str]
"""Variable, its value, what is wrong, and the interfaces that there are."""


def check_interfaces(examination: Examination) -> list[Finding]:
    """Whether the interfaces that were named exist, and whether it is clear which ones lead to the other hosts."""
    hosts = examination.host_ranks
    several = any(facts.place.size > facts.place.local_size for facts in hosts)
    known = [(facts, facts.network) for facts in hosts if facts.network]
    faults: list[tuple[Facts, Fault]] = []
    for facts, network in known:
        there = f"there are {some(interface.name for interface in network.interfaces)}"
        for variable, value in network.chosen.items():
            if variable != "NCCL_SOCKET_IFNAME" or facts.gpus:
                fault = interface_fault(network.interfaces, variable, value, several)
                faults += [(facts, (variable, value, fault, there))] if fault else []
    remedy = "Name one that all hosts have, with `megdet launch --interface NAME`; `ip -br addr` lists them."
    findings = [
        Finding("interfaces", "error", f"{variable} is {value}: {fault} on {where(who, hosts)} ({there})", remedy)
        for (variable, value, fault, there), who in grouped(faults).items()
    ]
    if several:
        findings += _ambiguous_findings(hosts)
    if findings or not known:
        return findings
    facts, network = known[0]
    if network.chosen:
        text = ", ".join(f"{name}={value}" for name, value in network.chosen.items())
    else:
        names = some(entry.name for entry in usable_interfaces(network.interfaces)) or "loopback only"
        text = f"none is named; {facts.place.host} has {names}"
    return [Finding("interfaces", "ok", text)]


def check_names(examination: Examination) -> list[Finding]:
    """Whether every host knows every host by name, and means the right one."""
    if len(examination.hosts) < 2:
        return []
    hosts = examination.host_ranks
    known = [(facts, facts.resolved) for facts in hosts if facts.resolved is not None]
    own = {facts.place.host: set(facts.machine.addresses) for facts in hosts if facts.machine}
    unknown, wrong, loops = [], [], []
    for facts, resolved in known:
        for host, addresses in resolved.items():
            if not addresses:
                unknown.append((facts, host))
            elif host == facts.place.host:
                loops += [facts] if all(ipaddress.ip_address(address).is_loopback for address in addresses) else []
            elif own.get(host) and not own[host] & set(addresses):
                wrong.append((facts, (host, some(addresses), some(sorted(own[host])))))
    remedy = "Correct /etc/hosts, the same on all hosts, or the name server."
    findings = [
        Finding("names", "error", f"the name {host} is not known on {where(who, hosts)}", remedy)
        for host, who in grouped(unknown).items()
    ]
    findings += [
        Finding("names", "error", f"{host} is {found} for {where(who, hosts)}, but has {right}", remedy)
        for (host, found, right), who in grouped(wrong).items()
    ]
    if loops:
        findings.append(_loop_finding(loops, hosts))
    if findings or not known:
        return findings
    return [Finding("names", "ok", "every host knows every host by name")]


def check_clocks(examination: Examination) -> list[Finding]:
    """Whether the hosts' clocks agree, as far as that can be measured."""
    clocks = examination.clocks
    if not clocks:
        return []
    worst_first = sorted(clocks, key=lambda clock: -abs(clock.offset))
    off = {
        clock.host: clock for clock in reversed(worst_first) if abs(clock.offset) - clock.uncertainty > CLOCK_TOLERANCE
    }
    remedy = "Let chrony or ntpd set the clocks: file dates, logs and credentials go wrong without."
    findings = []
    for host, clock in off.items():
        direction = "ahead of" if clock.offset > 0 else "behind"
        sentence = f"the clock of {host} is {seconds(abs(clock.offset))} {direction} that of rank 0"
        findings.append(Finding("clocks", "warning", sentence, remedy))
    worst = abs(worst_first[0].offset) + worst_first[0].uncertainty
    return findings or [Finding("clocks", "ok", f"all clocks agree, to {seconds(worst)} or better")]


def check_run_directory(examination: Examination) -> list[Finding]:
    """Whether all hosts see the run directory, and can write into it."""
    findings = []
    for entry in examination.shared:
        remedy = "Put the run directory (--run-dir) on a file system that all hosts mount at the same path."
        if entry.unseen:
            sentence = f"{entry.host} does not see what rank 0 writes into {entry.folder}: {entry.unseen}"
            findings.append(Finding("run directory", "error", sentence, remedy))
        elif entry.unwritable:
            # Rank 0 writes the checkpoints; the others only what helps to find out why they failed.
            severity: Severity = "error" if entry.rank == 0 else "warning"
            remedy = "Change its owner or permissions, or choose another with --run-dir."
            sentence = f"{entry.host} cannot write into {entry.folder}: {entry.unwritable}"
            findings.append(Finding("run directory", severity, sentence, remedy))
        elif not entry.arrived:
            sentence = f"rank 0 does not see what {entry.host} writes into {entry.folder}"
            findings.append(Finding("run directory", "error", sentence, remedy))
    if findings or not examination.shared:
        return findings
    return [Finding("run directory", "ok", f"{examination.shared[0].folder} is seen and written by every host")]


def check_allreduce(examination: Examination) -> list[Finding]:
    """Whether messages are as quick as the network and the launch settings should make them."""
    timings, ranks = examination.timings, len(examination.ranks)
    if not timings or ranks == 1:
        return []
    findings = []
    small = max((timing for timing in timings if timing.bytes <= SMALL_MESSAGE), key=lambda timing: timing.bytes)
    best = max(timing.bandwidth(ranks) for timing in timings)
    if small.horovod > SLOW_SMALL_MESSAGE:
        beside = f", a bare MPI allreduce {seconds(small.mpi)}" if small.mpi else ""
        sentence = f"an allreduce of {size(small.bytes)} takes {seconds(small.horovod)}{beside}"
        remedy = (
            "Look at cores first (more ranks than cores? mpi_yield_when_idle 0?), then at HOROVOD_CYCLE_TIME and the "
            "interface in use: cross-GPU batch normalisation sends a hundred of these in each step."
        )
        findings.append(Finding("allreduce", "warning", sentence, remedy))
    if len(examination.hosts) > 1 and best < SLOW_BANDWIDTH:
        step = examination.gradient_bytes * 8 / 1e9 / best * 2 * (ranks - 1) / ranks
        sentence = f"{best:.2g} Gbit/s between the ranks: the gradients of a step take {seconds(step)}"
        remedy = "Name the fast network with `megdet launch --interface`, or set solver.compression: fp16."
        findings.append(Finding("allreduce", "warning", sentence, remedy))
    text = f"{size(small.bytes)} take {seconds(small.horovod)}, large messages get {best:.3g} Gbit/s"
    return findings or [Finding("allreduce", "ok", text)]


def interface_fault(interfaces: Sequence[Interface], variable: str, value: str, several_hosts: bool) -> str:
    """What is wrong with the interfaces that an environment variable names; nothing if they can be used."""
    if variable.endswith("_exclude") or value.startswith("^"):
        return ""
    nccl = variable == "NCCL_SOCKET_IFNAME"
    found: list[Interface] = []
    for word in value.removeprefix("=").split(","):
        found += [interface for interface in interfaces if _is_meant(interface, word, nccl and value[0] != "=")]
    if not found:
        return "there is no such interface"
    if not any(interface.up for interface in found):
        return "it is down"
    if several_hosts and all(interface.loopback for interface in found):
        return "it does not lead to other hosts"
    return ""


def usable_interfaces(interfaces: Sequence[Interface]) -> list[Interface]:
    """Those that may lead to other hosts."""
    return [interface for interface in interfaces if interface.up and interface.addresses and not interface.loopback]


def _ambiguous_findings(hosts: list[Facts]) -> list[Finding]:
    """Interfaces that lead to no other host, such as docker0, and that MPI would use unless it is told which to use."""
    told = {"OMPI_MCA_btl_tcp_if_include", "HOROVOD_GLOO_IFACE", "OMPI_MCA_btl_tcp_if_exclude"}
    usable = [
        (facts, interface)
        for facts in hosts
        if facts.network and not told & facts.network.chosen.keys()
        for interface in usable_interfaces(facts.network.interfaces)
    ]
    local = [
        (facts, f"{interface.name} ({some(interface.addresses)})")
        for facts, interface in usable
        if interface.name.startswith(VIRTUAL)
    ]
    addresses = [
        (facts, f"{address} ({interface.name})")
        for facts, interface in usable
        if not interface.name.startswith(VIRTUAL)
        for address in interface.addresses
    ]
    remedy = "Name the interface that leads to the others with `megdet launch --interface`: the start may hang without."
    findings = [
        Finding("interfaces", "warning", f"MPI may try {name} on {where(who, hosts)}, a bridge within the host", remedy)
        for name, who in grouped(local).items()
    ]
    return findings + [
        Finding("interfaces", "warning", f"{where(who, hosts)} have the same address {address}", remedy)
        for address, who in grouped(addresses).items()
        if len(who) > 1
    ]


def _is_meant(interface: Interface, word: str, by_prefix: bool) -> bool:
    if "/" in word:  # Open MPI also takes a subnet
        subnet = ipaddress.ip_network(word, strict=False)
        return any(ipaddress.ip_address(address) in subnet for address in interface.addresses)
    return interface.name.startswith(word) if by_prefix else interface.name == word


def _loop_finding(loops: list[Facts], hosts: list[Facts]) -> Finding:
    sentence = f"{where(loops, hosts)} knows its own name as a loopback address, at which no other host reaches it"
    remedy = "Remove the name from the line with 127.0.1.1 in its /etc/hosts, or name the interface with --interface."
    gloo = any(facts.build and facts.build.controller == "gloo" for facts in loops)
    named = all(facts.network and "HOROVOD_GLOO_IFACE" in facts.network.chosen for facts in loops)
    return Finding("names", "error" if gloo and not named else "warning", sentence, remedy)
