"""Evaluation on all ranks: each predicts its shard of the images, rank 0 computes COCO's metrics of all detections."""

import contextlib
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from horovod_megdet import comm
from horovod_megdet.data.coco import CocoDataset
from horovod_megdet.data.loader import Batch
from horovod_megdet.errors import UserError
from horovod_megdet.evaluation.backends import Backend, coco_metrics
from horovod_megdet.evaluation.detections import Arrays, Detections, in_original_pixels
from horovod_megdet.evaluation.views import Views
from horovod_megdet.models.detector import Detector
from horovod_megdet.progress import noting_waits, progress

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: small and equal on all ranks, except for ``detections``."""

    metrics: dict[str, float]
    """The values of :data:`~horovod_megdet.evaluation.metrics.METRICS`, NaN without ground truth (of that size)."""

    per_class: dict[str, float]
    """AP of each class; NaN for a class without ground truth, which the mean AP leaves out as well."""

    images: int
    """Number of images evaluated."""

    category_ids: list[int]
    """Category ids of the JSON: label k + 1 stands for category_ids[k]."""

    detections: Detections | None
    """The detections of all images on rank 0, None on the other ranks."""

    losses: dict[str, float] = field(default_factory=dict)
    """The validation losses, if they were computed; see :mod:`horovod_megdet.evaluation.loss`."""

    def row(self) -> dict[str, Any]:
        """Metrics, losses and ``per_class`` as a JSON object, with None for what is not finite."""
        return _finite(self.metrics | self.total_loss | self.losses) | {"per_class": _finite(self.per_class)}

    @property
    def total_loss(self) -> dict[str, float]:
        """``loss``, the sum of the validation losses, if they were computed."""
        return {"loss": math.fsum(self.losses.values())} if self.losses else {}

    @property
    def values(self) -> dict[str, float]:
        """All numbers by the names that ``output.best_metric`` takes."""
        of_classes = {f"AP of {name}": value for name, value in self.per_class.items()}
        return self.metrics | of_classes | self.total_loss | self.losses

    def write_detections(self, path: str | Path) -> None:
        """Writes COCO's results JSON, which ``COCO.loadRes`` and evaluation servers read. Rank 0 only."""
        assert self.detections is not None, "only rank 0 holds the detections"
        self.detections.write(path, self.category_ids)


def evaluate(
    detector: Detector,
    dataset: CocoDataset,
    loader: Iterable[Batch],
    device: torch.device,
    autocast: Autocast = contextlib.nullcontext,
    backend: Backend = "hotcoco",
    views: Views | None = None,
) -> Evaluation:
    """Evaluates the detector on all images of ``dataset``. Collective; every rank returns the result.

    ``loader`` yields this rank's shard; together, the shards hold every image exactly once, so that neither padding
    nor duplicates can change a metric. Wrap it for a progress bar. With ``views``, the images of a batch are views of
    one image. The metrics are those of the rounded boxes and scores that :meth:`Evaluation.write_detections` writes.
    Raises :class:`UserError` on every rank if one of them finds an unreadable image.
    """
    with comm.agreement("evaluate"):
        shard = predict_shard(detector, loader, device, autocast, views)
    progress.set("merging detections")
    detections = collect_detections(shard)
    progress.set("computing COCO's metrics")
    evaluation = _measure(detections, dataset, backend) if detections else None
    small = comm.broadcast_object(evaluation and replace(evaluation, detections=None), "evaluate.metrics")
    evaluation = evaluation or small
    assert evaluation is not None
    return evaluation


@torch.inference_mode()
def predict_shard(
    detector: Detector,
    loader: Iterable[Batch],
    device: torch.device,
    autocast: Autocast = contextlib.nullcontext,
    views: Views | None = None,
) -> Detections:
    """Detections in the images that ``loader`` yields, in pixels of the original images. Not collective.

    With ``views``, the images of a batch are views of one image. The detector runs in evaluation mode and returns to
    its previous mode. Raises :class:`UserError` for an unreadable image.
    """
    images: list[tuple[int, Arrays]] = []
    was_training = detector.training
    detector.eval()
    try:
        for batch in noting_waits(loader, doing="evaluating"):
            if batch.error is not None:
                raise UserError(batch.error)
            batch = batch.to(device)
            with autocast():
                images += _detect_views(detector, batch, views) if views else _detect(detector, batch)
    finally:
        detector.train(was_training)
    return Detections.of_images(images)


def _detect(detector: Detector, batch: Batch) -> list[tuple[int, Arrays]]:
    """The detections in each image of a batch, with its id."""
    predictions = detector.predict(batch.images)
    return [
        (
            int(target["image_id"]),
            in_original_pixels(prediction, (image.shape[-2], image.shape[-1]), target["original_size"]),
        )
        for image, target, prediction in zip(batch.images, batch.targets, predictions, strict=True)
    ]


def _detect_views(detector: Detector, batch: Batch, views: Views) -> list[tuple[int, Arrays]]:
    """The detections in the image that a batch shows in several sizes, with its id."""
    target = batch.targets[0]
    return [(int(target["image_id"]), views.detect(detector, batch.images, target["original_size"]))]


def collect_detections(shard: Detections) -> Detections | None:
    """The detections of all ranks' shards on rank 0; None on the other ranks. Collective."""
    images, found = shard.rows()
    all_images = comm.gather_to_main(torch.from_numpy(images), "evaluate.images")
    all_found = comm.gather_to_main(torch.from_numpy(found), "evaluate.detections")
    if all_images is None or all_found is None:
        return None
    return Detections.from_rows(all_images.numpy(), all_found.numpy())


def _measure(detections: Detections, dataset: CocoDataset, backend: Backend) -> Evaluation:
    expected = np.sort(np.asarray(dataset.image_ids, np.int64))
    assert np.array_equal(detections.image_ids, expected), "the ranks' shards are not exactly the data set"
    metrics, class_aps = coco_metrics(dataset.ground_truth, detections, backend)
    per_class = dict(zip(dataset.class_names, class_aps, strict=True))
    return Evaluation(metrics, per_class, len(expected), list(dataset.category_ids), detections)


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
