"""Which anchors and RoIs a training step learns from, for all images of a pass together.

Everything here stays on the device of the boxes, and no host waits for a result: a GPU gets its next work while it is
still busy. What is sampled for an image depends on its boxes and its seed alone: not on ranks, on the other images of
the batch, or on the device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

Targets = list[dict[str, Any]]

BACKGROUND, IGNORED = -1, -2
"""Stand for the number of an object where a box matches none, and where it shall not be learned from."""

AT_ONCE = 2**25
"""Pairs of an object and a box that a GPU compares at once: some 1 GB."""


@dataclass(frozen=True)
class Proposals:
    """What the RPN proposes, in rows of one length."""

    boxes: Tensor
    """(images, n, 4) xyxy."""
    valid: Tensor
    """(images, n) bool: False where an image has no more proposals."""

    def of_each_image(self) -> list[Tensor]:
        """The proposals of each image, (k, 4)."""
        return [boxes[valid] for boxes, valid in zip(self.boxes, self.valid, strict=True)]


@dataclass(frozen=True)
class Objects:
    """The annotated objects of all images, in rows of one length: at least one column, filled up with 0."""

    boxes: Tensor
    """(images, k, 4) xyxy."""
    labels: Tensor
    """(images, k) int64, from 1."""
    valid: Tensor
    """(images, k) bool: False where an image has no more objects."""

    @classmethod
    def of(cls, targets: Targets, dtype: torch.dtype) -> "Objects":
        """From ``boxes`` (n, 4) and ``labels`` (n,) of each target; the boxes become ``dtype``."""
        counts = [len(target["labels"]) for target in targets]
        boxes, labels = (pad_sequence([target[key] for target in targets], True) for key in ("boxes", "labels"))
        if not max(counts):
            boxes, labels = boxes.new_zeros(len(targets), 1, 4), labels.new_zeros(len(targets), 1)
        place = torch.arange(labels.shape[1], device=labels.device)
        return cls(boxes.to(dtype), labels, place < on_device(counts, labels.device)[:, None])


def match(objects: Objects, boxes: Tensor, high: float, low: float, keep_best: bool) -> Tensor:
    """The object that each box shall find: (images, n) int64, 0 to k - 1, for ``boxes`` (images or 1, n, 4).

    A box is matched to the object with which its IoU is the largest if that is ``high`` or more; below ``low`` it is
    :data:`BACKGROUND`, in between :data:`IGNORED`. ``keep_best`` also matches the boxes that no other exceeds in IoU
    with some object, so that every object has one (Ren et al. 2015, section 3.1.2).
    """
    images, most = objects.valid.shape
    at_once = max(1, AT_ONCE // (most * boxes.shape[1] + 1)) if boxes.is_cuda else 1  # a CPU's caches are small
    parts = []
    for first in range(0, images, at_once):
        rows = slice(first, first + at_once)
        iou = _iou(objects.boxes[rows], boxes if len(boxes) == 1 else boxes[rows])
        best, matches = iou.max(dim=1)
        matched = torch.where(best < high, IGNORED, matches).masked_fill_(best < low, BACKGROUND)
        if keep_best:
            is_best = (iou == iou.amax(dim=2, keepdim=True)) & objects.valid[rows, :, None]
            matched = torch.where(is_best.any(dim=1), matches, matched)
        parts.append(matched)
    return torch.cat(parts)


def _iou(objects: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of each of ``objects`` (images, k, 4) and ``boxes`` (images or 1, n, 4)."""
    one, other = objects[:, :, None], boxes[:, None]
    sides = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp_(min=0)
    shared = sides[..., 0] * sides[..., 1]
    return shared / (_area(one) + _area(other) - shared)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


@dataclass(frozen=True)
class Samples:
    """The sampled boxes of each image, in rows of one length."""

    indices: Tensor
    """(images, m) int64 into the boxes of the image."""
    valid: Tensor
    """(images, m) bool: False where an image has no more boxes to sample."""


def sample(matches: Tensor, seeds: Tensor, count: int, positive_fraction: float) -> Samples:
    """Draws ``count`` boxes of each image, at most ``positive_fraction`` of them matched and the others background.

    ``matches`` (images, n) are as :func:`match` returns them, padded with :data:`IGNORED`, and ``seeds`` (images,)
    int64. All choices are equally likely.
    """
    keys = random_keys(seeds, matches.shape[1])
    most = min(int(count * positive_fraction), matches.shape[1])
    positive, positives = torch.where(matches >= 0, keys, -1).topk(most)
    negative, negatives = torch.where(matches == BACKGROUND, keys, -1).topk(min(count, matches.shape[1]))
    room = count - (positive >= 0).sum(dim=1, keepdim=True)
    place = torch.arange(negative.shape[1], device=matches.device)
    valid = torch.cat([positive >= 0, (negative >= 0) & (place < room)], dim=1)
    return Samples(torch.cat([positives, negatives], dim=1), valid)


def random_keys(seeds: Tensor, count: int) -> Tensor:
    """Pseudo-random numbers from 0 to 2^63 - 1, the same on every device: (len(seeds), count) int64.

    They are what SplitMix64 (Steele et al. 2014) gives for the states seed + golden ratio * (0, 1, ...).
    """
    state = seeds[:, None] + torch.arange(count, device=seeds.device) * -0x61C8864680B583EB
    state = (state ^ _shifted(state, 30)) * -0x40A7B892E31B1A47
    state = (state ^ _shifted(state, 27)) * -0x6B2FB644ECCEEE15
    return (state ^ _shifted(state, 31)) & (2**63 - 1)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """int64 shifted to the right as if it had no sign."""
    return (state >> bits) & (2 ** (64 - bits) - 1)


def image_seeds(targets: Targets, device: torch.device) -> Tensor:
    """The seeds of the images: (images,) int64."""
    return on_device([target["seed"] for target in targets], device)


def on_device(numbers: list[int], device: torch.device) -> Tensor:
    """The numbers, int64, on a device that the host does not wait for."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def take(rows: Tensor, indices: Tensor) -> Tensor:
    """``rows`` (images, n, 4) at ``indices`` (images, m): (images, m, 4)."""
    return rows.gather(1, indices[..., None].expand(-1, -1, rows.shape[2]))


def box_loss(offsets: Tensor, expected: Tensor, counts: Tensor) -> Tensor:
    """The sum of smooth L1 losses (beta 1/9) of ``offsets`` (..., 4), where ``counts`` (...) is True."""
    # Elsewhere what is expected need not be finite, and 0 * infinity is not 0.
    expected = torch.where(counts[..., None], expected, 0)
    losses = F.smooth_l1_loss(offsets, expected, beta=1 / 9, reduction="none")
    return torch.where(counts[..., None], losses, 0).sum()
