"""The arithmetic of batch normalization in plain operators: the definition that the other kernels are held to."""

import torch
from torch import Tensor

from horovod_megdet.layers.kernels.statistics import Statistics


class PlainKernels:
    """Works on every device and in every floating-point type. Sums and statistics are float64.

    Activations are (N, C, *) and not empty.
    """

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

    def normalize(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics) -> Tensor:
        """Returns ``weight * (x - mean) * invstd + bias`` in the type of ``x``."""
        y = _xhat(x, statistics)
        y = y if weight is None else y * per_channel(weight, x)
        y = y if bias is None else y + per_channel(bias, x)
        return y.to(x.dtype)

    def gradient_sums(self, dy: Tensor, x: Tensor, statistics: Statistics) -> Tensor:
        """Returns ``[sum dy, sum dy * xhat]``, the gradients of bias and weight: (2, C).

        xhat is (x - mean) * invstd, x normalized before weight and bias.
        """
        dimensions = _all_but_channels(x)
        products = dy * (x - per_channel(statistics.mean, x))
        return torch.stack([dy.double().sum(dimensions), products.sum(dimensions) * statistics.invstd])

    def input_gradient(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, statistics: Statistics, total: Tensor
    ) -> Tensor:
        """Returns ``dx = weight * invstd * (dy - sum dy / M - xhat * sum(dy * xhat) / M)`` in the type of ``x``.

        ``total`` is :meth:`gradient_sums` added up over all ranks of the group, and M the count over all of them.
        """
        mean_dy, mean_dy_xhat = (per_channel(values, x) for values in total / statistics.count)
        scale = statistics.invstd if weight is None else weight * statistics.invstd
        dx = per_channel(scale, x) * (dy - mean_dy - _xhat(x, statistics) * mean_dy_xhat)
        return dx.to(x.dtype)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) values in a shape that broadcasts over ``x`` (N, C, *)."""
    return values.view(-1, *(1,) * (x.dim() - 2))


def _xhat(x: Tensor, statistics: Statistics) -> Tensor:
    return (x - per_channel(statistics.mean, x)) * per_channel(statistics.invstd, x)


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]
