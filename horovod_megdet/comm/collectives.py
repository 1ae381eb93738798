"""Ranks, groups of ranks, and the collectives that they call: every rank of a group in the same order."""

import contextlib
import functools
import io
import os
import pickle
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from horovod_megdet import launched
from horovod_megdet.progress import progress

T = TypeVar("T")

LostRankError = hvd.HorovodInternalError
"""Raised by a collective when another rank is gone or cannot be reached."""


@dataclass(frozen=True)
class Group:
    """Ranks that communicate among themselves: the world, or a Horovod process set."""

    ranks: tuple[int, ...]
    process_set: hvd.ProcessSet | None
    """None for a rank alone, which does not communicate."""

    @property
    def size(self) -> int:
        return len(self.ranks)


def rank() -> int:
    """This rank, 0 to size() - 1; before :func:`init` the one that the launcher gave it."""
    return hvd.rank() if hvd.is_initialized() else launched.rank()


def size() -> int:
    """Number of ranks; 1 before :func:`init`, so that models can be built without a launcher."""
    return hvd.size() if hvd.is_initialized() else 1


def local_rank() -> int:
    """This rank among those of its host: the GPU it uses."""
    return hvd.local_rank() if hvd.is_initialized() else 0


def local_size() -> int:
    """Number of ranks on this host."""
    return hvd.local_size() if hvd.is_initialized() else 1


def is_main() -> bool:
    """True on the rank that prints and writes files."""
    return rank() == 0


def world() -> Group:
    """All ranks. Raises ``RuntimeError`` if there are several and Horovod has not been started yet."""
    if not hvd.is_initialized() and launched.size() > 1:
        raise RuntimeError(f"{launched.size()} ranks were launched: call comm.init() or hvd.init() first")
    return Group(tuple(range(size())), hvd.global_process_set)


def alone() -> Group:
    """This rank only: nothing is communicated."""
    return Group((rank(),), None)


@functools.cache  # Horovod refuses a group that it has
def split_world(ranks_per_group: int) -> Group:
    """Divides the world into groups of consecutive ranks and returns the one that this rank is in.

    Launchers number the ranks host by host, so consecutive ranks are on as few hosts as possible. Collective; needs
    ``init(groups=True)``, or HOROVOD_DYNAMIC_PROCESS_SETS=1 where Horovod is started in another way.
    """
    if size() % ranks_per_group:
        raise ValueError(f"{size()} ranks cannot be divided into groups of {ranks_per_group}")
    if ranks_per_group == size():
        return world()
    if ranks_per_group == 1:
        return alone()
    mine = None
    for first in range(0, size(), ranks_per_group):
        ranks = list(range(first, first + ranks_per_group))
        process_set = hvd.add_process_set(ranks)
        if rank() in ranks:
            mine = Group(tuple(ranks), process_set)
    assert mine is not None
    return mine


def gpu_is_shared() -> bool:
    """Whether several ranks of a host use one GPU, and exchange GPU tensors through the host's memory: for tests only.

    NCCL refuses two ranks on one GPU, so HOROVOD_MEGDET_SHARE_GPU=1 has to be set on all ranks.
    """
    return os.environ.get("HOROVOD_MEGDET_SHARE_GPU") == "1"


def sum_(tensor: Tensor, name: str, group: Group | None = None) -> Tensor:
    """Replaces ``tensor`` by its sum over the group's ranks, and returns it.

    ``name`` has to be the same on every rank and belong to one shape: Horovod caches what it negotiated per name.
    """
    group = group or world()
    if group.size == 1:
        return tensor
    message = tensor.cpu() if gpu_is_shared() else tensor
    with waiting_for(name):
        hvd.allreduce_(message, op=hvd.Sum, name=name, process_set=group.process_set)
    return tensor if message is tensor else tensor.copy_(message)


def all_gather(tensor: Tensor, name: str) -> Tensor:
    """Returns the ranks' 1-d float tensors, all of one length, as the rows of a (size, length) tensor."""
    if size() == 1:
        return tensor[None].clone()
    with waiting_for(name):
        return hvd.allgather(tensor[None].contiguous(), name=name)


def gather_objects(value: T, name: str) -> list[T]:
    """Returns the ranks' values, which can be pickled, in rank order on every rank: one message, of any length."""
    if size() == 1:
        return [value]
    with waiting_for(name):
        received = hvd.allgather(_pickled(value), name=name)
    return _unpickled(received)


def exchange_objects(values: list[T], name: str) -> list[T]:
    """Sends ``values[r]``, which can be pickled, to each rank r; returns, in rank order, what this one was sent.

    One message; unlike with :func:`gather_objects`, a rank receives only what is meant for it.
    """
    if size() == 1:
        return values
    messages = [_pickled(value) for value in values]
    splits = torch.tensor([len(message) for message in messages], dtype=torch.int32)
    with waiting_for(name):
        received, _ = hvd.alltoall(torch.cat(messages), splits=splits, name=name)
    return _unpickled(received)


