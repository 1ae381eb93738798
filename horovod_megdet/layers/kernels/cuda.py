"""PyTorch's own CUDA kernels for synchronized batch normalization."""

import torch
from torch import Tensor

from horovod_megdet.layers.kernels.layout import dense
from horovod_megdet.layers.kernels.plain import PlainKernels, activate, stop
from horovod_megdet.layers.kernels.rectifier import Rectifier
from horovod_megdet.layers.kernels.statistics import Statistics

_TINY = 1e-12


class CUDAKernels(PlainKernels):
    """For activations on a GPU. What is (C,) or happens once per layer in float64 stays with the plain operators."""

    def sums(self, x: Tensor) -> Tensor:
        mean, invstd = torch.batch_norm_stats(dense(x), _TINY)
        mean, var = mean.double(), (invstd.double().pow(-2) - _TINY).clamp_min(0)
        count = x.numel() // x.shape[1]
        return torch.cat([mean.new_full((1,), count), mean * count, (var + mean.square()) * count])

    def normalize(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Statistics,
        shortcut: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        mean, invstd = _in_kernel_type(x, statistics)
        # The kernel takes eps beside 1 / sqrt(var + eps), and does not use it.
        y = torch.batch_norm_elemt(dense(x), _like(weight, mean), _like(bias, mean), mean, invstd, 0.0)
        return activate(y, shortcut, relu)

    def gradient_sums(
        self, dy: Tensor, x: Tensor, statistics: Statistics, rectifier: Rectifier | None = None
    ) -> tuple[Tensor, Tensor]:
        dz = dy if rectifier is None else stop(dy, rectifier)
        first, second, _, _ = torch.batch_norm_backward_reduce(
            dense(dz), dense(x), *_in_kernel_type(x, statistics), None, True, False, False
        )
        return dz, torch.stack([first.double(), second.double() * statistics.invstd])

    def input_gradient(
        self,
        dz: Tensor,
        x: Tensor,
        weight: Tensor | None,
        statistics: Statistics,
        total: Tensor,
        rectifier: Rectifier | None = None,
    ) -> Tensor:
        mean, invstd = _in_kernel_type(x, statistics)
        sum_dy, sum_dy_xmu = total[0].to(mean), (total[1] / statistics.invstd).to(mean)
        count = statistics.count.to(torch.int32).view(1)
        return torch.batch_norm_backward_elemt(
            dense(dz), dense(x), mean, invstd, _like(weight, mean), sum_dy, sum_dy_xmu, count
        )


def _in_kernel_type(x: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps) in the type that the kernels compute in."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return statistics.mean.to(dtype), statistics.invstd.to(dtype)


def _like(parameter: Tensor | None, other: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(other.dtype)
