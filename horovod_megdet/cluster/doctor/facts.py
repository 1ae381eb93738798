"""What a rank can find out about its own process and host, without talking to the others.

Everything is plain data, so that it can be sent to rank 0, written as JSON, and made up by tests. A part that cannot be
found out is None, and ``failures`` says why.
"""

import hashlib
import ipaddress
import os
import platform
import re
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from horovod_megdet import comm, launched
from horovod_megdet.config import Config
from horovod_megdet.data.configured import SYNTHETIC, load_split, split_paths
from horovod_megdet.data.loader import PREFETCH
from horovod_megdet.engine import hardware
from horovod_megdet.errors import UserError
from horovod_megdet.models.weights import MODEL_FILE, imagenet_file

PACKAGES = (
    *("horovod", "torch", "torchvision", "mpi4py", "pycocotools", "numpy", "pillow", "pyyaml", "pydantic"),
    *("safetensors", "psutil", "matplotlib", "rich", "tensorboard"),
)

INTERFACE_VARIABLES = (
    "OMPI_MCA_btl_tcp_if_include",
    "OMPI_MCA_btl_tcp_if_exclude",
    "OMPI_MCA_oob_tcp_if_include",
    "HOROVOD_GLOO_IFACE",
    "NCCL_SOCKET_IFNAME",
)
"""Environment variables that name network interfaces; mpirun passes its options to the ranks as OMPI_MCA_*."""

PLACE_VARIABLES = (*launched.PLACE_VARIABLES, ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""))
"""With those of srun without PMIx, whose processes do not find each other."""

MISSING = "missing"
"""The version of a package that is not installed."""

RESOLVER_THREADS = 16
_HASHED_BYTES = 2**20
"""Read at either end of a file with weights."""


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
    """What runs."""

    versions: dict[str, str]
    """Python and packages; `missing` for a package that is not there."""
    source: str
    """SHA-256 of the project's own source files."""
    folder: str
    """Where they are."""


@dataclass(frozen=True)
class Build:
    """What MPI and Horovod are and can do."""

    controller: str
    mpi_library: str
    features: dict[str, bool]
    """``mpi``, ``gloo``, ``nccl``, ``cuda``, ``rocm``: built into Horovod."""


@dataclass(frozen=True)
class Machine:
    """What tells two hosts apart even if they have one name."""

    boot: str
    """Random number of the running kernel."""
    addresses: list[str]
    """IPv4 and IPv6 addresses that others may reach it at."""


@dataclass(frozen=True)
class Processor:
    """Cores and threads."""

    cores: int
    """Of the host."""
    usable: list[int]
    """The cores that the launcher or the scheduler lets this rank run on."""
    quota: float | None
    """Cores' worth of time that the container may use; None without a limit."""


@dataclass(frozen=True)
class Interface:
    """A network interface."""

    name: str
    addresses: list[str]
    """IPv4."""
    up: bool
    loopback: bool
    speed: int
    """Mbit/s, 0 if it is not known."""


@dataclass(frozen=True)
class Network:
    """Interfaces, and what the environment says about which to use."""

    interfaces: list[Interface]
    chosen: dict[str, str]
    """Of `INTERFACE_VARIABLES`, those that are set and matter."""


@dataclass(frozen=True)
class Disk:
    """A folder's file system, in bytes."""

    folder: str
    total: int
    free: int
    free_files: int
    """Files that can still be made; -1 where the file system has no limit."""


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory, the container's where it has a limit."""

    total: int
    available: int


@dataclass(frozen=True)
class Limits:
    """Soft limits of the process, -1 for none."""

    open_files: int
    locked_memory: int
    infiniband: bool
    """Whether the host has such an adapter, which needs locked memory."""


@dataclass(frozen=True)
class Configured:
    """What the configuration asks for."""

    fingerprint: str
    device: str
    workers: int
    images_per_rank: int
    run_dir: str
    weights: str
    keep_checkpoints: int
    batch_bytes: int
    """The largest batch of images that a loader worker hands over."""


@dataclass(frozen=True)
class Readable:
    """Data or weights, as this host sees them."""

    fingerprint: str
    description: str
    error: str = ""
    """Why they cannot be used; the rest is empty then."""


