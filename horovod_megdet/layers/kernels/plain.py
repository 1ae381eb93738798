"""The arithmetic of batch normalization in plain operators: the definition that the other kernels are held to."""

import torch
from torch import Tensor

from horovod_megdet.layers.kernels.rectifier import Rectifier
from horovod_megdet.layers.kernels.statistics import Statistics


class PlainKernels:
    """Works on every device and in every floating-point type. Sums and statistics are float64.

    Activations are (N, C, *) and not empty.
    """

    fuses = False
    """Whether a shortcut and a ReLU cost no passes of their own."""

    def sums(self, x: Tensor) -> Tensor:
        """Returns ``[n, sum x, sum x^2]`` over all dimensions but the channels: (2C + 1,), n the values per channel."""
        wide, dimensions = x.double(), _all_but_channels(x)
        count = wide.new_full((1,), x.numel() // x.shape[1])
        return torch.cat([count, wide.sum(dimensions), wide.square().sum(dimensions)])

    def squared_differences(self, x: Tensor, mean: Tensor) -> Tensor:
        """Returns ``sum (x - mean)^2`` per channel, (C,), for ``mean`` (C,) float64."""
        return (x.double() - per_channel(mean, x)).square_().sum(_all_but_channels(x))

    def statistics(self, sums: Tensor, eps: float) -> Statistics:
        """From :meth:`sums`, added up over all ranks of the group."""
        mean, mean_square = (sums[1:] / sums[0]).chunk(2)
        return Statistics.of(sums[0], mean, (mean_square - mean * mean).clamp_min_(0), eps)

    def update_running(self, running_mean: Tensor, running_var: Tensor, statistics: Statistics, factor: float) -> None:
        """Moves both, (C,), towards ``statistics`` by ``factor``; the variance is the unbiased var * M / (M - 1)."""
        unbiased = statistics.var * (statistics.count / (statistics.count - 1))
        running_mean.lerp_(statistics.mean.to(running_mean.dtype), factor)
        running_var.lerp_(unbiased.to(running_var.dtype), factor)

    def normalize(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Statistics,
        shortcut: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """Returns ``y = weight * (x - mean) * invstd + bias + shortcut``, or max(0, y), in the type of ``x``.

        ``shortcut`` has the shape and type of ``x``.
        """
        y = _xhat(x, statistics)
        y = y if weight is None else y * per_channel(weight, x)
        y = y if bias is None else y + per_channel(bias, x)
        return activate(y.to(x.dtype), shortcut, relu)

    def gradient_sums(
        self, dy: Tensor, x: Tensor, statistics: Statistics, rectifier: Rectifier | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns ``dz``, the gradient before the ReLU, and ``[sum dz, sum dz * xhat]``, (2, C).

        The sums are the gradients of bias and weight; xhat is (x - mean) * invstd, x normalized before weight and bias.
        dz is the gradient of the shortcut. Kernels may return dy in its place if there is no shortcut.
        """
        dz = dy if rectifier is None else relu_backward(dy, rectifier)
        dimensions = _all_but_channels(x)
        products = dz * (x - per_channel(statistics.mean, x))
        return dz, torch.stack([dz.double().sum(dimensions), products.sum(dimensions) * statistics.invstd])

    def input_gradient(
        self,
        dz: Tensor,
        x: Tensor,
        weight: Tensor | None,
        statistics: Statistics,
        total: Tensor,
        rectifier: Rectifier | None = None,
    ) -> Tensor:
        """Returns ``dx = weight * invstd * (dz - sum dz / M - xhat * sum(dz * xhat) / M)`` in the type of ``x``.

        ``dz`` and ``total`` are what :meth:`gradient_sums` returned, the sums added up over all ranks of the group, and
        M is the count over all of them.
        """
        mean_dz, mean_dz_xhat = (per_channel(values, x) for values in total / statistics.count)
        scale = statistics.invstd if weight is None else weight * statistics.invstd
        dx = per_channel(scale, x) * (dz - mean_dz - _xhat(x, statistics) * mean_dz_xhat)
        return dx.to(x.dtype)


def activate(y: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """Adds the shortcut, if there is one, and takes the ReLU, if wanted; both in place."""
    y = y if shortcut is None else y.add_(shortcut)
    return y.relu_() if relu else y


def relu_backward(dy: Tensor, rectifier: Rectifier) -> Tensor:
    """The gradient before the ReLU, from that behind it."""
    return torch.ops.aten.threshold_backward(dy, rectifier.y, 0)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) values in a shape that broadcasts over ``x`` (N, C, *)."""
    return values.view(-1, *(1,) * (x.dim() - 2))


def _xhat(x: Tensor, statistics: Statistics) -> Tensor:
    return (x - per_channel(statistics.mean, x)) * per_channel(statistics.invstd, x)


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]
