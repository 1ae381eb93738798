"""How noisy the gradient of a mini-batch is: the simple noise scale, measured while training.

A step takes the mean G of the gradients g_u of U units: the passes of all ranks, of b images each, n = U b images. With
g, the true gradient, and tr(Sigma), the variance of the gradient of a single image summed over the parameters,

    E |g_u|^2 = |g|^2 + tr(Sigma) / b          E |G|^2 = |g|^2 + tr(Sigma) / n

so that these estimates are unbiased (McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", appendix A):

    tr(Sigma) = (mean_u |g_u|^2 - |G|^2) / (1/b - 1/n)
    |g|^2     = |G|^2 - tr(Sigma) / n                           which can be negative
    B         = tr(Sigma) / |g|^2                               the simple noise scale, in images

Their ratio is not unbiased, so both are averaged over time before it is taken. All of it is computed for the whole
detector and for its modules. It takes the norms of the local gradients, one number for each module, and one small
message that sums them over the ranks.

The estimates assume that images are independent, and that the gradient of a unit depends on its images only. Batches
are grouped by orientation, which adds the variance between the groups; under cross-GPU BN the gradient of a unit also
depends, a little, on the images of the other ranks in the same pass.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from horovod_megdet import comm
from horovod_megdet.models.modules import MODULES, trainable_parameters

MEMORY = 50
"""Measurements over which the estimates are averaged: older ones fade by 1 - 1 / MEMORY with each new one."""

COST_LIMIT = 0.01
"""Part of the time of training that measuring may take, where the interval is chosen automatically."""

ALL = "all"
"""Stands beside the modules for the whole detector."""

Interval = int | Literal["auto", "off"]
"""Steps between two measurements."""


def estimates(of_units: float, of_mean: float, images: int, units: int) -> tuple[float, float]:
    """Unbiased estimates of (tr(Sigma), |g|^2) from one step.

    ``of_units`` is the mean over the units of |g_u|^2, ``of_mean`` is |G|^2, and ``images`` are those of a unit.
    """
    variance = (of_units - of_mean) / (1 / images - 1 / (images * units))
    return variance, of_mean - variance / (images * units)


@dataclass
class NoiseAverages:
    """The estimates, averaged over time; the same on every rank, and saved in checkpoints."""

    weight: float = 0.0
    """Of all measurements together; approaches 1 (the averages start at 0, and are divided by it)."""
    variance: dict[str, float] = field(default_factory=dict)
    """weight x tr(Sigma), by module and for :data:`ALL`."""
    signal: dict[str, float] = field(default_factory=dict)
    """weight x |g|^2."""
    next_step: int = 0
    """The first step that is measured again."""

    def add(self, variance: dict[str, float], signal: dict[str, float]) -> None:
        """Takes in the estimates of one step, by module."""
        new = 1 / MEMORY
        self.weight += new * (1 - self.weight)
        for averages, values in ((self.variance, variance), (self.signal, signal)):
            for name, value in (values | {ALL: math.fsum(values.values())}).items():
                averages[name] = averages.get(name, 0.0) * (1 - new) + value * new

    def variance_of(self, name: str = ALL) -> float:
        """tr(Sigma); needs a measurement."""
        return self.variance[name] / self.weight

    def signal_of(self, name: str = ALL) -> float:
        """|g|^2, an estimate that can be negative; needs a measurement."""
        return self.signal[name] / self.weight

    def noise_scale(self, name: str = ALL) -> float | None:
        """B in images; None where |g|^2 cannot be told from the noise, or nothing was measured yet."""
        if not self.weight or self.signal_of(name) <= 0:
            return None
        return self.variance_of(name) / self.signal_of(name)

    def row(self) -> dict[str, float | None]:
        """The averages for a row of metrics; empty before the first measurement."""
        if not self.weight:
            return {}
        row: dict[str, float | None] = {
            "noise_scale": self.noise_scale(),
            "gradient_variance": self.variance_of(),
            "squared_gradient": self.signal_of(),
        }
        return row | {f"noise_scale_{module}": self.noise_scale(module) for module in MODULES}


class GradientNoise:
    """Measures the noise of a detector's gradients, in some of the steps."""

    def __init__(self, detector: nn.Module, images: int, accumulation: int, interval: Interval) -> None:
        """``images`` are those of one pass of one rank.

        With a single unit, one pass of one rank, there is nothing to compare: then nothing is measured.
        """
        self.parameters = trainable_parameters(detector)
        self.images = images
        self.accumulation = accumulation
        self.units = accumulation * comm.size()
        self.interval = interval
        self.averages = NoiseAverages()
        self._squares: dict[str, Tensor] | None = None
        self._seconds = 0.0

    @property
    def enabled(self) -> bool:
        """Whether anything is measured at all."""
        return self.interval != "off" and self.units > 1

    @contextmanager
    def measuring(self, step: int) -> Iterator[None]:
        """Around the passes of a step: notes the norms of their gradients, if the step is due."""
        if not self.enabled or step < self.averages.next_step:
            yield
            return
        self._squares = dict.fromkeys(MODULES, torch.zeros((), dtype=torch.float64))
        # They are called before the gradient is added to those of other passes, and before Horovod takes it.
        hooks = [
            parameter.register_hook(partial(self._note, module))
            for module, parameters in self.parameters.items()
            for parameter in parameters
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, module: str, gradient: Tensor) -> None:
        assert self._squares is not None
        started = time.perf_counter()
        self._squares[module] = self._squares[module].to(gradient.device) + _square(gradient)
        self._seconds += time.perf_counter() - started

    def update(self, step: int, images: int, loss_scale: float, step_seconds: float) -> None:
        """Takes in the step, if it is measured: after its gradients are averaged, before they are clipped. Collective.

        ``images`` are those that this rank saw: a step in which some rank saw fewer than planned does not count, nor
        does one whose gradients are not finite. ``loss_scale`` is the factor that the gradients have, and
        ``step_seconds`` the time that the step has taken so far.
        """
        if self._squares is None:
            return
        started = time.perf_counter()
        local = [*self._squares.values(), *map(torch.tensor, (images, self._seconds, step_seconds))]
        message = torch.stack([value.double().cpu() for value in local])
        *squares, all_images, measuring_seconds, all_seconds = comm.sum_(message, "gradient_noise").tolist()
        variance, signal = {}, {}
        for module, square in zip(MODULES, squares, strict=True):
            # Each pass has 1 / accumulation of the loss, so that the gradient of a unit is larger than what was noted.
            of_units = square * self.accumulation**2 / self.units / loss_scale**2
            of_mean = self._square_of_mean(module) / loss_scale**2
            variance[module], signal[module] = estimates(of_units, of_mean, self.images, self.units)
        if all_images == self.images * self.units and math.isfinite(sum((*variance.values(), *signal.values()))):
            self.averages.add(variance, signal)
        # From numbers that all ranks have alike, so that they measure in the same steps.
        automatic = math.ceil(measuring_seconds / all_seconds / COST_LIMIT)
        self.averages.next_step = step + (max(1, automatic) if self.interval == "auto" else int(self.interval))
        # What this took is told with the next message.
        self._squares, self._seconds = None, time.perf_counter() - started

    def _square_of_mean(self, module: str) -> float:
        gradients = [p.grad for p in self.parameters[module] if p.grad is not None]
        return torch.stack([_square(gradient) for gradient in gradients]).sum().item() if gradients else 0.0


