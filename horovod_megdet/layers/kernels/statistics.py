"""What the ranks of a group know about the input of one layer."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Count, means and variances over the inputs of all ranks of a group."""

    values: Tensor
    """(3C + 1,) float64: the count, the means, the variances, and 1 / sqrt(var + eps)."""
    narrow: Tensor | None = None
    """(2, C) float32: the means and 1 / sqrt(var + eps) once more, for kernels that need them in this type."""

    @classmethod
    def of(cls, count: Tensor, mean: Tensor, var: Tensor, eps: float) -> "Statistics":
        """From the number of values per channel (), means (C,) and biased variances (C,), all float64."""
        return cls(torch.cat([count.view(1), mean, var, (var + eps).rsqrt_()]))

    @property
    def count(self) -> Tensor:
        """() values per channel, over all ranks of the group."""
        return self.values[0]

    @property
    def mean(self) -> Tensor:
        """(C,)."""
        return self.values[1:].chunk(3)[0]

    @property
    def var(self) -> Tensor:
        """(C,) biased: divided by the count."""
        return self.values[1:].chunk(3)[1]

    @property
    def invstd(self) -> Tensor:
        """(C,) 1 / sqrt(var + eps)."""
        return self.values[1:].chunk(3)[2]
