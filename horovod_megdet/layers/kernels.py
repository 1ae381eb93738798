"""The local arithmetic of batch normalisation. Nothing in here communicates.

Tensors of activations are (N, C, *); statistics and sums are float64. On CUDA these are PyTorch's own kernels for
synchronised batch normalisation. PyTorch has none for the CPU: there ``batch_norm_cpu.c`` does it for float32 and for
16-bit types, which are widened, in memory of either dense layout, and plain operators do it for float64. Small layers
are many: for them each call of an operator counts, so that the compiled functions leave nothing to do around them.
"""

import ctypes
import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-12


@dataclass(frozen=True)
class Statistics:
    """What a group's ranks found out together about one layer's input."""

    values: Tensor
    """(3C + 1,) float64: the count, the means, the variances, and 1 / sqrt(var + eps)."""

    @classmethod
    def of_moments(cls, message: Tensor, eps: float) -> "Statistics":
        """From :func:`sums` over all ranks."""
        if message.is_cuda:
            mean, mean_square = (message[1:] / message[0]).chunk(2)
            return cls.of(message[0], mean, torch.addcmul(mean_square, mean, mean, value=-1).clamp_min_(0), eps)
        channels = len(message) // 2
        values = message.new_empty(3 * channels + 1)
        _compiled.megdet_statistics(message.data_ptr(), eps, channels, values.data_ptr())
        return cls(values)

    @classmethod
    def of(cls, count: Tensor, mean: Tensor, var: Tensor, eps: float) -> "Statistics":
        """From values per channel (), means (C,) and biased variances (C,), all float64."""
        return cls(torch.cat([count.view(1), mean, var, (var + eps).rsqrt_()]))

    @property
    def count(self) -> Tensor:
        """() values per channel over the group's ranks."""
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

    def update(self, running_mean: Tensor, running_var: Tensor, factor: float) -> None:
        """Moves the running statistics towards these by ``factor``, with the unbiased variance var * M / (M - 1)."""
        if running_mean.device.type == "cpu" and running_mean.dtype == torch.float32:
            pointers = _pointers(running_mean, running_var)
            _compiled.megdet_update_running(self.values.data_ptr(), factor, len(running_mean), *pointers)
            return
        unbiased = self.var * (self.count / (self.count - 1))
        running_mean.lerp_(self.mean.to(running_mean.dtype), factor)
        running_var.lerp_(unbiased.to(running_var.dtype), factor)


def sums(x: Tensor) -> Tensor:
    """Returns ``[n, sum x, sum x^2]`` over everything but the channels: (2C+1,) float64, n the values per channel."""
    channels = x.shape[1]
    message = torch.empty(2 * channels + 1, dtype=torch.float64, device=x.device)
    if x.numel() == 0:
        return message.zero_()
    if not x.is_cuda and x.dtype != torch.float64:
        x = _dense(x.float())
        _compiled.megdet_moments(x.data_ptr(), *_shape(x), message.data_ptr())
        return message
    message[0] = count = x.numel() // channels
    moments = message[1:].view(2, channels)
    if x.is_cuda:
        mean, invstd = torch.batch_norm_stats(_dense(x), _TINY)
        mean, var = mean.double(), (invstd.double().pow(-2) - _TINY).clamp_min(0)
        torch.stack([mean, var + mean.square()], out=moments).mul_(count)
    else:
        torch.stack([x.sum(_all_but_channels(x)), x.square().sum(_all_but_channels(x))], out=moments)
    return message


