"""The ReLU behind a normalization layer, as its backward pass sees it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rectifier:
    """What says where ``y = max(0, weight * xhat + bias + shortcut)`` stopped the gradient: where y is 0."""

    y: Tensor
    """The output, in the shape of the input."""
    weight: Tensor | None
    """(C,) with ``bias``: kernels may work out y from the input again, if there is no shortcut."""
    bias: Tensor | None
    shortcut: bool
    """Whether there is one."""
