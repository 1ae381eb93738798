"""Chooses the device, cores and threads of this rank, and sets its process up for them."""

import contextlib
import ctypes
import os
import resource
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from horovod_megdet import comm, launched
from horovod_megdet.config import RuntimeConfig
from horovod_megdet.engine import precision
from horovod_megdet.errors import UserError
from horovod_megdet.layers.float32_products import use_float32_products

_AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

Masks = list[tuple[str, list[int]]]
"""For each rank, its host and the cores that it may use."""

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def set_up_process(runtime: RuntimeConfig) -> torch.device:
    """Binds cores, sets threads and the device, which is returned. Collective; raises as :func:`set_up_device`."""
    masks = core_masks()
    if runtime.bind_cores:
        bind_to_cores(masks)
    torch.set_num_threads(runtime.threads_per_rank or threads_per_rank(masks, comm.rank()))
    return set_up_device(runtime)


def set_up_device(runtime: RuntimeConfig) -> torch.device:
    """Sets this process up for its device, and returns it; on a GPU host rank i of the host gets GPU i.

    Raises :class:`UserError` where there is no GPU for this rank.
    """
    if runtime.device == "cpu" or (runtime.device == "auto" and not torch.cuda.is_available()):
        prepare_cpu()
        return torch.device("cpu")
    count = torch.cuda.device_count()
    number = comm.local_rank() % count if comm.gpu_is_shared() else comm.local_rank()
    if number >= count:
        raise UserError(
            f"Local rank {comm.local_rank()} has no GPU: {launched.host()} has {count}, and {comm.local_size()} ranks "
            "run on it. Start one rank for each GPU (slots= in the host file), or set runtime.device: cpu."
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32, as PyTorch's convolutions have it by default
    if runtime.deterministic:
        use_deterministic_kernels()
    return device


def prepare_cpu() -> None:
    """Sets this process up for training on a CPU."""
    keep_freed_memory()
    if not precision.has_amx():
        use_float32_products()


def use_deterministic_kernels() -> None:
    """Makes PyTorch take kernels that give the same bits in every run, or say that there is none. For GPUs.

    To be called before the first matrix product. The CPU's kernels are deterministic for a given number of threads.
    """
    # cuBLAS is deterministic only with a workspace of its own for each stream.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # torchvision's deterministic RoIAlign is a Python function that it compiles. Without: no compiler is needed on the
    # hosts, nobody waits for it, and what it generates cannot differ between runs.
    torch.compiler.set_stance("force_eager")


def keep_freed_memory() -> None:
    """Lets glibc keep the memory of freed tensors for the next ones, instead of giving it back to the kernel.

    Every step allocates the same tensors again, and the kernel would clear each page of them.
    Does nothing with another allocator, or where the environment has settings for this one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt(_M_TRIM_THRESHOLD, -1)  # never give back the end of the heap
    mallopt(_M_MMAP_MAX, 0)  # nor take large blocks from elsewhere


def core_masks() -> Masks:
    """The host and usable cores of each rank, in rank order. Collective."""
    return comm.gather_objects((launched.host(), sorted(os.sched_getaffinity(0))), "cores")


def bind_to_cores(masks: Masks) -> None:
    """Gives this rank cores of its own, where the launcher lets several ranks of a host run on the same.

    Otherwise the scheduler moves ranks about and now and then puts two on one core; with cross-GPU BN all ranks then
    wait, many times a step. Holds for all threads of this process and for the loader workers that it starts.
    """
    cores = own_cores(masks, comm.rank())
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread.name), cores)


def threads_per_rank(masks: Masks, rank: int) -> int:
    """One thread for each core of a rank; the same number for all ranks that share cores, if need be one too few."""
    return max(1, len(masks[rank][1]) // masks.count(masks[rank]))


def own_cores(masks: Masks, rank: int) -> set[int]:
    """This rank's part of the cores that it shares, from the host and the cores of each rank.

    All of them, where no other rank has the same or where there are more ranks than cores.
    """
    sharers = [other for other, mask in enumerate(masks) if mask == masks[rank]]
    cores = sorted(masks[rank][1], key=_place_of_core)
    if len(sharers) > len(cores):
        return set(cores)
    mine = sharers.index(rank)
    return set(cores[mine * len(cores) // len(sharers) : (mine + 1) * len(cores) // len(sharers)])


def _place_of_core(core: int) -> tuple[int, int, int]:
    """Puts the hardware threads of a core, and the cores of a socket, next to each other."""
    folder = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
    try:
        socket, number = (int((folder / name).read_text()) for name in ("physical_package_id", "core_id"))
    except (OSError, ValueError):
        return 0, core, core
    return socket, number, core


def autocast(runtime: RuntimeConfig, device: torch.device) -> AbstractContextManager[None]:
    """Automatic mixed precision as configured and, for ``auto``, chosen (precision.py); nothing for ``amp: none``."""
    if runtime.amp == "none":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_AMP_DTYPES[runtime.amp])


def loss_scaler(runtime: RuntimeConfig, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler that float16 needs; disabled, and then without effect, for the other types."""
    return torch.amp.GradScaler(device.type, enabled=runtime.amp == "float16")


def memory_mb(device: torch.device) -> float:
    """Peak memory of this rank in MiB: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
