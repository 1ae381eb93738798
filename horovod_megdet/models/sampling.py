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
from torchvision.ops import box_iou

Targets = list[dict[str, Any]]

BACKGROUND, IGNORED = -1, -2
"""Stand for the number of an object where a box matches none, and where it shall not be learned from."""


def match(objects: Tensor, boxes: Tensor, high: float, low: float, keep_best: bool) -> Tensor:
    """The object (k, 4) that each of the ``boxes`` (n, 4) shall find: (n,) int64, 0 to k - 1.

    A box is matched to the object with which its IoU is the largest if that is ``high`` or more; below ``low`` it is
    :data:`BACKGROUND`, in between :data:`IGNORED`. ``keep_best`` also matches the boxes that no other exceeds in IoU
    with some object, so that every object has one (Ren et al. 2015, section 3.1.2).
    """
    if not len(objects):
        return boxes.new_full((len(boxes),), BACKGROUND, dtype=torch.int64)
    iou = box_iou(objects, boxes)
    best, matches = iou.max(dim=0)
    matched = torch.where(best < high, IGNORED, matches).masked_fill_(best < low, BACKGROUND)
    if keep_best:
        matched = torch.where((iou == iou.amax(dim=1, keepdim=True)).any(dim=0), matches, matched)
    return matched


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
    return torch.tensor([target["seed"] for target in targets]).to(device, non_blocking=True)


def padded(targets: Targets, key: str) -> Tensor:
    """``boxes`` or ``labels`` of all images, (images, most objects, ...): at least one column, filled up with 0."""
    rows = pad_sequence([target[key] for target in targets], batch_first=True)
    return rows if rows.shape[1] else rows.new_zeros(len(rows), 1, *rows.shape[2:])


def take(rows: Tensor, indices: Tensor) -> Tensor:
    """``rows`` (images, n, 4) at ``indices`` (images, m): (images, m, 4)."""
    return rows.gather(1, indices[..., None].expand(-1, -1, rows.shape[2]))


def box_loss(offsets: Tensor, expected: Tensor, counts: Tensor) -> Tensor:
    """The sum of smooth L1 losses (beta 1/9) of ``offsets`` (..., 4), where ``counts`` (...) is True."""
    # Elsewhere what is expected need not be finite, and 0 * infinity is not 0.
    expected = torch.where(counts[..., None], expected, 0)
    losses = F.smooth_l1_loss(offsets, expected, beta=1 / 9, reduction="none")
    return torch.where(counts[..., None], losses, 0).sum()
