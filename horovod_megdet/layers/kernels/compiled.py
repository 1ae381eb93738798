"""The compiled kernels of ``batch_norm_cpu.c``, for the CPU.

A network has many small layers, in which each call of an operator counts, so that the compiled functions leave nothing
to do around them.
"""

import torch
from torch import Tensor

from horovod_megdet.layers.c_library import TYPES, call
from horovod_megdet.layers.kernels.layout import dense, laid_out_like
from horovod_megdet.layers.kernels.plain import PlainKernels
from horovod_megdet.layers.kernels.rectifier import Rectifier
from horovod_megdet.layers.kernels.statistics import Statistics


class CompiledKernels(PlainKernels):
    """For float32, bfloat16 and float16, in both memory layouts; nothing is copied that is in one of them.

    The gradient that passes the ReLU is written only where a shortcut needs it; elsewhere each pass works it out.
    """

    fuses = True

    def sums(self, x: Tensor) -> Tensor:
        x = dense(x)
        message = x.new_empty(2 * x.shape[1] + 1, dtype=torch.float64)
        call("moments", x, TYPES[x.dtype], *_extents(x), message)
        return message

    def squared_differences(self, x: Tensor, mean: Tensor) -> Tensor:
        x = dense(x)
        sums = mean.new_empty(2, len(mean))
        call("squared_differences", x, TYPES[x.dtype], mean, *_extents(x), sums)
        return sums[0]

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

    def normalize(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Statistics,
        shortcut: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        x = dense(x)
        y = torch.empty_like(x)
        other = None if shortcut is None else laid_out_like(shortcut, x)
        parameters = (statistics.values, _float(weight), _float(bias))
        call("normalize", x, TYPES[x.dtype], *parameters, other, relu, *_extents(x), y)
        return y

    def gradient_sums(
        self, dy: Tensor, x: Tensor, statistics: Statistics, rectifier: Rectifier | None = None
    ) -> tuple[Tensor, Tensor]:
        x = dense(x)
        dy = laid_out_like(dy, x)
        sums = statistics.values.new_empty(2, x.shape[1])
        weight, bias, y, dz = None, None, None, dy
        if rectifier is not None:
            weight, bias = _float(rectifier.weight), _float(rectifier.bias)
            if rectifier.shortcut:
                y, dz = laid_out_like(rectifier.y, x), torch.empty_like(x)
        call(
            "gradient_sums", dy, x, TYPES[x.dtype], statistics.values, weight, bias, rectifier is not None, y,
            *_extents(x), dz, sums,
        )  # fmt: skip
        return dz, sums

    def input_gradient(
        self,
        dz: Tensor,
        x: Tensor,
        weight: Tensor | None,
        statistics: Statistics,
        total: Tensor,
        rectifier: Rectifier | None = None,
    ) -> Tensor:
        x = dense(x)
        dz, dx = laid_out_like(dz, x), torch.empty_like(x)
        bias = None if rectifier is None else _float(rectifier.bias)
        apply_relu_backward = rectifier is not None and not rectifier.shortcut
        call(
            "input_gradient", dz, x, TYPES[x.dtype], statistics.values, _float(weight), bias, apply_relu_backward,
            total, *_extents(x), dx,
        )  # fmt: skip
        return dx


def _float(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float()


def _extents(x: Tensor) -> tuple[int, int, int, int]:
    """(outer, channels, inner) as the compiled functions see a dense tensor, and how many threads they may use."""
    channels = x.shape[1]
    if x.is_contiguous():
        return x.shape[0], channels, x.numel() // (x.shape[0] * channels), torch.get_num_threads()
    return x.numel() // channels, channels, 1, torch.get_num_threads()