@dataclass(frozen=True)
class Facts:
    """All that is known about one rank. ``data`` and ``weights`` are looked at by one rank of each host."""

    place: Place
    launched: int | None = None
    """Ranks that the launcher says it has started, if it says so."""
    software: Software | None = None
    build: Build | None = None
    machine: Machine | None = None
    processor: Processor | None = None
    gpus: list[str] | None = None
    network: Network | None = None
    run_disk: Disk | None = None
    temporary_disk: Disk | None = None
    shared_memory: Disk | None = None
    memory: Memory | None = None
    limits: Limits | None = None
    config: Configured | None = None
    config_error: str = ""
    threads: int | None = None
    """CPU threads that training would give this rank."""
    resolved: dict[str, list[str]] | None = None
    """Host name: its addresses as seen from here; none if it is unknown here."""
    data: dict[str, Readable] | None = None
    """`training set` and `validation set`."""
    weights: Readable | None = None
    settings: dict[str, str] = field(default_factory=dict)
    """See :func:`comm.launch_settings`."""
    failures: dict[str, str] = field(default_factory=dict)
    """Part that could not be found out: why."""

    @property
    def where(self) -> str:
        return f"rank {self.place.rank} on {self.place.host}"


def place_by_launcher() -> Place:
    """What the launcher's environment variables say, before anything is started; alone if they say nothing."""
    for names in PLACE_VARIABLES:
        if names[0] in os.environ:
            rank, size, local_rank, local_size = (_number(os.environ.get(name)) for name in names)
            return Place(rank or 0, size or 1, local_rank or 0, local_size or 1, launched.host())
    return Place(0, 1, 0, 1, launched.host())


def launched_ranks() -> int | None:
    """Number of ranks that the launcher says it has started."""
    return next((_number(os.environ.get(names[1])) for names in PLACE_VARIABLES if names[0] in os.environ), None)


def place_by_horovod() -> Place:
    """What Horovod says, once it runs."""
    return Place(comm.rank(), comm.size(), comm.local_rank(), comm.local_size(), launched.host())


def collect(parts: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Calls each function and returns what they return, by name; what those that raise say is in ``failures``.

    Any exception is caught: the doctor has to go on where everything else would stop.
    """
    values: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name, function in parts.items():
        try:
            values[name] = function()
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
    return values | {"failures": failures}


def of_process(config: Config | None, config_error: str) -> Facts:
    """What needs no other rank and takes no time: it can be told even if the ranks never find each other."""
    run_dir = Path(config.output.run_dir) if config else Path()
    found = collect(
        {
            "software": software,
            "machine": machine,
            "processor": processor,
            "gpus": gpus,
            "network": network,
            "run_disk": lambda: disk(existing(run_dir)),
            "temporary_disk": lambda: disk(Path(tempfile.gettempdir())),
            "shared_memory": lambda: disk(Path("/dev/shm")),
            "memory": memory,
            "limits": limits,
            "config": lambda: configured(config) if config else None,
        }
    )
    return Facts(place=place_by_launcher(), launched=launched_ranks(), config_error=config_error, **found)


def software() -> Software:
    """Versions, and the project's code itself: a checkout may differ without its version saying so."""
    folder = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.c")]):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    versions = {"Python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    return Software(versions, digest.hexdigest(), str(folder))


def build() -> Build:
    """What Horovod and MPI say about themselves; they have to run."""
    return Build(comm.controller(), comm.mpi_library(), comm.built_features())


def machine() -> Machine:
    """The running kernel and the host's addresses."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Machine(boot, sorted(address for name, address in _addresses() if not _local(address)))


def processor() -> Processor:
    """Cores, and what limits their use."""
    return Processor(os.cpu_count() or 1, sorted(os.sched_getaffinity(0)), _quota())


def gpus() -> list[str]:
    """Names of the GPUs that this rank can see."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def network() -> Network:
    """The host's interfaces."""
    addresses = psutil.net_if_addrs()
    interfaces = []
    for name, stats in psutil.net_if_stats().items():
        own = [entry.address for entry in addresses.get(name, []) if entry.family == socket.AF_INET]
        loopback = "loopback" in stats.flags.split(",")
        interfaces.append(Interface(name, own, stats.isup, loopback, stats.speed))
    of_other_controller = "HOROVOD_GLOO" if launched.by_mpi() else "OMPI_"
    chosen = {
        name: os.environ[name]
        for name in INTERFACE_VARIABLES
        if os.environ.get(name) and not name.startswith(of_other_controller)
    }
    return Network(interfaces, chosen)


def disk(folder: Path) -> Disk:
    """Size and room of the file system that a folder is on."""
    usage, files = shutil.disk_usage(folder), os.statvfs(folder)
    return Disk(str(folder), usage.total, usage.free, files.f_favail if files.f_files else -1)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def memory() -> Memory:
    """Main memory of the host, or of the container if that is less."""
    host = psutil.virtual_memory()
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    if limit is None or used is None or limit > host.total:
        return Memory(host.total, host.available)
    return Memory(limit, min(host.available, limit - used))


def limits() -> Limits:
    """Limits of this process."""
    files, locked = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    adapters = Path("/sys/class/infiniband")
    return Limits(files, locked, adapters.is_dir() and any(adapters.iterdir()))


def configured(config: Config) -> Configured:
    """The parts of a configuration that the checks need."""
    data = config.data
    return Configured(
        fingerprint=config.fingerprint(),
        device=config.runtime.device,
        workers=data.workers,
        images_per_rank=data.images_per_rank,
        run_dir=str(Path(config.output.run_dir).absolute()),
        weights=config.model.weights,
        keep_checkpoints=config.output.keep_checkpoints,
        batch_bytes=(PREFETCH + 1) * data.images_per_rank * 3 * max(data.shorter_side_train) * data.longer_side_train,
    )


def threads(config: Config) -> int:
    """CPU threads that training would give this rank; Horovod has to run."""
    return config.runtime.threads_per_rank or hardware.threads_per_rank()


def resolve(hosts: list[str]) -> dict[str, list[str]]:
    """Looks all hosts up, several at a time: a name server that does not answer takes seconds each."""
    with ThreadPoolExecutor(RESOLVER_THREADS) as pool:
        return dict(zip(hosts, pool.map(addresses_of, hosts), strict=True))


def addresses_of(host: str) -> list[str]:
    """Addresses of a host, none if it is unknown here."""
    try:
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError):
        return []


