"""``megdet plan``: what a configuration means on so many ranks, before anyone waits for machines."""

from pathlib import Path

import torch

from horovod_megdet.config import Config
from horovod_megdet.data.configured import load_split, make_synthetic
from horovod_megdet.data.loader import image_stream
from horovod_megdet.errors import UserError
from horovod_megdet.models.detector import COCO_CLASSES, build_detector
from horovod_megdet.report.rows import noise_at_full_rate, read_metrics
from horovod_megdet.report.tables import console, two_columns
from horovod_megdet.run_files import METRICS_FILE
from horovod_megdet.solver.cost import MessageCost, Traffic, communication_table
from horovod_megdet.solver.gradient_noise import gain_table
from horovod_megdet.solver.schedule import make_schedule


def print_plan(
    config: Config,
    ranks: int,
    images: int | None,
    cost: MessageCost,
    step_seconds: float | None,
    noise_scale: float | None,
) -> None:
    """Prints schedule, communication and, where the ``noise_scale`` is known, what the mini-batch gains and loses.

    ``images`` are those of an epoch, counted in the data set where they are not given; ``step_seconds`` is what one
    rank computes in a step. Raises :class:`UserError`.
    """
    schedule = make_schedule(config.solver, images or _training_images(config), ranks, config.data.images_per_rank)
    console().print(two_columns("Schedule", schedule.table()))
    with torch.device("meta"):  # only its shapes count
        detector = build_detector(config.model, config.batch_norm, COCO_CLASSES)
    traffic = Traffic.of(detector, config, schedule)
    console().print(two_columns("Communication, predicted", communication_table(cost, traffic, ranks, step_seconds)))
    if noise_scale is not None:
        gains = gain_table(noise_scale, schedule.mini_batch, config.solver.reference_batch_size)
        console().print(two_columns("Mini-batch, predicted", gains))


def read_noise_scale(run_dir: Path) -> float:
    """The newest noise scale that a run has measured at its full learning rate. Raises :class:`UserError`."""
    rows = [row for row in read_metrics(run_dir / METRICS_FILE) if row["kind"] == "train"]
    newest = noise_at_full_rate(rows)
    if newest is None:
        lost = any("noise_scale" in row for row in rows)
        why = (
            "so far the noise hides the gradient"
            if lost
            else "the run has one rank and one pass per step, solver.measure_noise: never, or so far too few steps"
        )
        raise UserError(f"{run_dir / METRICS_FILE}: no noise scale in it: {why}. Give --noise-scale, or another run.")
    print(
        f"Noise scale of {run_dir}: {newest['noise_scale']:.3g} images, measured at epoch {newest['epoch']:.2f}, the "
        "last time at the full learning rate"
    )
    return float(newest["noise_scale"])


def _training_images(config: Config) -> int:
    try:
        make_synthetic(config.data)
        return len(image_stream(load_split(config.data, training=True), config.data, config.runtime.seed))
    except UserError as error:
        raise UserError(f"{error}\nTo plan without the data, give the number of its images: --images N.") from None
