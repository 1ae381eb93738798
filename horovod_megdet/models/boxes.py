"""Boxes as offsets from other boxes, the parametrization of R-CNN (Girshick et al. 2014, appendix C).

    d = weights[0] * (center* - center) / size          s = weights[1] * log(size* / size)

Boxes are (..., 4) xyxy in pixels, offsets (..., 4): d of x and y, then s of x and y.
"""

import math

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)
"""Largest s that is decoded: a box of 16 pixels becomes one of 1,000."""


def encode(truth: Tensor, boxes: Tensor, weights: tuple[float, float]) -> Tensor:
    """The offsets that lead from ``boxes`` to ``truth``; not finite where either is empty."""
    (center, size), (true_center, true_size) = _center_and_size(boxes), _center_and_size(truth)
    shift = weights[0] * (true_center - center) / size
    return torch.cat([shift, weights[1] * torch.log(true_size / size)], dim=-1)


def decode(offsets: Tensor, boxes: Tensor, weights: tuple[float, float]) -> Tensor:
    """The boxes that ``offsets`` lead to from ``boxes``."""
    center, size = _center_and_size(boxes)
    center = offsets[..., :2] / weights[0] * size + center
    half = 0.5 * (torch.exp((offsets[..., 2:] / weights[1]).clamp(max=MAX_LOG_SCALE)) * size)
    return torch.cat([center - half, center + half], dim=-1)


def _center_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * size, size
