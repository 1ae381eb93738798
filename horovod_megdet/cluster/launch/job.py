"""What to run on which hosts, and the command line that each launcher needs for it."""

import os
import shlex
import socket
from dataclasses import dataclass, field
from pathlib import Path

from horovod_megdet.cluster.launch.hostfile import Host
from horovod_megdet.cluster.launch.launcher import Family, Mpirun
from horovod_megdet.errors import UserError

KEEPALIVE = {"oob_tcp_keepalive_time": 3, "oob_tcp_keepalive_intvl": 2, "oob_tcp_keepalive_probes": 3}
"""Seconds of silence, seconds between probes, number of probes: without them Open MPI notices a dead link only after
minutes."""


COOLDOWN = 10, 600
"""Horovod's range, in seconds, of the time for which a host is left out after a rank on it was lost: the first time
twice to three times the lower limit, then twice as long each time."""


@dataclass(frozen=True)
class Elastic:
    """Limits of a job whose ranks come and go."""

    min_ranks: int
    """With fewer, the job waits."""
    max_ranks: int | None
    discover: Path | None
    """A program that prints the hosts; None: they are always the same."""


@dataclass(frozen=True)
class Job:
    """A command to run on every rank."""

    placement: list[tuple[str, int]]
    """Host and number of ranks on it, in the order of the ranks."""
    program: list[str]
    forward: list[str]
    """Names of the environment variables that the ranks get."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables to set, in addition to those that are set here."""
    interface: str | None = None
    ssh_port: int | None = None
    ssh_identity_file: Path | None = None
    bind_to: str = "none"
    prefix: Path | None = None
    """Where Open MPI is on the other hosts; None: where it is here."""
    elastic: "Elastic | None" = None
    """None: the ranks are those that start."""
    launcher_args: list[str] = field(default_factory=list)
    """From the user, for launcher options that this class has no field for."""

    @property
    def ranks(self) -> int:
        return sum(count for _, count in self.placement)

    @property
    def hosts(self) -> str:
        """``node01:8,node02:8``: all launchers understand this, and it needs no file."""
        return ",".join(f"{name}:{count}" for name, count in self.placement)

    @property
    def remote(self) -> list[str]:
        """The hosts other than this machine, judged by their names."""
        name = socket.gethostname().lower()
        here = {"localhost", "127.0.0.1", name, name.partition(".")[0]}
        return [host for host, _ in self.placement if host.lower() not in here]

    @property
    def ssh_options(self) -> list[str]:
        options = ["-p", str(self.ssh_port)] if self.ssh_port else []
        return options + (["-i", str(self.ssh_identity_file)] if self.ssh_identity_file else [])


