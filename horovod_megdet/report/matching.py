"""Which detections are right, and which objects were found, at one IoU: for pictures, not for metrics."""

from dataclasses import dataclass

import numpy as np
from pycocotools import mask

IOU = 0.5
"""A detection is correct when it overlaps an object of its class by at least this intersection over union."""

CORRECT, WRONG, IGNORED = "correct", "wrong", "ignored"


@dataclass(frozen=True)
class GroundTruth:
    """The annotated objects of one image."""

    boxes: np.ndarray
    """float64 (k, 4): x1, y1, x2, y2 in pixels of the original image."""

    labels: np.ndarray
    """int64 (k,): label n + 1 is class_names[n]."""

    crowd: np.ndarray
    """bool (k,): a region with many objects; detections in it are neither right nor wrong."""


def match(truth: GroundTruth, boxes: np.ndarray, labels: np.ndarray) -> tuple[list[str], np.ndarray]:
    """COCO's matching at IoU 0.5: the best detection first, each takes the free object of its class it overlaps most.

    Args:
        truth: the objects.
        boxes: (n, 4) xyxy, best score first.
        labels: (n,).

    Returns:
        For each detection CORRECT, WRONG or IGNORED (inside a crowd region); bool (k,), whether each object was found.
    """
    found = np.zeros(len(truth.labels), bool)
    if not len(boxes) or not len(found):
        return [WRONG] * len(boxes), found
    overlaps = mask.iou(_xywh(boxes), _xywh(truth.boxes), truth.crowd.astype(np.uint8).tolist())
    verdicts = []
    for overlap, label in zip(overlaps, labels, strict=True):
        candidates = (truth.labels == label) & (overlap >= IOU)
        free = np.where(candidates & ~found & ~truth.crowd, overlap, -1.0)
        if free.max() >= IOU:
            found[free.argmax()] = True
            verdicts.append(CORRECT)
        else:
            verdicts.append(IGNORED if (candidates & truth.crowd).any() else WRONG)
    return verdicts, found


def _xywh(boxes: np.ndarray) -> np.ndarray:
    corners = np.asarray(boxes, np.float64)
    return np.ascontiguousarray(np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1))
