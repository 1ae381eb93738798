"""How well anchors cover the boxes of a data set: the best IoU that each box has with any anchor of its image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

LEVELS = 5
SIZE_DIVISIBLE = 32
"""The detector pads images to multiples of this."""

SMALLEST, LARGEST, STEPS_PER_OCTAVE = 4, 256, 8
"""Sizes of P2's anchors that :func:`best_sizes` tries, in pixels, and how many between a size and twice the size."""


@dataclass(frozen=True)
class ResizedBoxes:
    """Boxes in the images as the network sees them."""

    boxes: Tensor
    """(n, 4) float64 xyxy in pixels."""
    image_sizes: Tensor
    """(n, 2) int64, (height, width) of the image of each box."""

    def best_iou(self, sizes: Sequence[float], aspect_ratios: Sequence[float]) -> NDArray[np.float64]:
        """(n,): the largest IoU of each box with an anchor of its image, were the image alone in its batch.

        ``sizes`` are those of P2 to P6, as in ``anchor_sizes``. Among anchors of one shape the one whose center is
        nearest to the box's has the largest overlap, so that only that one is looked at.
        """
        best = torch.zeros(len(self.boxes), dtype=torch.float64)
        for size, (rows, strides) in zip(sizes, _grids(self.image_sizes), strict=True):
            centers = (self.boxes[:, :2] + self.boxes[:, 2:]) / 2
            places = (centers.flip(1) / strides).round().clamp(min=0).minimum(rows - 1.0)
            shifts = (places * strides).flip(1).repeat(1, 2)
            for anchor in _shapes(size, aspect_ratios):
                best = torch.maximum(best, _iou(self.boxes, anchor + shifts))
        return best.numpy()

    def sides(self) -> NDArray[np.float64]:
        """(n,): square roots of the areas, in pixels."""
        width_height = self.boxes[:, 2:] - self.boxes[:, :2]
        return width_height.prod(dim=1).sqrt().numpy()

    def shorter_sides(self) -> NDArray[np.float64]:
        """(n,): the shorter side of each box, in pixels."""
        return (self.boxes[:, 2:] - self.boxes[:, :2]).amin(dim=1).numpy()
