"""Which detections are correct and which objects were found, at a single IoU: for pictures, not for metrics."""

from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask
from torchvision.ops import box_convert

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
    """bool (k,): a region with many objects; detections in it are neither correct nor wrong."""


def match(truth: GroundTruth, boxes: np.ndarray, labels: np.ndarray) -> tuple[list[str], np.ndarray]:
    """COCO's matching at IoU 0.5: in order of score, each takes the free object of its class it overlaps most.

    Args:
        truth: the annotated objects.
        boxes: (n, 4) xyxy in pixels of the original image, best score first.
        labels: (n,), as in ``truth``.

    Returns:
        For each detection CORRECT, WRONG or IGNORED (inside a crowd region); bool (k,): whether each object was found.
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
    return box_convert(torch.from_numpy(np.asarray(boxes, np.float64)), "xyxy", "xywh").numpy()