def _square(gradient: Tensor) -> Tensor:
    """|gradient|^2 as a () float64 tensor on the gradient's device."""
    return torch.linalg.vector_norm(gradient).double().square()


def gain_table(noise_scale: float, mini_batch: int) -> list[tuple[str, str]]:
    """What a mini-batch gains and loses by its size, as rows for people to read (McCandlish et al., section 2)."""
    ratio = mini_batch / noise_scale
    return [
        ("noise scale", f"{noise_scale:.4g} images; the mini-batch is {ratio:.3g} times as large"),
        ("steps", f"{1 + 1 / ratio:.3g} times the fewest possible, with twice the mini-batch {1 + 0.5 / ratio:.3g}"),
        ("images", f"{1 + ratio:.3g} times the fewest possible, with twice the mini-batch {1 + 2 * ratio:.3g}"),
        ("learning rate", f"the best one is {1 / (1 + ratio):.3g} times what the linear rule extrapolates"),
    ]


def gain_in_words(noise_scale: float, mini_batch: int) -> str:
    """What the noise scale means for a mini-batch, for the end of a line of the log."""
    saved = 1 - (1 + noise_scale / (2 * mini_batch)) / (1 + noise_scale / mini_batch)
    return f"noise scale {noise_scale:.3g} images: twice the mini-batch would save {saved:.0%} of the steps"