def data(config: Config) -> dict[str, Readable]:
    """Reads annotations and image headers as training does at its start; generates nothing."""
    return {
        "training set": _readable(lambda: _split(config, training=True)),
        "validation set": _readable(lambda: _split(config, training=False)),
    }


def starting_weights(config: Config) -> Readable | None:
    """The file with the starting weights; None if there is none to read. Downloads what training would download."""
    model = config.model
    if model.weights == "none":
        return None
    imagenet = model.weights == "imagenet"
    return _readable(lambda: _weights(imagenet_file(model.backbone) if imagenet else Path(model.weights)))


def _split(config: Config, training: bool) -> tuple[str, str]:
    annotations, _ = split_paths(config.data, training)
    name = config.data.train_annotations if training else config.data.val_annotations
    if name.startswith(SYNTHETIC) and not annotations.exists():
        return "generated", "is generated when training starts"
    dataset = load_split(config.data, training)
    skipped = f", {len(dataset.problems)} bad entries left out" if dataset.problems else ""
    return dataset.fingerprint, f"{len(dataset)} images, {len(dataset.class_names)} classes{skipped}"


def _weights(path: Path) -> tuple[str, str]:
    """Both ends of the file stand for it: reading all of a large one from every host would take minutes."""
    if path.is_dir():
        path = path / MODEL_FILE
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(_HASHED_BYTES))
            file.seek(max(0, size - _HASHED_BYTES))
            digest.update(file.read())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
    return f"{size} {digest.hexdigest()}", str(path)


def _readable(read: Callable[[], tuple[str, str]]) -> Readable:
    try:
        return Readable(*read())
    except UserError as error:
        return Readable("", "", str(error))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return MISSING


def _addresses() -> list[tuple[str, str]]:
    families = socket.AF_INET, socket.AF_INET6
    return [
        (name, entry.address.partition("%")[0])
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in families
    ]


def _local(address: str) -> bool:
    """Whether an address means nothing to other hosts."""
    parsed = ipaddress.ip_address(address)
    return parsed.is_loopback or parsed.is_link_local


def _quota() -> float | None:
    """Cores' worth of time that the control group allows."""
    match = re.match(r"(\d+) (\d+)", _cgroup_text("cpu.max"))
    return int(match[1]) / int(match[2]) if match else None


def _cgroup_number(name: str) -> int | None:
    return _number(_cgroup_text(name))


def _cgroup_text(name: str) -> str:
    """A setting of the control group as a container sees its own; empty where there is none."""
    path = Path("/sys/fs/cgroup") / name
    return path.read_text().strip() if path.is_file() else ""


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
