"""The local arithmetic of batch normalisation. Nothing in here communicates.

Tensors of activations are (N, C, *); statistics, scales and sums are (C,). On CUDA these are PyTorch's own kernels for
synchronised batch normalisation. On the CPU, where PyTorch has none, they are put together from the fastest operators:
``native_batch_norm`` with given statistics, and sums of values shifted near zero (``torch.var_mean`` is ten times
slower than these).
"""

import torch
from torch import Tensor

SMALL_RATIO = 32.0
"""|mean| / std up to which float32 arithmetic on the values themselves is exact enough (about 32 x 6e-8 of a std)."""

_TINY = 1e-12


def sums(x: Tensor) -> Tensor:
    """Returns ``[n, sum x, sum x^2]`` over everything but the channels: (2C+1,) float64, n the values per channel."""
    channels = x.shape[1]
    count = x.numel() // channels
    if count == 0:
        return x.new_zeros(2 * channels + 1, dtype=torch.float64)
    shift, first, second = _shifted_sums(x)
    message = first.new_empty(2 * channels + 1)
    message[0] = count
    # Undoing the shift k in float64: sum x = sum d + n k, sum x^2 = sum d^2 + 2 k sum d + n k^2, for d = x - k.
    torch.add(first, shift, alpha=count, out=message[1 : channels + 1])
    torch.addcmul(second, shift, message[1 : channels + 1] + first, out=message[channels + 1 :])
    return message


