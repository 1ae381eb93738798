"""Fair timing on noisy machines: the variants take turns in one run, and ratios are computed turn by turn."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from horovod_megdet import comm


@dataclass(frozen=True)
class Timing:
    """Seconds of each turn of a variant; the slowest rank counts."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """Median over the turns."""
        return statistics.median(self.seconds)

    def ratio(self, other: "Timing") -> float:
        """Median over the turns of this time divided by the other's in the same turn."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))


def take_turns(variants: Mapping[str, Callable[[], object]], turns: int, warm_up: int = 2) -> dict[str, Timing]:
    """Runs each variant once per turn, on all ranks together; each turn starts with a different one. Collective."""
    names = list(variants)
    for _ in range(warm_up):
        for name in names:
            variants[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            comm.barrier()
            start = time.perf_counter()
            variants[name]()
            mine = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
            seconds[name].append(comm.all_gather(mine, "benchmark.seconds").max().item())
    return {name: Timing(values) for name, values in seconds.items()}
