"""The metrics of an evaluation: their names, what they cover and how they are written."""

import math
from dataclasses import dataclass
from typing import Literal

ALL, SMALL, MEDIUM, LARGE = range(4)
"""Indices of COCO's area ranges."""

IOU_50, IOU_75 = 0, 5
"""Indices in COCO's IoU thresholds 0.50, 0.55, ..., 0.95."""


@dataclass(frozen=True)
class Metric:
    """What a metric covers, and where its values are in :class:`~horovod_megdet.evaluation.backends.Curves`."""

    meaning: str
    curve: Literal["precision", "recall"] = "precision"
    iou: int | None = None
    """Index of the IoU threshold; None for the mean over all of them."""
    area: int = ALL
    detections: int = 2
    """Index in COCO's limits of detections per image: 1, 10, 100."""


METRICS = {
    "AP": Metric("IoU 0.50:0.95"),
    "AP50": Metric("IoU 0.50", iou=IOU_50),
    "AP75": Metric("IoU 0.75", iou=IOU_75),
    "AP_small": Metric("area < 32² px", area=SMALL),
    "AP_medium": Metric("32² to 96² px", area=MEDIUM),
    "AP_large": Metric("area > 96² px", area=LARGE),
    "AR_1": Metric("1 detection per image", "recall", detections=0),
    "AR_10": Metric("10 detections per image", "recall", detections=1),
    "AR_100": Metric("100 detections per image", "recall"),
    "AR_small": Metric("area < 32² px", "recall", area=SMALL),
    "AR_medium": Metric("32² to 96² px", "recall", area=MEDIUM),
    "AR_large": Metric("area > 96² px", "recall", area=LARGE),
}
"""COCO's twelve box metrics, in the order of pycocotools."""

MAIN_METRIC = "AP"
"""The first of each report; also the default of ``output.best_metric``."""

DRAWN_METRICS = (MAIN_METRIC, "AP50")
"""Drawn over epochs."""


DRAWN_SCORE = 0.5
"""Lowest score of the detections in pictures, and of those that ``megdet predict`` finds."""


def is_loss(name: str) -> bool:
    """Whether a metric is ``loss`` or a part of it, such as ``loss_classifier``: better when it is lower."""
    return name == "loss" or name.startswith("loss_")


def percent(value: float) -> str:
    """A metric between 0 and 1 in percent, such as `43.2`; a dash for NaN."""
    return "–" if math.isnan(value) else f"{100 * value:.1f}"
