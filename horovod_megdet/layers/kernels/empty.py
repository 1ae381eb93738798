"""A rank without activations still takes part in its group's statistics."""

import torch
from torch import Tensor

from horovod_megdet.layers.kernels.plain import PlainKernels
from horovod_megdet.layers.kernels.rectifier import Rectifier
from horovod_megdet.layers.kernels.statistics import Statistics


class EmptyInputKernels(PlainKernels):
    """For activations of zero elements. Statistics come from ``others``, so that they are the same on all ranks."""

    def __init__(self, others: PlainKernels) -> None:
        self._others = others

    def sums(self, x: Tensor) -> Tensor:
        return x.new_zeros(2 * x.shape[1] + 1, dtype=torch.float64)

    def squared_differences(self, x: Tensor, mean: Tensor) -> Tensor:
        return torch.zeros_like(mean)

    def statistics(self, sums: Tensor, eps: float) -> Statistics:
        return self._others.statistics(sums, eps)

    def update_running(self, running_mean: Tensor, running_var: Tensor, statistics: Statistics, factor: float) -> None:
        self._others.update_running(running_mean, running_var, statistics, factor)

    def normalize(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Statistics,
        shortcut: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        return torch.empty_like(x)

    def gradient_sums(
        self, dy: Tensor, x: Tensor, statistics: Statistics, rectifier: Rectifier | None = None
    ) -> tuple[Tensor, Tensor]:
        return dy, x.new_zeros(2, x.shape[1], dtype=torch.float64)

    def input_gradient(
        self,
        dz: Tensor,
        x: Tensor,
        weight: Tensor | None,
        statistics: Statistics,
        total: Tensor,
        rectifier: Rectifier | None = None,
    ) -> Tensor:
        return torch.zeros_like(x)
