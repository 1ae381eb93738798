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

The estimates assume that images are independent, and that the gradient of a unit depends on its own images only.
Batches are grouped by orientation, so the variance between the orientations counts b times. Under cross-GPU BN the
gradient of a unit also depends, a little, on the images of the other ranks in the same pass.
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
"""Fraction of the time of training that measuring may take, where the interval is automatic."""

ALL = "all"
"""Stands beside the modules for the whole detector."""

Interval = int | Literal["auto", "never"]
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

    measurements: int = 0
    """How many were taken in."""
    variance: dict[str, float] = field(default_factory=dict)
    """:attr:`weight` x tr(Sigma), by module and for :data:`ALL`."""
    signal: dict[str, float] = field(default_factory=dict)
    """:attr:`weight` x |g|^2."""
    next_step: int = 0
    """The first step that is measured again."""

    @property
    def weight(self) -> float:
        """Of all measurements together; approaches 1 (the averages start at 0, and are divided by it)."""
        return 1 - (1 - 1 / MEMORY) ** self.measurements

    def restart(self) -> None:
        """Forgets all measurements."""
        self.measurements = 0
        self.variance.clear()
        self.signal.clear()

    def add(self, variance: dict[str, float], signal: dict[str, float]) -> None:
        """Takes in the estimates of one step, by module."""
        new = 1 / MEMORY
        self.measurements += 1
        for averages, values in ((self.variance, variance), (self.signal, signal)):
            for name, value in (values | {ALL: math.fsum(values.values())}).items():
                averages[name] = averages.get(name, 0.0) * (1 - new) + value * new

    def variance_of(self, name: str = ALL) -> float:
        """tr(Sigma); needs a measurement. Only the rounding of fp16 compression can make it negative."""
        return self.variance[name] / self.weight

    def signal_of(self, name: str = ALL) -> float:
        """|g|^2, an estimate that can be negative; needs a measurement."""
        return self.signal[name] / self.weight

    def noise_scale(self, name: str = ALL) -> float | None:
        """B in images; None before the first measurement, and where |g|^2 cannot be told from the noise."""
        if not self.measurements or self.signal_of(name) <= 0:
            return None
        return max(self.variance_of(name), 0.0) / self.signal_of(name)

    def row(self) -> dict[str, float | None]:
        """The averages for a row of metrics; empty before the first measurement."""
        if not self.measurements:
            return {}
        row: dict[str, float | None] = {
            "noise_scale": self.noise_scale(),
            "gradient_variance": self.variance_of(),
            "squared_gradient": self.signal_of(),
            "noise_measurements": self.measurements,
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
        self._noted: dict[str, list[Tensor]] | None = None
        """Row norms of the gradients of this rank's passes by module, in a step that is measured."""
        self.cost_seconds = 0.0
        """What measuring took on this rank since the last message, in seconds."""

    @property
    def enabled(self) -> bool:
        """Whether anything is measured at all."""
        return self.interval != "never" and self.units > 1

    @contextmanager
    def measuring(self, step: int) -> Iterator[None]:
        """Around the passes of a step: notes the norms of their gradients, if the step is due."""
        if not self.enabled or step < self.averages.next_step:
            yield
            return
        noted: dict[str, list[Tensor]] = {module: [] for module in MODULES}
        # Tensor hooks run before the gradient is added to those of other passes, and before Horovod takes it.
        hooks = [
            parameter.register_hook(partial(self._note, noted[module]))
            for module, parameters in self.parameters.items()
            for parameter in parameters
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._noted = noted

    def _note(self, noted: list[Tensor], gradient: Tensor) -> None:
        started = time.perf_counter()
        noted.append(_row_norms(gradient))
        self.cost_seconds += time.perf_counter() - started

    def update(self, step: int, images: int, loss_scale: float, step_seconds: float) -> None:
        """Takes in the step, if it is measured: after its gradients are averaged, before they are clipped. Collective.

        ``images`` are those that this rank saw: a step in which some rank saw fewer than planned does not count, nor
        does one whose gradients are not finite. ``loss_scale`` is the factor that the gradients have, and
        ``step_seconds`` the time that the step has taken so far.
        """
        if self._noted is None:
            return
        started = time.perf_counter()
        # Each pass has 1 / accumulation of the loss, so that the gradient of a unit is larger than what was noted.
        of_units = _squares(self._noted) * (self.accumulation / loss_scale) ** 2 / self.units
        of_mean = _squares(self._averaged_gradients()) / loss_scale**2 / comm.size()
        counts = torch.tensor([images, self.cost_seconds, step_seconds], dtype=torch.float64)
        # |G|^2 is the same on every rank but for rounding; from the message all have the same bits.
        message = comm.sum_(torch.cat([of_units, of_mean, counts]), "gradient_noise")
        all_images, measuring_seconds, all_seconds = message[-len(counts) :].tolist()
        if all_images == self.images * self.units and bool(message.isfinite().all()):
            self._add(*message[: -len(counts)].chunk(2))
        automatic = max(1, math.ceil(measuring_seconds / all_seconds / COST_LIMIT))
        self.averages.next_step = step + (automatic if self.interval == "auto" else int(self.interval))
        # The time that this took goes into the next message.
        self._noted, self.cost_seconds = None, time.perf_counter() - started

    def _averaged_gradients(self) -> dict[str, list[Tensor]]:
        return {
            module: [_row_norms(parameter.grad) for parameter in parameters if parameter.grad is not None]
            for module, parameters in self.parameters.items()
        }

    def _add(self, of_units: Tensor, of_mean: Tensor) -> None:
        pairs = zip(of_units.tolist(), of_mean.tolist(), strict=True)
        found = [estimates(unit, mean, self.images, self.units) for unit, mean in pairs]
        variances, signals = zip(*found, strict=True)
        self.averages.add(dict(zip(MODULES, variances, strict=True)), dict(zip(MODULES, signals, strict=True)))


def _row_norms(gradient: Tensor) -> Tensor:
    """The L2 norms of the rows (first dimension): on CPUs a float32 sum over a whole large weight is off by 1e-3."""
    return torch.linalg.vector_norm(comm.in_memory_order(gradient).reshape(len(gradient), -1), dim=1)


def _squares(norms: dict[str, list[Tensor]]) -> Tensor:
    """The sum of the squares by module, (modules,) float64 on the CPU; 0 for a module without gradients."""
    none = torch.zeros(1)
    return torch.stack([torch.cat(norms[module] or [none]).double().square().sum().cpu() for module in MODULES])


def gain_table(noise_scale: float, mini_batch: int, reference: int) -> list[tuple[str, str]]:
    """What a mini-batch gains and loses by its size, as rows for people to read (McCandlish et al., section 2).

    To reach the same loss, n images per step take 1 + B / n times the fewest possible steps and 1 + n / B times the
    fewest possible images. The best learning rate goes with 1 / (1 + B / n), so that at n images it is
    (R + B) / (n + B) of what the linear rule makes of the best one at ``reference`` = R images.
    """
    ratio, reference_ratio = mini_batch / noise_scale, reference / noise_scale
    steps, images = 1 + 1 / ratio, 1 + ratio
    return [
        ("noise scale", f"{noise_scale:.4g} images; the mini-batch is {ratio:.3g} times as large"),
        ("steps", f"{steps:.3g} times the fewest possible; with twice the mini-batch {1 + 0.5 / ratio:.3g} times"),
        ("images", f"{images:.3g} times the fewest possible; with twice the mini-batch {1 + 2 * ratio:.3g} times"),
        (
            f"instead of {reference} images",
            f"{steps / (1 + 1 / reference_ratio):.3g} times the steps, {images / (1 + reference_ratio):.3g} times the "
            "images",
        ),
        (
            "learning rate",
            f"the best one is {(1 + reference_ratio) / images:.3g} times that of the linear rule, if base_lr is the "
            f"best one at {reference} images",
        ),
    ]


def gain_in_words(noise_scale: float | None, mini_batch: int) -> str:
    """What the noise scale, None if it cannot be told, means for a mini-batch; for the end of a line of the log."""
    if noise_scale is None:
        return "noise scale unknown: so far the noise hides the gradient"
    saved = 1 - (1 + noise_scale / (2 * mini_batch)) / (1 + noise_scale / mini_batch)
    return f"noise scale {noise_scale:.3g} images: twice the mini-batch would save {saved:.0%} of the steps"
