"""Measurements between the ranks: how far their clocks are apart, and how long allreduces take. All are collective."""

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
MESSAGE_BYTES = tuple(4**power for power in range(2, 14))
"""From 16 B, less than the statistics of a normalization layer, to 64 MiB, a fusion buffer full of gradients."""

TOO_SLOW = 1.5
"""Seconds; if a message takes longer, larger ones are left out."""

TIME_PER_SIZE = 0.1
"""Seconds to spend on each message size, about."""

FEWEST_REPETITIONS, MOST_REPETITIONS = 3, 200


@dataclass(frozen=True)
class Clock:
    """A rank's clock, compared with that of rank 0."""

    rank: int
    host: str
    offset: float
    """Seconds that it is ahead of rank 0's."""
    uncertainty: float
    """Half the round-trip time of the messages that compared them, in seconds."""


@dataclass(frozen=True)
class Timing:
    """The time of an allreduce in seconds: the median of several, on the slowest rank."""

    bytes: int
    horovod: float
    mpi: float | None
    """Of MPI's own allreduce, before Horovod was started; None under Gloo."""

    def bandwidth(self, ranks: int) -> float:
        """Horovod's :func:`bus_bandwidth` for this message."""
        return bus_bandwidth(self.bytes, self.horovod, ranks)


def bus_bandwidth(size: int, seconds: float, ranks: int) -> float:
    """Gbit/s that each of n ranks sends in an allreduce: 2 (n - 1) / n of the message, as nccl-tests defines it."""
    return size * 8 * 2 * (ranks - 1) / ranks / seconds / 1e9


def compare_clocks() -> list[Clock]:
    """Compares all clocks at once, by messages from rank 0 to all ranks and back; the fastest round counts.

    Every rank notes the time at which rank 0's message arrives, which is between ``before`` and ``after`` by rank 0's
    clock. The middle of the two is therefore wrong by at most half the round-trip time.
    """
    empty = torch.zeros(1, dtype=torch.float64)
    hosts = comm.gather_objects(launched.host(), "doctor.clock_hosts")
    rounds = []
    for _ in range(CLOCK_ROUNDS):
        comm.barrier()
        before = time.time()
        comm.broadcast_(empty, "doctor.ping")
        noted = comm.all_gather(torch.tensor([time.time()], dtype=torch.float64), "doctor.pong")[:, 0].tolist()
        after = time.time()
        rounds.append((after - before, (before + after) / 2, noted))
    round_trip, middle, noted = comm.broadcast_object(min(rounds), "doctor.clocks")
    return [
        Clock(rank, host, stamp - middle if rank else 0.0, round_trip / 2)
        for rank, (host, stamp) in enumerate(zip(hosts, noted, strict=True))
    ]


def time_bare_mpi() -> dict[int, float]:
    """Seconds of MPI's own allreduce by message size in bytes; empty without MPI or mpi4py, and for a single rank.

    Must be called before Horovod is started.
    """
    if not launched.by_mpi():
        return {}
    try:
        mpi = BareMPI()
    except ModuleNotFoundError:  # mpi4py: Horovod may have been built for Gloo only
        return {}
    if mpi.size == 1:
        return {}
    messages = {size: functools.partial(mpi.sum_, np.zeros(size // 4, np.float32)) for size in MESSAGE_BYTES}
    return _time_all(messages, mpi.largest)


def time_horovod(device: torch.device) -> dict[int, float]:
    """Seconds of Horovod's allreduce of a float32 tensor on ``device``, by size in bytes; empty for a single rank."""
    if comm.size() == 1:
        return {}
    tensors = {size: torch.zeros(size // 4, device=device) for size in MESSAGE_BYTES}
    messages = {size: functools.partial(_sum, tensor, f"doctor.{size}") for size, tensor in tensors.items()}
    return _time_all(messages, _slowest)


def _sum(tensor: torch.Tensor, name: str) -> None:
    comm.sum_(tensor, name)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _time_all(messages: Mapping[int, Callable[[], None]], slowest: Callable[[float], float]) -> dict[int, float]:
    """Times the messages from small to large. ``slowest`` gives all ranks the same times, so that all stop together."""
    times: dict[int, float] = {}
    for size, message in messages.items():
        trial = slowest(_median_time(message, 2))
        repetitions = int(TIME_PER_SIZE / max(trial, 1e-6))
        times[size] = slowest(_median_time(message, min(MOST_REPETITIONS, max(FEWEST_REPETITIONS, repetitions))))
        if times[size] > TOO_SLOW:
            break
    return times


def _median_time(message: Callable[[], None], repetitions: int) -> float:
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        message()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _slowest(seconds: float) -> float:
    return float(comm.all_gather(torch.tensor([seconds], dtype=torch.float64), "doctor.seconds").max())
