"""Activation checkpointing that neither communicates nor updates running statistics a second time.

In the forward pass of a checkpointed part the normalization layers record their batch statistics on a tape; when the
backward pass runs that part again, they read them from it.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from horovod_megdet.layers.kernels import Statistics


class Tape:
    """The batch statistics of one forward pass through a checkpointed part, in the order of the layers."""

    def __init__(self) -> None:
        self.replaying = False
        self._statistics: list[Statistics] = []
        self._position = 0

    def append(self, statistics: "Statistics") -> None:
        """Records a layer's statistics in the forward pass."""
        self._statistics.append(statistics)

    def next(self) -> "Statistics":
        """The statistics of the next layer in the recomputation."""
        self._position += 1
        return self._statistics[self._position - 1]

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """The context of the forward pass."""
        token = current_tape.set(self)
        try:
            yield
        finally:
            current_tape.reset(token)

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """The context of a recomputation; one forward pass can be recomputed several times."""
        self.replaying, self._position = True, 0
        token = current_tape.set(self)
        try:
            yield
        finally:
            current_tape.reset(token)


current_tape: ContextVar[Tape | None] = ContextVar("current_tape", default=None)
"""The tape of the checkpointed part that is being computed, if any."""


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Returns ``function(x)`` and recomputes it in the backward pass instead of keeping its activations.

    The gradients are bit for bit those of a plain call, as long as ``function`` draws no random numbers.
    """
    output: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)
    return output


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    tape = Tape()
    return tape.record(), tape.replay()
