"""PyTorch's own CUDA kernels for synchronized batch normalization, and what they need before and after a message."""

import torch
from torch import Tensor

from horovod_megdet.layers.kernels import channels
from horovod_megdet.layers.kernels.layout import dense
from horovod_megdet.layers.kernels.plain import PlainKernels, activate, relu_backward
from horovod_megdet.layers.kernels.rectifier import Rectifier
from horovod_megdet.layers.kernels.statistics import Statistics

_TINY = 1e-12


class CUDAKernels(PlainKernels):
    """For activations on a GPU. Between PyTorch's kernels and the messages, in float64, one kernel each."""

    def sums(self, x: Tensor) -> Tensor:
        mean, invstd = torch.batch_norm_stats(dense(x), _TINY)
        return channels.sums(mean, invstd, _TINY, x.numel() // x.shape[1])

    def statistics(self, sums: Tensor, eps: float) -> Statistics:
        return channels.statistics(sums, eps)

    def update_running(self, running_mean: Tensor, running_var: Tensor, statistics: Statistics, factor: float) -> None:
        channels.update_running(running_mean, running_var, statistics, factor)

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
        dz = dy if rectifier is None else relu_backward(dy, rectifier)
        dense_dz, dense_x = dense(dz), dense(x)
        if not (_channels_are_last(dense_dz) and _channels_are_last(dense_x)):
            # In other layouts, and only there, the kernel adds 16-bit values up in their own type.
            dense_dz, dense_x = (each.to(torch.promote_types(x.dtype, torch.float32)) for each in (dense_dz, dense_x))
        mean, invstd = _in_kernel_type(x, statistics)
        sum_dz, sum_dz_xmu, _, _ = torch.batch_norm_backward_reduce(
            dense_dz, dense_x, mean, invstd, None, True, False, False
        )
        return dz, channels.gradient_sums(sum_dz, sum_dz_xmu, statistics)

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
        sum_dy, sum_dy_xmu, count = channels.kernel_sums(total, statistics, mean.dtype)
        return torch.batch_norm_backward_elemt(
            dense(dz), dense(x), mean, invstd, _like(weight, mean), sum_dy, sum_dy_xmu, count
        )


def _in_kernel_type(x: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps) in the type that the kernels compute in."""
    if x.dtype != torch.float64 and statistics.narrow is not None:
        return statistics.narrow[0], statistics.narrow[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    return statistics.mean.to(dtype), statistics.invstd.to(dtype)


def _channels_are_last(x: Tensor) -> bool:
    return x.stride(1) == 1


def _like(parameter: Tensor | None, other: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(other.dtype)
