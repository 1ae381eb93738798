"""COCO's box metrics, computed by hotcoco or pycocotools: both fill the same arrays, with the same bits."""

import contextlib
import io
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from horovod_megdet.data.annotations import Annotations
from horovod_megdet.evaluation.detections import Detections
from horovod_megdet.evaluation.metrics import METRICS, Metric
from horovod_megdet.printing import warn

Backend = Literal["hotcoco", "pycocotools"]


class Curves(NamedTuple):
    """The result of an evaluation before any mean is taken; -1 where there is no ground truth."""

    precision: NDArray[np.float64]
    """(IoU thresholds, recall thresholds, categories, areas, limits of detections)."""
    recall: NDArray[np.float64]
    """(IoU thresholds, categories, areas, limits of detections)."""

    def values(self, metric: Metric) -> NDArray[np.float64]:
        """The values whose mean is the metric, in pycocotools' order: the order of a sum decides its last bits."""
        ious = slice(None) if metric.iou is None else slice(metric.iou, metric.iou + 1)
        return (self.precision if metric.curve == "precision" else self.recall)[
            ious, ..., metric.area, metric.detections
        ]


def coco_metrics(
    ground_truth: Annotations, detections: Detections, backend: Backend = "hotcoco"
) -> tuple[dict[str, float], list[float]]:
    """COCO's twelve metrics by name, 0 to 1, and the AP of each category; NaN if there is no ground truth.

    ``detections`` may be empty; its label k + 1 stands for ``ground_truth.category_ids[k]``. Falls back to pycocotools,
    with a warning, if hotcoco cannot be used.
    """
    curves = BACKENDS[backend](ground_truth, detections)
    metrics = {name: _mean_of_defined(curves.values(metric)) for name, metric in METRICS.items()}
    ap = curves.values(METRICS["AP"])
    return metrics, [_mean_of_defined(ap[:, :, category]) for category in range(len(ground_truth.category_ids))]


def _hotcoco(ground_truth: Annotations, detections: Detections) -> Curves:
    try:
        import hotcoco  # here, because it is the one dependency that can be done without
    except ImportError as error:
        warn(f"hotcoco cannot be imported ({error}); pycocotools computes the metrics, which takes longer.")
        return _pycocotools(ground_truth, detections)
    # hotcoco takes no negative ids and passes those of detections through floats: both sets get the ids 1 to n here,
    # in the same order, which is all that decides between equal scores.
    ids = np.sort(ground_truth.image_ids)
    truth_images = np.searchsorted(ids, np.repeat(ground_truth.image_ids, np.diff(ground_truth.first_box))) + 1
    found_images = np.searchsorted(ids, np.repeat(detections.image_ids, detections.counts)) + 1
    xywh, scores = detections.rounded()
    truth = hotcoco.COCO.from_arrays(
        [{"id": number} for number in range(1, len(ids) + 1)],
        [{"id": label, "name": str(label)} for label in range(1, len(ground_truth.category_ids) + 1)],
        truth_images,
        ground_truth.labels,
        ground_truth.boxes,
        area=ground_truth.areas,
        iscrowd=ground_truth.crowd,
    )
    found = truth.load_res(np.column_stack([found_images, xywh, scores, detections.labels]))
    return _run(hotcoco.COCOeval(truth, found, "bbox"))


def _pycocotools(ground_truth: Annotations, detections: Detections) -> Curves:
    truth = ground_truth.to_coco()
    # What COCO.loadRes does for boxes, but for an empty list as well, and without a copy of the data set.
    found = COCO()
    found.dataset = {key: truth.dataset[key] for key in ("images", "categories")}
    found.dataset["annotations"] = detections.to_annotations(ground_truth.category_ids)
    with contextlib.redirect_stdout(io.StringIO()):
        found.createIndex()
        return _run(COCOeval(truth, found, "bbox"))


BACKENDS: dict[Backend, Callable[[Annotations, Detections], Curves]] = {
    "hotcoco": _hotcoco,
    "pycocotools": _pycocotools,
}


def _run(evaluator: Any) -> Curves:
    evaluator.evaluate()
    evaluator.accumulate()
    result = evaluator.eval
    return Curves(result["precision"], result["recall"])


def _mean_of_defined(values: NDArray[np.float64]) -> float:
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else math.nan
