"""What batch normalization computes for each channel around a message, on a GPU: one kernel where operators are many.

A detector has some fifty normalization layers; with an operator for every step of the formulas, a GPU would wait for
its host. Written in Triton, which comes with PyTorch's builds for NVIDIA GPUs. All computations are in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from horovod_megdet.layers.kernels.statistics import Statistics

_BLOCK = 128


def sums(mean: Tensor, invstd: Tensor, eps: float, count: int) -> Tensor:
    """``[n, sum x, sum x^2]`` (2C + 1,) float64 from mean and 1 / sqrt(var + eps) (C,) over ``count`` values each."""
    message = mean.new_empty(2 * len(mean) + 1, dtype=torch.float64)
    _sums[_grid(mean)](mean, invstd, message, eps, count, len(mean), BLOCK=_BLOCK)
    return message


def statistics(sums: Tensor, eps: float) -> Statistics:
    """From ``[M, sum x, sum x^2]`` (2C + 1,) of all ranks."""
    channels = len(sums) // 2
    values, narrow = sums.new_empty(3 * channels + 1), sums.new_empty(2, channels, dtype=torch.float32)
    _statistics[_grid(narrow[0])](sums, values, narrow, eps, channels, BLOCK=_BLOCK)
    return Statistics(values, narrow)


def update_running(running_mean: Tensor, running_var: Tensor, statistics: Statistics, factor: float) -> None:
    """Moves both (C,) towards mean and unbiased variance by ``factor``."""
    arguments = (statistics.values, running_mean, running_var, factor, len(running_mean))
    _update_running[_grid(running_mean)](*arguments, BLOCK=_BLOCK)


def gradient_sums(sum_dy: Tensor, sum_dy_xmu: Tensor, statistics: Statistics) -> Tensor:
    """``[sum dy, sum dy * xhat]`` (2, C) float64 from ``sum dy`` and ``sum dy * (x - mean)`` (C,)."""
    result = statistics.values.new_empty(2, len(sum_dy))
    _gradient_sums[_grid(sum_dy)](sum_dy, sum_dy_xmu, statistics.values, result, len(sum_dy), BLOCK=_BLOCK)
    return result


def kernel_sums(total: Tensor, statistics: Statistics, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The reverse of :func:`gradient_sums`, (C,) of ``dtype`` each, divided by the count, and a count of 1, (1,) int32.

    The count of all ranks need not fit into the int32 that PyTorch's kernel wants.
    """
    result, count = total.new_empty(total.shape, dtype=dtype), total.new_empty(1, dtype=torch.int32)
    _kernel_sums[_grid(total[0])](total, statistics.values, result, count, total.shape[1], BLOCK=_BLOCK)
    return result[0], result[1], count


def _grid(per_channel: Tensor) -> tuple[int]:
    return (triton.cdiv(len(per_channel), _BLOCK),)


@triton.jit(do_not_specialize=["count", "channels"])
def _sums(mean, invstd, message, eps: tl.float64, count: tl.int64, channels, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    n = count.to(tl.float64)
    average = tl.load(mean + channel, mask, 0).to(tl.float64)
    inverse = tl.load(invstd + channel, mask, 1).to(tl.float64)
    variance = 1.0 / (inverse * inverse) - eps
    variance = tl.where(variance < 0.0, 0.0, variance)  # NaN passes
    tl.store(message + 1 + channel, average * n, mask)
    tl.store(message + 1 + channels + channel, (variance + average * average) * n, mask)
    tl.store(message + channel, n, channel == 0)


@triton.jit(do_not_specialize=["channels"])
def _statistics(sums, values, narrow, eps: tl.float64, channels, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    count = tl.load(sums)
    mean = tl.load(sums + 1 + channel, mask, 0) / count
    variance = tl.load(sums + 1 + channels + channel, mask, 1) / count - mean * mean
    variance = tl.where(variance < 0.0, 0.0, variance)  # NaN passes
    inverse = 1.0 / tl.sqrt(variance + eps)
    tl.store(values + channel, count, channel == 0)
    tl.store(values + 1 + channel, mean, mask)
    tl.store(values + 1 + channels + channel, variance, mask)
    tl.store(values + 1 + 2 * channels + channel, inverse, mask)
    tl.store(narrow + channel, mean.to(tl.float32), mask)
    tl.store(narrow + channels + channel, inverse.to(tl.float32), mask)


@triton.jit(do_not_specialize=["channels"])
def _update_running(values, running_mean, running_var, factor: tl.float64, channels, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    count = tl.load(values)
    mean = tl.load(values + 1 + channel, mask, 0)
    unbiased = tl.load(values + 1 + channels + channel, mask, 0) * (count / (count - 1.0))
    old_mean = tl.load(running_mean + channel, mask, 0).to(tl.float64)
    old_var = tl.load(running_var + channel, mask, 0).to(tl.float64)
    tl.store(running_mean + channel, old_mean + factor * (mean - old_mean), mask)
    tl.store(running_var + channel, old_var + factor * (unbiased - old_var), mask)


@triton.jit(do_not_specialize=["channels"])
def _gradient_sums(sum_dy, sum_dy_xmu, values, result, channels, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    inverse = tl.load(values + 1 + 2 * channels + channel, mask, 0)
    tl.store(result + channel, tl.load(sum_dy + channel, mask, 0).to(tl.float64), mask)
    tl.store(result + channels + channel, tl.load(sum_dy_xmu + channel, mask, 0).to(tl.float64) * inverse, mask)


@triton.jit(do_not_specialize=["channels"])
def _kernel_sums(total, values, result, count, channels, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    values_per_channel = tl.load(values)
    inverse = tl.load(values + 1 + 2 * channels + channel, mask, 1)
    tl.store(result + channel, tl.load(total + channel, mask, 0) / values_per_channel, mask)
    of_xhat = tl.load(total + channels + channel, mask, 0) / values_per_channel
    tl.store(result + channels + channel, of_xhat / inverse, mask)
    tl.store(count + channel, tl.full([BLOCK], 1, tl.int32), channel == 0)