def squared_differences(x: Tensor, mean: Tensor) -> Tensor:
    """Returns ``sum (x - mean)^2`` per channel in float64; ``mean`` is (C,) float64."""
    if x.numel() == 0:
        return torch.zeros_like(mean)
    if x.is_cuda or x.dtype == torch.float64:
        return (x.double() - per_channel(mean, x)).square_().sum(_all_but_channels(x))
    x = _dense(x.float())
    first, second = result = mean.new_empty(2, len(mean))
    _compiled.megdet_sums(*_pointers(x, x, mean), *_shape(x), result.data_ptr())
    # sum (x - m)^2 = sum x (x - m) - m sum (x - m)
    return second - mean * (first - mean * (x.numel() // x.shape[1]))


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics) -> Tensor:
    """Returns ``weight * (x - mean) * invstd + bias`` in the type of ``x``."""
    if x.numel() == 0:
        return torch.empty_like(x)
    if x.is_cuda:
        mean, invstd = _cuda_statistics(x, statistics)
        # The kernel takes eps beside 1 / sqrt(var + eps), and does not use it.
        return torch.batch_norm_elemt(_dense(x), _like(weight, mean), _like(bias, mean), mean, invstd, 0.0)
    if x.dtype == torch.float64:
        y = (x - per_channel(statistics.mean, x)) * per_channel(statistics.invstd, x)
        y = y if weight is None else y * per_channel(weight, x)
        return y if bias is None else y + per_channel(bias, x)
    wide = _dense(x.float())
    y, weight, bias = torch.empty_like(wide), _like(weight, wide), _like(bias, wide)
    _compiled.megdet_normalise(*_pointers(wide, statistics.values, weight, bias), *_shape(wide), y.data_ptr())
    return y.to(x.dtype)


def gradient_sums(dy: Tensor, x: Tensor, statistics: Statistics) -> Tensor:
    """Returns ``[sum dy, sum dy * xhat]``, the gradients of bias and weight: (2, C) float64.

    xhat is the normalised x before weight and bias.
    """
    channels = x.shape[1]
    if x.numel() == 0:
        return statistics.values.new_zeros(2, channels)
    if x.is_cuda:
        first, second, _, _ = torch.batch_norm_backward_reduce(
            _dense(dy), _dense(x), *_cuda_statistics(x, statistics), None, True, False, False
        )
        return torch.stack([first.double(), second.double() * statistics.invstd])
    if x.dtype == torch.float64:
        products = dy * (x - per_channel(statistics.mean, x))
        return torch.stack([dy.sum(_all_but_channels(x)), products.sum(_all_but_channels(x)) * statistics.invstd])
    x = _dense(x.float())
    dy, result = _as_laid_out(dy.float(), x), statistics.values.new_empty(2, channels)
    _compiled.megdet_gradient_sums(*_pointers(dy, x, statistics.values), *_shape(x), result.data_ptr())
    return result


def input_gradient(dy: Tensor, x: Tensor, weight: Tensor | None, statistics: Statistics, total: Tensor) -> Tensor:
    """Returns ``dx = weight * invstd * (dy - sum dy / M - xhat * sum(dy * xhat) / M)`` in the type of ``x``.

    ``total`` is ``[sum dy, sum dy * xhat]`` over all ranks, (2, C) float64; M is the count over all ranks.
    """
    if x.numel() == 0:
        return torch.zeros_like(x)
    if x.is_cuda:
        mean, invstd = _cuda_statistics(x, statistics)
        sums_of_all = total[0].to(mean), (total[1] / statistics.invstd).to(mean)
        count = statistics.count.to(torch.int32).view(1)
        return torch.batch_norm_backward_elemt(
            _dense(dy), _dense(x), mean, invstd, _like(weight, mean), *sums_of_all, count
        )
    if x.dtype == torch.float64:
        invstd = statistics.invstd
        xhat = (x - per_channel(statistics.mean, x)) * per_channel(invstd, x)
        mean_dy, mean_dy_xhat = (per_channel(values, x) for values in total / statistics.count)
        scale = invstd if weight is None else weight * invstd
        return per_channel(scale, x) * (dy - mean_dy - xhat * mean_dy_xhat)
    wide = _dense(x.float())
    dy, dx, weight = _as_laid_out(dy.float(), wide), torch.empty_like(wide), _like(weight, wide)
    _compiled.megdet_input_gradient(
        *_pointers(dy, wide, statistics.values, weight, total), *_shape(wide), dx.data_ptr()
    )
    return dx.to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 if it is of a 16-bit type, else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) values in a shape that broadcasts over ``x`` (N, C, *)."""
    return values.view(-1, *(1,) * (x.dim() - 2))


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _like(parameter: Tensor | None, other: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(other.dtype)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _dense(x: Tensor) -> Tensor:
    """``x`` in one of the two layouts that the kernels know: its own if it is one of them, else contiguous."""
    layout = _CHANNELS_LAST.get(x.dim(), torch.contiguous_format)
    return x if x.is_contiguous(memory_format=layout) else x.contiguous()


def _as_laid_out(x: Tensor, other: Tensor) -> Tensor:
    """``x`` in the layout of ``other``, which has its shape."""
    return x.contiguous() if other.is_contiguous() else x.contiguous(memory_format=_CHANNELS_LAST[x.dim()])


def _shape(x: Tensor) -> tuple[int, int, int, int]:
    """(outer, channels, inner) as the compiled kernels see a dense tensor, and how many threads they may use."""
    channels = x.shape[1]
    if x.is_contiguous():
        return x.shape[0], channels, x.numel() // (x.shape[0] * channels), torch.get_num_threads()
    return x.numel() // channels, channels, 1, torch.get_num_threads()


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    """Addresses for the compiled functions; the tensors have to have names, or they are gone before the call."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _cuda_statistics(x: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps) in the type that the CUDA kernels compute in."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return statistics.mean.to(dtype), statistics.invstd.to(dtype)


def _load_compiled() -> ctypes.CDLL:
    name = "horovod_megdet.layers._batch_norm_cpu"
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise ImportError(f"{name} is not compiled: run 'make setup', or 'pip install -e .' in the checkout")
    library = ctypes.CDLL(found.origin)
    tensor, number, length = ctypes.c_void_p, ctypes.c_double, ctypes.c_ssize_t
    shape = [length, length, length, ctypes.c_int]
    arguments = {
        "moments": [tensor, *shape, tensor],
        "sums": [tensor] * 3 + shape + [tensor],
        "statistics": [tensor, number, length, tensor],
        "update_running": [tensor, number, length, tensor, tensor],
        "normalise": [tensor] * 4 + shape + [tensor],
        "gradient_sums": [tensor] * 3 + shape + [tensor],
        "input_gradient": [tensor] * 5 + shape + [tensor],
    }
    for function, types in arguments.items():
        compiled = getattr(library, f"megdet_{function}")
        compiled.argtypes, compiled.restype = types, None
    return library


_compiled = _load_compiled()
