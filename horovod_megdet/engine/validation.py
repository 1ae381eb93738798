"""Evaluations in a run: on all ranks, which is the best, and when no better one is waited for."""

import difflib
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from horovod_megdet import comm
from horovod_megdet.config import Config
from horovod_megdet.data.coco import CocoDataset
from horovod_megdet.data.loader import Batch, build_eval_loader
from horovod_megdet.engine import checkpoint, hardware
from horovod_megdet.engine.checkpoint import Position
from horovod_megdet.errors import UserError
from horovod_megdet.evaluation.coco import Evaluation, evaluate
from horovod_megdet.evaluation.loss import validation_losses
from horovod_megdet.evaluation.metrics import METRICS, is_loss
from horovod_megdet.evaluation.views import Views
from horovod_megdet.models.detector import COUNT_OF_LOSS, Detector
from horovod_megdet.wording import some

LOSSES = ("loss", *COUNT_OF_LOSS)
"""The names of the validation losses."""


def evaluate_detector(config: Config, detector: Detector, dataset: CocoDataset, device: torch.device) -> Evaluation:
    """Evaluates on all ranks, each on its exact share of the data set; every rank gets the metrics."""
    test = config.evaluation

    def shard(scales: tuple[int, ...]) -> Iterable[Batch]:
        pin_memory = device.type == "cuda"
        return build_eval_loader(
            dataset, config.data, rank=comm.rank(), ranks=comm.size(), scales=scales, pin_memory=pin_memory
        )

    def autocast() -> AbstractContextManager[None]:
        return hardware.autocast(config.runtime, device)

    evaluation = evaluate(
        detector, dataset, shard(test.scales), device, autocast, test.backend, Views.of(test, config.model)
    )
    if test.loss:
        evaluation = replace(evaluation, losses=validation_losses(detector, dataset, shard(()), device, autocast))
    return evaluation


def in_one_view(config: Config) -> Config:
    """The configuration of the evaluations during a training: one scale, no flip, and NMS."""
    return config.model_copy(update={"evaluation": config.evaluation.one_view})


def with_all_views(config: Config) -> Config | None:
    """The configuration of the multi-scale test at the end of a training; None if it would be no other evaluation."""
    if config.evaluation == config.evaluation.one_view:
        return None
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"loss": False})})


def check_best_metric(config: Config, class_names: list[str]) -> None:
    """Raises :class:`UserError` unless evaluations of this configuration have ``output.best_metric``."""
    name = config.output.best_metric
    if name in LOSSES:
        if not config.evaluation.loss:
            raise UserError(f"output.best_metric: {name} is a validation loss: set evaluation.loss to true, too.")
        return
    valid = [*METRICS, *(f"AP of {class_name}" for class_name in class_names)]
    if name not in valid:
        close = difflib.get_close_matches(name, [*valid, *LOSSES], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {some(valid)}, and the losses {some(LOSSES)}."
        raise UserError(f"output.best_metric: no evaluation has {name!r}; {hint}")


def note_evaluation(position: Position, evaluation: Evaluation) -> bool:
    """Notes in ``position`` how an evaluation compares with the best so far; returns whether it is better.

    All ranks have the same metrics and the same position, so that they agree without a message.
    """
    value = evaluation.values[position.best_metric]
    lower_is_better = is_loss(position.best_metric)
    better = value < position.best_value if lower_is_better else value > position.best_value
    better = better or position.best_checkpoint is None or math.isnan(position.best_value)
    if better:
        position.best_value, position.best_checkpoint = value, checkpoint.name(position.step)
    position.evaluations_since_best = 0 if better else position.evaluations_since_best + 1
    return better
