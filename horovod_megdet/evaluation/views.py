"""Detections from several views of an image, its scales and their mirror images, as one list: the multi-scale test.

Each view gives all of its candidates, before any suppression, in pixels of the original image. They are suppressed
together, class by class: a box drops those of its class that it overlaps (NMS), or lowers their scores (soft-NMS,
Bodla et al. 2017, arXiv 1704.04503):

    s_i <- s_i exp(-IoU(b, b_i)² / 0.5)    for each box b, by falling score
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from horovod_megdet.config import EvaluationConfig, ModelConfig
from horovod_megdet.evaluation.detections import Arrays, in_original_pixels
from horovod_megdet.models.detector import Detector

SIGMA = 0.5
"""Of soft-NMS; the paper's."""


@dataclass(frozen=True)
class Views:
    """How views of an image are seen, and how their detections become one list."""

    flip: bool
    merge: Literal["nms", "soft_nms"]
    iou_threshold: float
    """Overlap above which NMS drops a box."""
    score_threshold: float
    """Detections need a higher score."""
    most: int
    """Detections of an image."""

    @classmethod
    def of(cls, test: EvaluationConfig, model: ModelConfig) -> "Views | None":
        """What a configuration says; None for one view with NMS, which the detector does alone."""
        if len(test.scales) <= 1 and not test.flip and test.merge == "nms":
            return None
        return cls(test.flip, test.merge, model.nms_threshold, model.score_threshold, model.detections_per_image)

    def all_of(self, images: list[Tensor]) -> list[tuple[Tensor, bool]]:
        """The images (3, h, w) and, with ``flip``, their mirror images; each with whether it is mirrored."""
        flips = (False, True) if self.flip else (False,)
        return [(image.flip(-1) if flipped else image, flipped) for image in images for flipped in flips]

    def detect(self, detector: Detector, images: list[Tensor], original_size: tuple[int, int]) -> Arrays:
        """The detections in one image, which ``images`` show in several sizes, in pixels of ``original_size``."""
        candidates = []
        for view, flipped in self.all_of(images):
            [prediction] = detector.predict([view], suppress=False)
            candidates.append(in_view(prediction, (view.shape[-2], view.shape[-1]), flipped, original_size))
        return self.merged(candidates)

    def merged(self, candidates: list[Arrays]) -> Arrays:
        """One list, by falling score, of the candidates of all views of an image."""
        boxes, scores, labels = (np.concatenate(parts) for parts in zip(*candidates, strict=True))
        if self.merge == "soft_nms":
            kept, scores = soft_nms(boxes, scores, labels, self.score_threshold, self.most)
            return boxes[kept], scores, labels[kept]
        tensors = (torch.from_numpy(array) for array in (boxes, scores, labels))
        kept = batched_nms(*tensors, self.iou_threshold)[: self.most].numpy()
        return boxes[kept], scores[kept], labels[kept]


def in_view(
    prediction: dict[str, Tensor], size: tuple[int, int], flipped: bool, original_size: tuple[int, int]
) -> Arrays:
    """What was detected in a view of ``size`` (height, width), in pixels of the original image."""
    if flipped:
        x1, y1, x2, y2 = prediction["boxes"].unbind(1)
        prediction = prediction | {"boxes": torch.stack([size[1] - x2, y1, size[1] - x1, y2], dim=1)}
    return in_original_pixels(prediction, size, original_size)


def soft_nms(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], labels: NDArray[np.int32], threshold: float, most: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Soft-NMS of each class: the indices of the ``most`` best boxes, and their new scores above ``threshold``.

    One loop serves all classes: scores only fall, so the boxes that it takes come by falling score.
    """
    left = scores.astype(np.float64)
    all_boxes = torch.from_numpy(boxes).double()
    kept: list[int] = []
    new_scores: list[float] = []
    while len(kept) < min(most, len(left)):
        best = int(left.argmax())
        if left[best] <= threshold:
            break
        kept.append(best)
        new_scores.append(left[best])
        iou = box_iou(all_boxes[best : best + 1], all_boxes)[0].numpy()
        left *= np.where(labels == labels[best], np.exp(-(iou**2) / SIGMA), 1)
        left[best] = -1
    return np.array(kept, np.int64), np.array(new_scores, np.float32)
