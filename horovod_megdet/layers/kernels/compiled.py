"""The compiled kernels of ``batch_norm_cpu.c``, for the CPU.

A network has many small layers, in which each call of an operator counts, so that the compiled functions leave nothing
to do around them.
"""

import torch
from torch import Tensor

from horovod_megdet.layers.c_library import call
from horovod_megdet.layers.kernels.layout import dense, laid_out_like
from horovod_megdet.layers.kernels.plain import PlainKernels
from horovod_megdet.layers.kernels.statistics import Statistics


class CompiledKernels(PlainKernels):
    """For float32, and for 16-bit types, which are widened; in both memory layouts."""

    def sums(self, x: Tensor) -> Tensor:
        x = dense(x.float())
        message = x.new_empty(2 * x.shape[1] + 1, dtype=torch.float64)
        call("moments", x, *_extents(x), message)
        return message

    def squared_differences(self, x: Tensor, mean: Tensor) -> Tensor:
        x = dense(x.float())
        first, second = result = mean.new_empty(2, len(mean))
        call("sums", x, x, mean, *_extents(x), result)
        # sum (x - m)^2 = sum x (x - m) - m sum (x - m)
        return second - mean * (first - mean * (x.numel() // x.shape[1]))

    def statistics(self, sums: Tensor, eps: float) -> Statistics:
        channels = len(sums) // 2
        values = sums.new_empty(3 * channels + 1)
        call("statistics", sums, eps, channels, values)
        return Statistics(values)

    def update_running(self, running_mean: Tensor, running_var: Tensor, statistics: Statistics, factor: float) -> None:
        if running_mean.dtype != torch.float32:
            super().update_running(running_mean, running_var, statistics, factor)
            return
        call("update_running", statistics.values, factor, len(running_mean), running_mean, running_var)

    def normalize(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics) -> Tensor:
        wide = dense(x.float())
        y = torch.empty_like(wide)
        call("normalize", wide, statistics.values, _float(weight), _float(bias), *_extents(wide), y)
        return y.to(x.dtype)

    def gradient_sums(self, dy: Tensor, x: Tensor, statistics: Statistics) -> Tensor:
        x = dense(x.float())
        result = statistics.values.new_empty(2, x.shape[1])
        call("gradient_sums", laid_out_like(dy.float(), x), x, statistics.values, *_extents(x), result)
        return result

    def input_gradient(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, statistics: Statistics, total: Tensor
    ) -> Tensor:
        wide = dense(x.float())
        dy, dx = laid_out_like(dy.float(), wide), torch.empty_like(wide)
        call("input_gradient", dy, wide, statistics.values, _float(weight), total, *_extents(wide), dx)
        return dx.to(x.dtype)


def _float(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float()


def _extents(x: Tensor) -> tuple[int, int, int, int]:
    """(outer, channels, inner) as the compiled functions see a dense tensor, and how many threads they may use."""
    channels = x.shape[1]
    if x.is_contiguous():
        return x.shape[0], channels, x.numel() // (x.shape[0] * channels), torch.get_num_threads()
    return x.numel() // channels, channels, 1, torch.get_num_threads()