@dataclass(frozen=True)
class Command:
    """A command line, with the environment variables that it needs in addition to those that are set here."""

    argv: list[str]
    variables: dict[str, str]

    def __str__(self) -> str:
        """Ready to be pasted into a shell."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*assignments, shlex.join(self.argv)])


def place_ranks(hosts: list[Host], ranks: int | None) -> list[tuple[str, int]]:
    """Decides how many ranks run on which host: all slots, or the first ``ranks`` of them, host by host.

    If there are fewer slots than ranks, the hosts take one more each in turn, up to their ``max_slots``. Raises
    :class:`UserError` if that is not enough.
    """
    slots, limit = sum(host.slots for host in hosts), sum(host.max_slots for host in hosts)
    ranks = slots if ranks is None else ranks
    if ranks > limit:
        raise UserError(
            f"--ranks {ranks}: the host file has room for {limit}. Add hosts, or raise slots= (one per GPU) or "
            "max_slots= (more ranks than that; not on GPUs)."
        )
    counts: list[int] = []
    for host in hosts:
        counts.append(min(host.slots, ranks - sum(counts)))
    while sum(counts) < ranks:
        for index, host in enumerate(hosts):
            if counts[index] < host.max_slots and sum(counts) < ranks:
                counts[index] += 1
    return [(host.name, count) for host, count in zip(hosts, counts, strict=True) if count]


def mpirun_command(job: Job, mpirun: Mpirun) -> Command:
    """The command line of mpirun for a job."""
    if mpirun.family is Family.HYDRA:
        return _hydra(job, mpirun)
    return _open_mpi(job, mpirun)


def horovodrun_command(job: Job, horovodrun: Path) -> Command:
    """The command line of horovodrun with the Gloo controller, which passes on the whole environment by itself."""
    argv = [str(horovodrun), "--gloo"]
    argv += _elastic_options(job.elastic, job.hosts) if job.elastic else ["-np", str(job.ranks), "-H", job.hosts]
    # To find interfaces that all hosts have, horovodrun would wait for a second host in an elastic job.
    interface = job.interface or ("lo" if job.elastic and not job.remote else None)
    if interface:
        argv += ["--network-interfaces", interface]
    if job.ssh_port:
        argv += ["--ssh-port", str(job.ssh_port)]
    if job.ssh_identity_file:
        argv += ["--ssh-identity-file", str(job.ssh_identity_file)]
    return Command([*argv, *job.launcher_args, *job.program], job.variables)


def _elastic_options(elastic: Elastic, hosts: str) -> list[str]:
    options = ["-np", str(elastic.min_ranks), "--min-np", str(elastic.min_ranks)]
    if elastic.max_ranks:
        options += ["--max-np", str(elastic.max_ranks)]
    if elastic.discover is None:
        return [*options, "-H", hosts]
    # What it prints works again. Of fixed hosts nobody knows that, and each attempt lets the other ranks wait.
    cooldown = [str(seconds) for seconds in COOLDOWN]
    return [*options, "--host-discovery-script", str(elastic.discover), "--blacklist-cooldown-range", *cooldown]


def _open_mpi(job: Job, mpirun: Mpirun) -> Command:
    version_5 = mpirun.family is Family.OPEN_MPI_5
    # The daemons of Open MPI 5 come from another project, PRRTE: their parameters have their own option and names.
    daemon = "--prtemca" if version_5 else "--mca"
    argv = [str(mpirun.path), "-np", str(job.ranks), "--host", job.hosts]
    # By slot: the ranks of a host are consecutive, as the groups of cross-GPU batch normalization expect them.
    argv += ["--map-by", "slot", "--bind-to", job.bind_to]
    if os.geteuid() == 0:
        argv.append("--allow-run-as-root")
    if job.remote:
        argv += ["--prefix", str(job.prefix or mpirun.prefix)]
        for name, value in KEEPALIVE.items():
            argv += [daemon, name, str(value)]
        if job.ssh_options:
            argv += [daemon, "plm_ssh_args" if version_5 else "plm_rsh_args", " ".join(job.ssh_options)]
    if job.interface:
        argv += ["--mca", "btl_tcp_if_include", job.interface]
        argv += [daemon, "prte_if_include" if version_5 else "oob_tcp_if_include", job.interface]
    if "OMPI_MCA_mpi_yield_when_idle" not in os.environ:
        # An idle rank that spins takes the core from another rank's, or Horovod's own, thread.
        argv += ["--mca", "mpi_yield_when_idle", "1"]
    for name in job.forward:
        argv += ["-x", name]
    return Command([*argv, *job.launcher_args, *job.program], job.variables)


def _hydra(job: Job, mpirun: Mpirun) -> Command:
    argv = [str(mpirun.path), "-n", str(job.ranks), "-hosts", job.hosts, "-bind-to", job.bind_to]
    if job.interface:
        argv += ["-iface", job.interface]
    if job.forward:
        argv += ["-genvlist", ",".join(job.forward)]
    variables = dict(job.variables)
    if job.ssh_options:
        variables["HYDRA_LAUNCHER_EXTRA_ARGS"] = " ".join(job.ssh_options)
    return Command([*argv, *job.launcher_args, *job.program], variables)
