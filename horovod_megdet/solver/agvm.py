"""AGVM: learning rates that bring the gradient variances of the detector's modules into line.

Xue et al., "Large-batch Optimization for Dense Visual Predictions" (NeurIPS 2022): with large mini-batches the variance
of the gradient differs between backbone, FPN, RPN and box head, and the noisier modules need a lower rate. For each
module i, phi_i = 1 - cos(A_i, B_i) compares the mean gradients of two halves of the mini-batch. As a ratio of
expectations it follows from what :mod:`horovod_megdet.solver.gradient_noise` measures, at no further cost:

    cos(A_i, B_i) = |g_i|^2 / (|g_i|^2 + 2 tr(Sigma_i) / n)

The learning rate of module i is multiplied by mu_i, which starts at 1 and follows

    mu_i <- 0.97 mu_i + 0.03 sqrt(clamp((phi_backbone + 1e-6) / (phi_i + 1e-6), 0.5, 10))

The backbone keeps mu = 1. Where the mini-batch is far below the noise scale every phi is near 1 and nothing changes.
"""

from dataclasses import dataclass, field

from horovod_megdet.config import Config
from horovod_megdet.errors import UserError
from horovod_megdet.models.modules import MODULES
from horovod_megdet.solver.gradient_noise import NoiseAverages
from horovod_megdet.solver.schedule import Schedule

START_EPOCHS = 0.2
"""Epochs after the warm-up before the first update. The paper waits for 100 steps of 256 of COCO's 118,000 images."""

EVERY_EPOCHS = 0.02
"""Epochs between two updates, at least: the paper's 10 steps."""

MOVE = 0.03
"""How far the factors move in EVERY_EPOCHS."""

SMALLEST_RATIO, LARGEST_RATIO, EPSILON = 0.5, 10.0, 1e-6


@dataclass
class AGVM:
    """The factors of the learning rate. Saved in checkpoints; the same on every rank."""

    factors: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MODULES, 1.0))
    """mu, by module."""
    updated_at: float | None = None
    """Epoch of the last update."""

    def update(self, averages: NoiseAverages, mini_batch: int, epochs_after_warmup: float) -> None:
        """Moves the factors, if it is time; by more after more epochs, so that epochs count and not steps."""
        if epochs_after_warmup < START_EPOCHS or not averages.measurements:
            return
        since = EVERY_EPOCHS if self.updated_at is None else epochs_after_warmup - self.updated_at
        if since < EVERY_EPOCHS:
            return
        self.updated_at = epochs_after_warmup
        keep = (1 - MOVE) ** (since / EVERY_EPOCHS)
        phi = {module: dissimilarity(averages, module, mini_batch) for module in MODULES}
        for module in MODULES:
            ratio = (phi["backbone"] + EPSILON) / (phi[module] + EPSILON)
            goal = min(max(ratio, SMALLEST_RATIO), LARGEST_RATIO) ** 0.5
            self.factors[module] = keep * self.factors[module] + (1 - keep) * goal


def dissimilarity(averages: NoiseAverages, module: str, mini_batch: int) -> float:
    """phi = 1 - cos between the mean gradients of two halves of the mini-batch: 0 without noise, 1 for noise only."""
    signal = max(averages.signal_of(module), 0.0)
    noise = 2 * max(averages.variance_of(module), 0.0) / mini_batch
    return noise / (signal + noise) if signal + noise > 0 else 1.0


def check_agvm(config: Config, schedule: Schedule) -> None:
    """Raises :class:`UserError` if AGVM is asked for and has nothing to compare."""
    if config.solver.lr_modulation != "agvm":
        return
    if schedule.ranks * schedule.accumulation == 1:
        raise UserError(
            "solver.lr_modulation: agvm compares the gradients of ranks or of passes, and one rank with one pass per "
            "step has nothing to compare. Start more ranks, set solver.accumulation, or leave lr_modulation out."
        )
    if config.model.trainable_stages == 0 and config.model.weights != "none":
        raise UserError(
            "solver.lr_modulation: agvm compares the modules with the backbone, which model.trainable_stages: 0 "
            "freezes. Train a stage of it, or leave lr_modulation out."
        )
