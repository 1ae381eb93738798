"""What a rank finds out about its own process and host, without talking to the others."""

import hashlib
import ipaddress
import os
import re
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

import horovod_megdet
from horovod_megdet import comm, launched
from horovod_megdet.cluster.doctor import facts
from horovod_megdet.config import Config
from horovod_megdet.data.loader import PREFETCH
from horovod_megdet.versions import versions

INTERFACE_VARIABLES = (
    "OMPI_MCA_btl_tcp_if_include",
    "OMPI_MCA_btl_tcp_if_exclude",
    "OMPI_MCA_oob_tcp_if_include",
    "HOROVOD_GLOO_IFACE",
    "NCCL_SOCKET_IFNAME",
)
"""Environment variables that name network interfaces; mpirun passes its options to the ranks as OMPI_MCA_*."""

SRUN_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "")
"""What srun sets even without PMIx, like a row of ``launched.PLACE_VARIABLES``: its processes then cannot find each
other, so that they do not count as launched ranks elsewhere."""

RESOLVER_THREADS = 16


def run_probes(probes: dict[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Runs all probes and returns, by name, what they found and why others failed.

    Catches every exception: the doctor goes on where everything else would stop.
    """
    values: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name, probe in probes.items():
        try:
            values[name] = probe()
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
    return values, failures


def probe_process(config: Config | None, config_error: str) -> facts.Facts:
    """What needs no other rank and takes no time: it is known even if the ranks never find each other."""
    run_dir = Path(config.output.run_dir) if config else Path()
    found, failures = run_probes(
        {
            "software": software,
            "machine": machine,
            "processor": processor,
            "gpus": gpus,
            "network": network,
            "run_disk": lambda: disk(existing_folder(run_dir)),
            "temporary_disk": lambda: disk(Path(tempfile.gettempdir())),
            "memory": memory,
            "limits": limits,
            "config": lambda: summarize(config) if config else None,
        }
    )
    return facts.Facts(
        place=place_by_launcher(),
        launched_ranks=launched_ranks(),
        config_error=config_error,
        failures=failures,
        **found,
    )


def place_by_launcher() -> facts.Place:
    """The place that the launcher's environment variables give this process; that of a lone rank if there are none."""
    rank, size, local_rank, local_size = _launcher_numbers()
    return facts.Place(rank or 0, size or 1, local_rank or 0, local_size or 1, launched.host())


def launched_ranks() -> int | None:
    """The number of ranks that the launcher started, if it tells."""
    return _launcher_numbers()[1]


def place_by_horovod() -> facts.Place:
    """The place that Horovod, once started, gives this rank."""
    return facts.Place(comm.rank(), comm.size(), comm.local_rank(), comm.local_size(), launched.host())


def software() -> facts.Software:
    """Versions, and a digest of the project's code: two checkouts of one version may differ."""
    folder = Path(horovod_megdet.__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.c")]):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return facts.Software(versions(), digest.hexdigest(), str(folder))


def build() -> facts.Build:
    """What Horovod and MPI say about themselves once they run."""
    library = ""
    with suppress(ModuleNotFoundError):  # without mpi4py, which check_versions reports
        library = comm.mpi_library()
    return facts.Build(comm.controller(), library, comm.built_features())


def machine() -> facts.Machine:
    """The running kernel and the host's addresses."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    addresses = [
        entry.address.partition("%")[0]
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    ]
    return facts.Machine(boot_id, sorted(address for address in addresses if not _is_local(address)))


def processor() -> facts.Processor:
    """Cores, and what limits their use."""
    quota = re.match(r"(\d+) (\d+)", cgroup_setting("cpu.max"))
    cores = int(quota[1]) / int(quota[2]) if quota else None
    return facts.Processor(os.cpu_count() or 1, sorted(os.sched_getaffinity(0)), cores)


def gpus() -> list[str]:
    """Names of the GPUs that this rank sees."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def network() -> facts.Network:
    """The host's interfaces."""
    addresses = psutil.net_if_addrs()
    interfaces = []
    for name, stats in psutil.net_if_stats().items():
        own = [entry.address for entry in addresses.get(name, []) if entry.family == socket.AF_INET]
        loopback = "loopback" in stats.flags.split(",")
        interfaces.append(facts.Interface(name, own, stats.isup, loopback, stats.speed))
    other_controller = "HOROVOD_GLOO" if launched.by_mpi() else "OMPI_"
    selected = {
        name: os.environ[name]
        for name in INTERFACE_VARIABLES
        if os.environ.get(name) and not name.startswith(other_controller)
    }
    return facts.Network(interfaces, selected)


def disk(folder: Path) -> facts.Disk:
    """Size and free space of the file system that holds a folder."""
    usage, files = shutil.disk_usage(folder), os.statvfs(folder)
    return facts.Disk(str(folder), usage.total, usage.free, files.f_favail if files.f_files else -1)


def existing_folder(folder: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def memory() -> facts.Memory:
    """Main memory of the host, or of the container if that has less."""
    host = psutil.virtual_memory()
    limit, used = (_number(cgroup_setting(f"memory.{name}")) for name in ("max", "current"))
    if limit is None or used is None or limit > host.total:
        return facts.Memory(host.total, host.available)
    return facts.Memory(limit, min(host.available, limit - used))


def cgroup_setting(name: str) -> str:
    """A setting of the control group (version 2) as a container sees its own; empty if there is none."""
    path = Path("/sys/fs/cgroup") / name
    return path.read_text().strip() if path.is_file() else ""


def limits() -> facts.Limits:
    """Limits of this process."""
    files, locked = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    adapters = Path("/sys/class/infiniband")
    return facts.Limits(files, locked, adapters.is_dir() and any(adapters.iterdir()))


def summarize(config: Config) -> facts.ConfigSummary:
    """The parts of a configuration that the checks need."""
    data = config.data
    return facts.ConfigSummary(
        fingerprint=config.fingerprint(),
        device=config.runtime.device,
        workers=data.workers,
        keep_checkpoints=config.output.keep_checkpoints,
        batch_bytes=(PREFETCH + 1) * data.images_per_rank * 3 * max(data.shorter_side_train) * data.longer_side_train,
    )


def resolve(hosts: list[str]) -> dict[str, list[str]]:
    """Looks up all hosts, several at a time: a name server that does not answer takes seconds for each."""
    with ThreadPoolExecutor(RESOLVER_THREADS) as pool:
        return dict(zip(hosts, pool.map(_addresses_of, hosts), strict=True))


def _addresses_of(host: str) -> list[str]:
    try:
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError):
        return []


def _launcher_numbers() -> tuple[int | None, ...]:
    """Rank, number of ranks, and the same two on this host, as far as the launcher's environment variables tell."""
    for names in (*launched.PLACE_VARIABLES, SRUN_VARIABLES):
        if names[0] in os.environ:
            return tuple(_number(os.environ.get(name)) for name in names)
    return None, None, None, None


def _is_local(address: str) -> bool:
    """Whether an address has no meaning on other hosts."""
    parsed = ipaddress.ip_address(address)
    return parsed.is_loopback or parsed.is_link_local


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
