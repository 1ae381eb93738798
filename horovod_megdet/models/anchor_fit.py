"""How well anchors cover the boxes of a data set: the best IoU that each box has with any anchor of its image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator

from horovod_megdet.data.annotations import to_corners
from horovod_megdet.data.coco import CocoDataset
from horovod_megdet.data.transforms import fit_size
from horovod_megdet.models.detector import SIZE_DIVISIBLE

LEVELS = 5
"""P2 to P6."""

SMALLEST, LARGEST, STEPS_PER_OCTAVE = 4, 256, 8
"""Sizes of P2's anchors that :func:`best_sizes` tries, in pixels, and how many there are per doubling."""

COVERED = 0.98
"""Part of the objects that an anchor shall cover at an IoU of 0.5."""

ENOUGH = 50_000
"""Boxes, spread evenly over the data set, that stand for all of a larger one."""


@dataclass(frozen=True)
class ResizedBoxes:
    """Objects' boxes in the images as the network sees them."""

    boxes: Tensor
    """(n, 4) float64 xyxy in pixels."""
    image_sizes: Tensor
    """(n, 2) int64, (height, width) of the image of each box."""
    labels: NDArray[np.int64]
    """(n,), classes from 1."""

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

    def class_mean(self, values: NDArray[Any]) -> float:
        """The mean over classes of the mean of ``values`` (n,) in each: rare classes count as much, as in AP."""
        sums, counts = np.bincount(self.labels, values), np.bincount(self.labels)
        return float((sums[counts > 0] / counts[counts > 0]).mean())

    def sides(self) -> NDArray[np.float64]:
        """(n,): square roots of the areas, in pixels."""
        width_height = self.boxes[:, 2:] - self.boxes[:, :2]
        return width_height.prod(dim=1).sqrt().numpy()

    def shorter_sides(self) -> NDArray[np.float64]:
        """(n,): the shorter side of each box, in pixels."""
        return (self.boxes[:, 2:] - self.boxes[:, :2]).amin(dim=1).numpy()

    def aspect_ratios(self) -> NDArray[np.float64]:
        """(n,): height / width."""
        width, height = (self.boxes[:, 2:] - self.boxes[:, :2]).T
        return (height / width).numpy()


def resized_boxes(dataset: CocoDataset, shorter_sides: Sequence[int], longer_side: int) -> ResizedBoxes:
    """The objects of a data set in images of all these shorter sides; crowd regions are none."""
    found = dataset.ground_truth
    objects = np.flatnonzero(~found.crowd)
    if len(objects) > ENOUGH:
        objects = objects[np.linspace(0, len(objects) - 1, ENOUGH).round().astype(int)]
    of_image, boxes, labels = found.image_of_box[objects], found.boxes[objects], found.labels[objects]
    sizes = found.sizes[of_image].astype(np.int64)
    corners = to_corners(boxes).clip(0, sizes[:, [1, 0, 1, 0]])
    all_boxes, all_sizes = [], []
    for side in shorter_sides:
        new = np.array([fit_size((height, width), side, longer_side) for height, width in found.sizes.tolist()])
        new_sizes = new[of_image]
        all_boxes.append(corners * (new_sizes / sizes)[:, [1, 0, 1, 0]])
        all_sizes.append(new_sizes)
    return ResizedBoxes(
        torch.from_numpy(np.concatenate(all_boxes)),
        torch.from_numpy(np.concatenate(all_sizes)),
        np.tile(labels, len(shorter_sides)),
    )


def best_sizes(objects: ResizedBoxes, aspect_ratios: Sequence[float]) -> tuple[int, ...]:
    """The best sizes for P2 to P6, each twice the one before (Lin et al., 2017).

    First they cover the objects at an IoU of 0.5, up to :data:`COVERED`; of those that do the mean IoU is the largest.
    Both are means over classes.
    """

    def worth(sizes: tuple[int, ...]) -> tuple[float, float]:
        iou = objects.best_iou(sizes, aspect_ratios)
        return min(objects.class_mean(iou >= 0.5), COVERED), objects.class_mean(iou)

    steps = np.arange(int(np.log2(LARGEST / SMALLEST)) * STEPS_PER_OCTAVE + 1)
    firsts = sorted({round(SMALLEST * 2 ** (step / STEPS_PER_OCTAVE)) for step in steps.tolist()})
    return max((tuple(first * 2**level for level in range(LEVELS)) for first in firsts), key=worth)


def _grids(image_sizes: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each level (rows, columns) of each image and the strides, both (n, 2), as the detector has them."""
    padded = (image_sizes + SIZE_DIVISIBLE - 1) // SIZE_DIVISIBLE * SIZE_DIVISIBLE
    cells = [padded // stride for stride in (4, 8, 16, 32)]
    cells.append((cells[-1] + 1) // 2)  # P6 is every second cell of P5
    return [(count, padded // count) for count in cells]


def _shapes(size: float, aspect_ratios: Sequence[float]) -> Tensor:
    """(ratios, 4): torchvision's anchors around 0, which it rounds to whole pixels."""
    generator = AnchorGenerator(((size,),), (tuple(aspect_ratios),))
    return generator.cell_anchors[0].double()


def _iou(boxes: Tensor, others: Tensor) -> Tensor:
    """(n,): of each box with the other one in its row."""
    sides = (torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])).clamp(min=0)
    shared = sides.prod(dim=1)
    areas = [(each[:, 2:] - each[:, :2]).prod(dim=1) for each in (boxes, others)]
    return shared / (areas[0] + areas[1] - shared)