def gather_to_main(rows: Tensor, name: str) -> Tensor | None:
    """Returns the ranks' rows below each other, in rank order, on rank 0; None on the other ranks.

    ``rows`` (n, ...) may have another n on each rank, also 0.
    """
    if size() == 1:
        return rows.clone()
    splits = torch.zeros(size(), dtype=torch.int32)
    splits[0] = len(rows)
    with waiting_for(name):
        collected, _ = hvd.alltoall(rows.contiguous(), splits=splits, name=name)
    return collected if is_main() else None


def broadcast_object(value: T, name: str, root: int = 0) -> T:
    """Returns the root's value, which can be pickled, on every rank: its length, then one message."""
    if size() == 1:
        return value
    mine = rank() == root
    message = _pickled(value) if mine else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([len(message)])
    with waiting_for(name):
        hvd.broadcast_(length, root_rank=root, name=f"{name}.length")
        message = message if mine else message.resize_(int(length))
        hvd.broadcast_(message, root_rank=root, name=name)
    received: T = value if mine else pickle.loads(message.numpy().data)
    return received


def _pickled(value: object) -> Tensor:
    """A message; Horovod's own functions for objects make theirs byte by byte, seconds for 10 MB."""
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpickled(message: Tensor) -> list[Any]:
    """The values of all ranks, whose pickles lie one after the other."""
    pickles = io.BytesIO(message.numpy().data)
    return [pickle.load(pickles) for _ in range(size())]


def broadcast_(tensor: Tensor, name: str) -> None:
    """Replaces ``tensor`` by rank 0's."""
    if size() > 1:
        with waiting_for(name):
            hvd.broadcast_(tensor, root_rank=0, name=name)


def in_memory_order(tensor: Tensor) -> Tensor:
    """A view of ``tensor`` that is contiguous, as Horovod wants it: (n, ..., C) of (n, C, ...) with channels last."""
    return tensor if tensor.is_contiguous() else tensor.movedim(1, -1)


def broadcast_weights(module: nn.Module) -> None:
    """Copies rank 0's parameters and buffers to all ranks."""
    if size() == 1:
        return
    weights = {name: in_memory_order(value) for name, value in module.state_dict().items()}
    messages = {name: value.cpu() for name, value in weights.items()} if gpu_is_shared() else weights
    with waiting_for("starting weights"):
        hvd.broadcast_parameters(messages, root_rank=0)
    if messages is not weights:
        for name, value in weights.items():
            value.copy_(messages[name])


def barrier() -> None:
    """Waits for all ranks."""
    if size() > 1:
        with waiting_for("barrier"):
            hvd.barrier()


@contextlib.contextmanager
def waiting_for(name: str) -> Iterator[None]:
    """Notes for the watchdog that this rank waits in the collective ``name`` while the block runs."""
    progress.wait_for(name)
    yield
    progress.finished_waiting()


class DistributedOptimizer(torch.optim.Optimizer):
    """What Horovod adds to an optimizer; the class itself is made by Horovod, see :func:`distributed_optimizer`."""

    def synchronize(self) -> None:
        """Waits until the gradients are averaged over the ranks."""
        raise NotImplementedError

    def skip_synchronize(self) -> AbstractContextManager[None]:
        """Around a ``step()`` after :meth:`synchronize`, which then does not wait again."""
        raise NotImplementedError


def distributed_optimizer(
    optimizer: torch.optim.Optimizer, module: nn.Module, passes_per_step: int, fp16: bool
) -> DistributedOptimizer:
    """Wraps ``optimizer`` so that gradients are summed over passes and averaged over ranks while backward runs.

    ``fp16`` sends them as float16.
    """
    compression: Any = _InMemoryOrder(hvd.Compression.fp16 if fp16 else hvd.Compression.none)
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    distributed: DistributedOptimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=named,
        compression=_ThroughHost(compression) if gpu_is_shared() else compression,
        backward_passes_per_step=passes_per_step,
        op=hvd.Average,
    )
    return distributed


@dataclass(frozen=True)
class _InMemoryOrder:
    """A compression of Horovod's that takes gradients with channels last, too; they are sent as they lie in memory."""

    compression: Any

    def compress(self, gradient: Tensor) -> tuple[Tensor, Any]:
        message, context = self.compression.compress(in_memory_order(gradient))
        return message, (gradient.is_contiguous(), context)

    def decompress(self, message: Tensor, context: Any) -> Tensor:
        contiguous, inner = context
        gradient: Tensor = self.compression.decompress(message, inner)
        return gradient if contiguous else gradient.movedim(-1, 1)


@dataclass(frozen=True)
class _ThroughHost:
    """A compression of Horovod's, after which the gradient is sent from the host's memory."""

    compression: Any

    def compress(self, gradient: Tensor) -> tuple[Tensor, Any]:
        compressed, context = self.compression.compress(gradient)
        return compressed.cpu(), (gradient.device, context)

    def decompress(self, message: Tensor, context: Any) -> Tensor:
        device, inner = context
        gradient: Tensor = self.compression.decompress(message.to(device), inner)
        return gradient


def synchronize(optimizer: DistributedOptimizer) -> None:
    """Waits until the gradients of ``optimizer`` are averaged over the ranks."""
    with waiting_for("gradients"):
        optimizer.synchronize()