def squared_differences(x: Tensor, mean: Tensor) -> Tensor:
    """Returns ``sum (x - mean)^2`` per channel in float64; ``mean`` is (C,) float64."""
    if x.numel() == 0:
        return torch.zeros_like(mean)
    x = widened(x)
    centre = mean.to(x.dtype)
    differences = x - per_channel(centre, x)
    first = differences.sum(_all_but_channels(x)).double()
    second = differences.square_().sum(_all_but_channels(x)).double()
    # The centre is the mean rounded to the type of x; the correction for that rounding is small.
    rest = mean - centre.double()
    return second - 2 * rest * first + (x.numel() // x.shape[1]) * rest.square()


def near_zero(x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``x`` and ``mean`` moved by the same constant where a channel's mean is large against its deviation.

    Normalisation computes ``x * scale + shift``, which cancels badly there. The subtraction itself is exact, as x is
    close to the constant. On CUDA nothing is moved: to look at the statistics would wait for the device, and its
    kernels subtract the mean first.
    """
    if x.is_cuda or bool((mean.square() <= SMALL_RATIO**2 * var).all()):
        return x, mean
    centre = mean.to(x.dtype)
    return x - per_channel(centre, x), mean - centre.double()


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Returns ``weight * (x - mean) / sqrt(var + eps) + bias`` in the type of ``x``; mean and var are (C,) float64."""
    if x.numel() == 0:
        return torch.empty_like(x)
    if x.is_cuda:
        mean, invstd = _cuda_statistics(x, mean, var, eps)
        return torch.batch_norm_elemt(_dense(x), _like(weight, mean), _like(bias, mean), mean, invstd, eps)
    wide = widened(x)
    statistics = mean.to(wide.dtype), var.to(wide.dtype)
    y = torch.native_batch_norm(wide, _like(weight, wide), _like(bias, wide), *statistics, False, 0.0, eps)[0]
    return y.to(x.dtype)


def gradient_sums(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``(partial, sum dy, sum dy * xhat)``; xhat is the normalised x before weight and bias.

    The sums are (C,), float32 or float64: the gradients of bias and weight. ``partial`` is what
    :func:`input_gradient` goes on from.
    """
    if x.numel() == 0:
        zeros = torch.zeros_like(mean)
        return torch.zeros_like(x), zeros, zeros
    if x.is_cuda:
        dy, x = _dense(dy), _dense(x)
        mean, invstd = _cuda_statistics(x, mean, var, eps)
        sum_dy, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(
            dy, x, mean, invstd, _like(weight, mean), True, False, False
        )
        return dy, sum_dy, sum_dy_xmu * invstd
    dy, x = widened(dy), widened(x)
    statistics = mean.to(x.dtype), var.to(x.dtype)
    # With given statistics the operator returns weight / std * dy: the first term of dx, from the same pass.
    partial, sum_dy_xhat, sum_dy = torch.ops.aten.native_batch_norm_backward(
        dy, x, _like(weight, x), *statistics, None, None, False, eps, [True, True, True]
    )
    return partial, sum_dy, sum_dy_xhat


def input_gradient(
    partial: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    total: Tensor,
    count: Tensor,
) -> Tensor:
    """Returns ``dx = weight / std * (dy - sum dy / M - xhat * sum(dy * xhat) / M)`` in the type of ``x``.

    ``total`` is ``[sum dy, sum dy * xhat]`` over all ranks, (2C,) float64; ``count`` is M, the values per channel over
    all ranks, () float64.
    """
    if x.numel() == 0:
        return partial
    sum_dy, sum_dy_xhat = total.chunk(2)
    if x.is_cuda:
        x = _dense(x)
        mean, invstd = _cuda_statistics(x, mean, var, eps)
        return torch.batch_norm_backward_elemt(
            partial,
            x,
            mean,
            invstd,
            _like(weight, mean),
            sum_dy.to(mean.dtype),
            sum_dy_xhat.to(mean.dtype) / invstd,
            count.to(torch.int32).view(1),
        )
    # The two remaining terms are one function slope * x + offset per channel.
    invstd = (var + eps).rsqrt()
    scale = invstd / count if weight is None else weight.double() * invstd / count
    slope = -scale * invstd * sum_dy_xhat
    offset = -scale * sum_dy - slope * mean
    dx = partial.addcmul_(widened(x), per_channel(slope.to(partial.dtype), x))
    return dx.add_(per_channel(offset.to(partial.dtype), x)).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 if it is of a 16-bit type, else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) values in a shape that broadcasts over ``x`` (N, C, *)."""
    return values.view(-1, *(1,) * (x.dim() - 2))


def _shifted_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A shift k near each channel's mean, and the sums of x - k and (x - k)^2, all (C,) float64."""
    count = x.numel() // x.shape[1]
    if x.is_cuda:
        mean, invstd = torch.batch_norm_stats(_dense(x), _TINY)
        var = (invstd.double().pow(-2) - _TINY).clamp_min(0)
        return mean.double(), torch.zeros_like(var), var * count
    x = widened(x)
    if not x.is_contiguous():
        # With channels last the vector units run along the channels, and this operator is the faster one. Its mean is
        # of the type of x, which is not enough for a large one.
        mean, var = (statistic.double() for statistic in torch.batch_norm_update_stats(x, None, None, 0.0))
        if bool((mean.square() <= SMALL_RATIO**2 * var).all()):
            return mean, torch.zeros_like(var), var * count
    # The mean of a part is at most a few standard deviations from that of all, whatever the values are.
    part = x[(slice(None, None, 4), slice(None)) + (slice(None, None, 4),) * (x.dim() - 2)]
    shift = part.mean(_all_but_channels(x))
    differences = x - per_channel(shift, x)
    first = differences.sum(_all_but_channels(x))
    second = differences.square_().sum(_all_but_channels(x))
    return shift.double(), first.double(), second.double()


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _like(parameter: Tensor | None, other: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(other.dtype)


def _dense(x: Tensor) -> Tensor:
    """The CUDA kernels accept both dense layouts, but no other strides."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    return x if x.is_contiguous(memory_format=channels_last) else x.contiguous()


def _cuda_statistics(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps) in the type that the CUDA kernels compute in."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return mean.to(dtype), (var + eps).rsqrt().to(dtype)
