"""What this rank is doing, for the thread that watches it (see :mod:`horovod_megdet.engine.watchdog`).

The main thread leaves notes here; a note costs a few assignments, so that even each message of cross-GPU batch
normalisation can afford one. Every note counts as progress.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Activity:
    """The notes of this process. Only the main thread writes them."""

    doing: str = "starts"
    """As the end of a sentence: "rank 3 ..."."""

    waiting_for: str | None = None
    """Name of the collective that the rank waits in: a tensor's, or what it is about."""

    step: int = 0
    """The optimiser step that runs, counted from 1; 0 before the first."""

    progress: int = 0
    """Grows whenever the rank gets on with something."""

    def now(self, doing: str) -> None:
        """The rank begins something else."""
        self.doing = doing
        self.progress += 1

    def went_on(self) -> None:
        """The rank got on with what it is doing: an image of many, a batch of an evaluation."""
        self.progress += 1

    def waits_for(self, name: str) -> None:
        """The rank enters a collective, whose name has to be the same on all ranks."""
        self.waiting_for = name
        self.progress += 1

    def has_got(self) -> None:
        """The collective that the rank waited in is complete."""
        self.waiting_for = None
        self.progress += 1

    def describe(self) -> str:
        """A verb phrase: what the rank does now."""
        return f"waits for tensor {self.waiting_for}" if self.waiting_for is not None else self.doing


current = Activity()
"""The activity of this process."""


def noting_waits(batches: Iterable[T], doing: str) -> Iterator[T]:
    """Yields the batches, noting when the rank waits for the loader and when it goes on ``doing`` something."""
    current.now("waits for the data loader")
    for batch in batches:
        current.now(doing)
        yield batch
        current.now("waits for the data loader")
