"""The only place, besides the kernels of CGBN, that knows about devices.

Nothing here has been run on a GPU by the project's own tests, which run on CPUs.
"""

import contextlib
import os
import resource
from contextlib import AbstractContextManager

import torch

from horovod_megdet import comm
from horovod_megdet.config import RuntimeConfig
from horovod_megdet.errors import UserError

_AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def choose(runtime: RuntimeConfig) -> torch.device:
    """Returns this rank's device and sets its CPU threads; on a GPU host rank i of the host gets GPU i."""
    torch.set_num_threads(runtime.threads_per_rank or threads_per_rank())
    if runtime.device == "cpu" or (runtime.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if comm.local_rank() >= count:
        raise UserError(
            f"Local rank {comm.local_rank()} has no GPU: {comm.host()} has {count}, and {comm.local_size()} ranks run "
            "on it. Start one rank for each GPU (slots= in the hostfile), or set runtime.device: cpu."
        )
    device = torch.device("cuda", comm.local_rank())
    torch.cuda.set_device(device)
    return device


def threads_per_rank() -> int:
    """The cores that a rank may use: its own if the launcher bound it to some, else its part of the host's."""
    usable = len(os.sched_getaffinity(0))
    bound = usable * comm.local_size() <= (os.cpu_count() or 1)
    return usable if bound else max(1, usable // comm.local_size())


def autocast(runtime: RuntimeConfig, device: torch.device) -> AbstractContextManager[None]:
    """Automatic mixed precision as configured; does nothing for ``amp: none``."""
    if runtime.amp == "none":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_AMP_DTYPES[runtime.amp])


def channels_last(runtime: RuntimeConfig, device: torch.device) -> bool:
    """Whether activations have their channels last; measured on CPUs, neither layout is faster there."""
    return device.type == "cuda" if runtime.channels_last == "auto" else runtime.channels_last


def loss_scaler(runtime: RuntimeConfig, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler that float16 needs; disabled, and then without effect, for the other types."""
    return torch.amp.GradScaler(device.type, enabled=runtime.amp == "float16")


def memory_mb(device: torch.device) -> float:
    """Peak memory of this rank in MB: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
