"""Learning rate and length of training as functions of the images seen.

The linear rule (MegDet, section 3.1): with per-image gradients of equal variance, a mini-batch k times as large keeps
the variance of the weight updates per image when the learning rate is k times as large.
"""

from bisect import bisect_right
from dataclasses import dataclass
from math import ceil, cos, pi, prod

from horovod_megdet.config import SolverConfig
from horovod_megdet.errors import UserError
from horovod_megdet.wording import count


@dataclass(frozen=True)
class Schedule:
    """The resolved schedule of one run; see :func:`make_schedule`."""

    solver: SolverConfig
    dataset_images: int
    ranks: int
    images_per_rank: int
    accumulation: int

    @property
    def images_per_pass(self) -> int:
        """Images in one forward pass of all ranks."""
        return self.ranks * self.images_per_rank

    @property
    def mini_batch(self) -> int:
        """Images in one optimizer step."""
        return self.images_per_pass * self.accumulation

    @property
    def k(self) -> float:
        """Mini-batch over reference batch size: the factor of the linear rule."""
        return self.mini_batch / self.solver.reference_batch_size

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up: k x base_lr."""
        return self.k * self.solver.base_lr

    @property
    def warmup_lr(self) -> float:
        """Learning rate of the first step: base_lr (k = 1), or the peak where that is lower, times warmup_start."""
        return min(self.solver.base_lr, self.peak_lr) * self.solver.warmup_start

    @property
    def total_images(self) -> int:
        """Images after which training ends; the last step may reach past it."""
        return max(1, self.images(self.solver.epochs))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a run that starts at zero."""
        return ceil(self.total_images / self.mini_batch)

    def images(self, epochs: float) -> int:
        """Number of images in ``epochs`` passes over the training set."""
        return round(epochs * self.dataset_images)

    def epoch(self, images_seen: int) -> float:
        """Passes over the training set after ``images_seen`` images."""
        return images_seen / self.dataset_images

    def lr(self, images_seen: int) -> float:
        """Learning rate of the step that starts after ``images_seen`` images.

        Warm-up is linear from step to step, from :attr:`warmup_lr` to :attr:`peak_lr`; a milestone that falls into the
        warm-up takes effect all the same.
        """
        decay, warmup_images = self._decay(images_seen), self.images(self.solver.warmup_epochs)
        if images_seen >= warmup_images:
            return decay * self.peak_lr
        progress = images_seen / warmup_images
        return decay * (self.warmup_lr + progress * (self.peak_lr - self.warmup_lr))

    def warmup_ends(self, before: int, after: int) -> bool:
        """True when the warm-up ends between two positions."""
        return before < self.images(self.solver.warmup_epochs) <= after

    def _decay(self, images_seen: int) -> float:
        if self.solver.schedule == "cosine":
            warmup_images = self.images(self.solver.warmup_epochs)
            done = max(0, images_seen - warmup_images) / max(1, self.total_images - warmup_images)
            return 0.5 + 0.5 * cos(pi * min(1.0, done))
        milestones = [self.images(epochs) for epochs in self.solver.milestones]
        return prod(self.solver.gammas[: bisect_right(milestones, images_seen)])

    def finished(self, images_seen: int) -> bool:
        """True when all images have been seen."""
        return images_seen >= self.total_images

    def due(self, every_images: int, before: int, after: int) -> bool:
        """True when something done every ``every_images`` images, and at the end, falls between two positions."""
        every_images = max(1, every_images)
        return before // every_images < after // every_images or self.finished(after)

    def table(self) -> list[tuple[str, str]]:
        """The schedule in words, row by row, as it is printed at the start and by ``megdet plan``."""
        solver = self.solver
        step = self.mini_batch
        rows = [
            (
                "mini-batch",
                f"{count(step, 'image')} = {count(self.ranks, 'rank')} x {count(self.images_per_rank, 'image')} x "
                f"{count(self.accumulation, 'pass')}",
            ),
            ("linear rule", f"k = {step} / {solver.reference_batch_size} = {self.k:g}"),
            ("learning rate", f"{self.peak_lr:g} = {self.k:g} x {solver.base_lr:g}"),
            (
                "warm-up",
                f"{self.warmup_lr:g} to {self.peak_lr:g} in "
                f"{count(ceil(self.images(solver.warmup_epochs) / step), 'step')} ({solver.warmup_epochs:g} epochs)",
            ),
        ]
        rows += [("then", "half a cosine to 0")] if solver.schedule == "cosine" else self._milestone_rows()
        rows.append(
            (
                "total",
                f"{self.total_steps} steps = {self.total_images} images = {solver.epochs:g} epochs of "
                f"{self.dataset_images}",
            )
        )
        return rows

    def _milestone_rows(self) -> list[tuple[str, str]]:
        rows = []
        for epochs, gamma in zip(self.solver.milestones, self.solver.gammas, strict=True):
            images = self.images(epochs)
            reached = f"step {ceil(images / self.mini_batch)}: x{gamma:g} = {self.lr(images):g}"
            rows.append((f"epoch {epochs:g}", reached if images < self.total_images else "after the end"))
        return rows


def make_schedule(solver: SolverConfig, dataset_images: int, ranks: int, images_per_rank: int) -> Schedule:
    """Resolves the configuration for the ranks that run.

    Raises :class:`UserError` when ``solver.mini_batch`` cannot be made from whole forward passes of these ranks.
    """
    accumulation = solver.accumulation
    if solver.mini_batch is not None:
        per_pass = ranks * images_per_rank
        if solver.mini_batch % per_pass:
            valid = [str(n) for n in range(1, solver.mini_batch + 1) if solver.mini_batch % (n * images_per_rank) == 0]
            raise UserError(
                f"solver.mini_batch = {solver.mini_batch} is not a multiple of {per_pass} = {ranks} ranks x "
                f"{images_per_rank} images (data.images_per_rank). "
                + (
                    f"Use {', '.join(valid)} ranks, or change one of the three."
                    if valid
                    else f"Choose a multiple of data.images_per_rank = {images_per_rank}."
                )
            )
        accumulation = solver.mini_batch // per_pass
    return Schedule(solver, dataset_images, ranks, images_per_rank, accumulation)
