"""What this rank is doing, for the thread that watches it (see :mod:`horovod_megdet.cluster.watchdog.watchdog`).

The main thread leaves notes here. A note costs a few assignments, so that even each message of cross-GPU batch
normalization can afford one. Every note counts as progress.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Progress:
    """The notes of one process. Only its main thread writes them."""

    doing: str = "starting"
    """As the end of a sentence: "rank 3 is ..."."""

    waiting_for: str | None = None
    """Name of the collective that the rank is waiting in: that of a tensor, or what the collective is about."""

    step: int = 0
    """The optimizer step that is running, counted from 1; 0 before the first."""

    notes: int = 0
    """Number of notes so far: a rank that makes progress leaves more."""

    waited_seconds: float = 0.0
    """Time spent in collectives so far, waiting for other ranks and for messages."""

    _wait_began: float = 0.0

    def set(self, doing: str) -> None:
        """The rank begins to do something else."""
        self.doing = doing
        self.notes += 1

    def advance(self) -> None:
        """The rank finished a part of what it is doing: one image of many, one batch of an evaluation."""
        self.notes += 1

    def wait_for(self, name: str) -> None:
        """The rank enters a collective, whose name is the same on all ranks."""
        self.waiting_for = name
        self.notes += 1
        self._wait_began = time.perf_counter()

    def finished_waiting(self) -> None:
        """The collective that the rank was waiting in is complete."""
        self.waiting_for = None
        self.notes += 1
        self.waited_seconds += time.perf_counter() - self._wait_began

    def describe(self) -> str:
        """What the rank is doing now, as the end of a sentence: "rank 3 is ..."."""
        return f"waiting for tensor {self.waiting_for}" if self.waiting_for is not None else self.doing


progress = Progress()
"""The notes of this process."""


def noting_waits(batches: Iterable[T], doing: str) -> Iterator[T]:
    """Yields the batches; notes when the rank waits for the loader, and that it is ``doing`` something in between."""
    progress.set("waiting for the data loader")
    for batch in batches:
        progress.set(doing)
        yield batch
        progress.set("waiting for the data loader")
