"""What is known about one rank, its process and its host; :mod:`~horovod_megdet.cluster.doctor.probes` finds it out.

All of it is plain data, so that it can be sent to rank 0, written as JSON, and made up by tests. A part that could not
be determined is None, and ``failures`` says why.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Place:
    """Where a rank is among the others."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str


@dataclass(frozen=True)
class Software:
    """Installed packages and the project's own code."""

    versions: dict[str, str]
    """See :func:`horovod_megdet.versions.versions`."""
    digest: str
    """SHA-256 of the project's source files."""
    folder: str
    """Where these are."""


@dataclass(frozen=True)
class Build:
    """The MPI library and Horovod as they were built."""

    controller: str
    """``mpi`` or ``gloo``: what carries the messages."""
    mpi_library: str
    """Name and version; empty under Gloo."""
    features: dict[str, bool]
    """``mpi``, ``gloo``, ``nccl``, ``cuda``, ``rocm``: whether Horovod was built with them."""


@dataclass(frozen=True)
class Machine:
    """What distinguishes two hosts even if they have the same name."""

    boot_id: str
    """The running kernel's random number."""
    addresses: list[str]
    """The IPv4 and IPv6 addresses at which other hosts may reach it."""


@dataclass(frozen=True)
class Processor:
    """Cores, and what limits their use."""

    cores: int
    """Of the host."""
    usable: list[int]
    """The cores on which the launcher or the scheduler lets this rank run."""
    quota: float | None
    """CPU time that the container may use, in cores; None without a limit."""


@dataclass(frozen=True)
class Interface:
    """A network interface."""

    name: str
    addresses: list[str]
    """IPv4."""
    up: bool
    loopback: bool
    speed: int
    """Mbit/s; 0 if unknown."""


@dataclass(frozen=True)
class Network:
    """A host's interfaces, and which of them the environment selects."""

    interfaces: list[Interface]
    selected: dict[str, str]
    """The environment variables that name interfaces and apply to this controller, with their values."""


@dataclass(frozen=True)
class Disk:
    """A folder's file system; sizes in bytes."""

    folder: str
    total: int
    free: int
    free_inodes: int
    """Files that can still be created; -1 if the file system has no limit."""


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes: the host's, or the container's where that has a lower limit."""

    total: int
    available: int


@dataclass(frozen=True)
class Limits:
    """Soft limits of the process; -1 stands for unlimited."""

    open_files: int
    locked_memory: int
    infiniband: bool
    """Whether the host has an InfiniBand adapter, which needs locked memory."""


@dataclass(frozen=True)
class ConfigSummary:
    """The parts of the configuration that the checks need."""

    fingerprint: str
    device: str
    workers: int
    keep_checkpoints: int
    batch_bytes: int
    """The batches, at their largest, that a loader worker keeps ready."""


@dataclass(frozen=True)
class InputSummary:
    """A data set or a weights file, as one host sees it."""

    fingerprint: str
    description: str
    error: str = ""
    """Why training cannot use it; fingerprint and description are empty then."""


@dataclass(frozen=True)
class Facts:
    """All that is known about one rank. One rank of each host fills in ``resolved``, ``data`` and ``weights``."""

    place: Place
    launched_ranks: int | None = None
    """The number of ranks that the launcher started, if it tells."""
    software: Software | None = None
    build: Build | None = None
    machine: Machine | None = None
    processor: Processor | None = None
    gpus: list[str] | None = None
    """Names of the GPUs that the rank sees."""
    gpu_failure: str = ""
    """What CUDA says where the rank's GPU cannot be used."""
    network: Network | None = None
    run_disk: Disk | None = None
    temporary_disk: Disk | None = None
    memory: Memory | None = None
    limits: Limits | None = None
    config: ConfigSummary | None = None
    config_error: str = ""
    threads: int | None = None
    """CPU threads that the rank has in training."""
    resolved: dict[str, list[str]] | None = None
    """The addresses of every host's name, as this host resolves it; an empty list if it cannot."""
    data: dict[str, InputSummary] | None = None
    """``training set`` and ``validation set``."""
    weights: InputSummary | None = None
    """The starting weights."""
    settings: dict[str, str] = field(default_factory=dict)
    """See :func:`comm.launch_settings`."""
    failures: dict[str, str] = field(default_factory=dict)
    """Parts that could not be determined, and why."""

    @property
    def name(self) -> str:
        """`rank 3 on node1`."""
        return f"rank {self.place.rank} on {self.place.host}"

    @property
    def may_use_gpu(self) -> bool:
        """Whether the configuration, if it is known, lets the rank train on a GPU."""
        return self.config is None or self.config.device != "cpu"
