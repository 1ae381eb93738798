"""Measurements between the ranks: how far clocks are apart, and how long allreduces take. Everything is collective."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from horovod_megdet import comm, launched
from horovod_megdet.comm.bare_mpi import BareMPI

CLOCK_ROUNDS = 15
SIZES = tuple(4**power for power in range(2, 14))
"""Bytes of the messages: 16 B, one normalisation layer, to 64 MiB, a fused buffer of gradients."""

SLOWEST = 1.5
"""Seconds; messages larger than one that takes longer are left out."""

MEASURED = 0.1
"""Seconds that are measured for each size, about."""

REPETITIONS = (3, 200)
"""Fewest and most messages of one size."""


@dataclass(frozen=True)
class Clock:
    """A rank's clock against that of rank 0."""

    rank: int
    host: str
    offset: float
    """Seconds that it is ahead."""
    uncertainty: float
    """Half of the time that a message there and back took."""


@dataclass(frozen=True)
class Timing:
    """How long an allreduce of so many bytes takes: the median of several, on the slowest rank, in seconds."""

    bytes: int
    horovod: float
    mpi: float | None
    """Without Horovod, before it was started; None under Gloo."""

    def bandwidth(self, ranks: int) -> float:
        """Gbit/s that each rank sends, as the best algorithm has it: 2 (n - 1) / n of the message."""
        return self.bytes * 8 * 2 * (ranks - 1) / ranks / self.horovod / 1e9


def clocks() -> list[Clock]:
    """Measures all clocks at once, by messages from rank 0 to all and back; the quickest round counts.

    A rank notes the time when it gets rank 0's message, which was sent between ``before`` and ``after`` by rank 0's
    clock. So the middle of the two is at most half of the round trip off.
    """
    best: list[tuple[float, float]] = [(0.0, float("inf"))] * comm.size()
    empty = torch.zeros(1, dtype=torch.float64)
    hosts = comm.gather_objects(launched.host(), "doctor.hosts_of_clocks")
    for _ in range(CLOCK_ROUNDS):
        comm.barrier()
        before = time.time()
        comm.broadcast_(empty, "doctor.ping")
        noted = comm.gather(torch.tensor([time.time()], dtype=torch.float64), "doctor.pong")[:, 0].tolist()
        after = time.time()
        for rank, stamp in enumerate(noted):
            offset, uncertainty = stamp - (before + after) / 2, (after - before) / 2
            best[rank] = min(best[rank], (offset, uncertainty), key=lambda pair: pair[1])
    best = comm.broadcast_object(best, "doctor.clocks")
    return [
        Clock(rank, host, 0.0 if rank == 0 else offset, uncertainty)
        for rank, (host, (offset, uncertainty)) in enumerate(zip(hosts, best, strict=True))
    ]


def bare_mpi_times() -> dict[int, float]:
    """Seconds of an MPI allreduce without Horovod, by bytes; nothing where ranks do not use MPI, or there is one only.

    Has to be called before Horovod is started.
    """
    if not launched.by_mpi():
        return {}
    mpi = BareMPI()
    if mpi.size == 1:
        return {}
    messages = {size: functools.partial(mpi.sum_, np.zeros(size // 4, np.float32)) for size in SIZES}
    return _times(messages, mpi.largest)


def allreduce_times(device: torch.device) -> dict[int, float]:
    """Seconds of Horovod's allreduce of a float32 tensor on ``device``, by bytes; nothing where there is one rank."""
    if comm.size() == 1:
        return {}
    tensors = {size: torch.zeros(size // 4, device=device) for size in SIZES}
    messages = {size: functools.partial(_sum, tensor, f"doctor.{size}") for size, tensor in tensors.items()}
    return _times(messages, _slowest)


def _sum(tensor: torch.Tensor, name: str) -> None:
    comm.sum_(tensor, name)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _times(messages: Mapping[int, Callable[[], None]], slowest: Callable[[float], float]) -> dict[int, float]:
    """The seconds that each message takes, from small to large; the same on all ranks."""
    fewest, most = REPETITIONS
    found: dict[int, float] = {}
    for size, message in messages.items():
        trial = slowest(_median(message, 2))
        found[size] = slowest(_median(message, min(most, max(fewest, int(MEASURED / max(trial, 1e-6))))))
        if found[size] > SLOWEST:
            break
    return found


def _median(message: Callable[[], None], repetitions: int) -> float:
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        message()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _slowest(seconds: float) -> float:
    return float(comm.gather(torch.tensor([seconds], dtype=torch.float64), "doctor.seconds").max())
