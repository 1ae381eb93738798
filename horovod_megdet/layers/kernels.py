"""The local arithmetic of batch normalisation. Nothing in here communicates.

Tensors of activations are (N, C, *); statistics and sums are (C,) float64. On CUDA these are PyTorch's own kernels for
synchronised batch normalisation. PyTorch has none for the CPU: there ``batch_norm_cpu.c`` does it for float32 and for
16-bit types, which are widened, in memory of either dense layout, and plain operators do it for float64.
"""

import ctypes
import importlib.util

import torch
from torch import Tensor

_TINY = 1e-12


def sums(x: Tensor) -> Tensor:
    """Returns ``[n, sum x, sum x^2]`` over everything but the channels: (2C+1,) float64, n the values per channel."""
    channels = x.shape[1]
    message = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    count = x.numel() // channels
    if count == 0:
        return message
    message[0] = count
    moments = message[1:].view(2, channels)
    if x.is_cuda:
        mean, invstd = torch.batch_norm_stats(_dense(x), _TINY)
        mean, var = mean.double(), (invstd.double().pow(-2) - _TINY).clamp_min(0)
        torch.stack([mean, var + mean.square()], out=moments).mul_(count)
    else:
        _sums(x, x, None, moments)
    return message


def squared_differences(x: Tensor, mean: Tensor) -> Tensor:
    """Returns ``sum (x - mean)^2`` per channel in float64; ``mean`` is (C,) float64."""
    if x.numel() == 0:
        return torch.zeros_like(mean)
    if x.is_cuda:
        return (x.double() - per_channel(mean, x)).square_().sum(_all_but_channels(x))
    first, second = _sums(x, x, mean, mean.new_empty(2, len(mean)))
    # sum (x - m)^2 = sum x (x - m) - m sum (x - m)
    return second - mean * (first - mean * (x.numel() // x.shape[1]))


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor) -> Tensor:
    """Returns ``weight * (x - mean) * invstd + bias`` in the type of ``x``."""
    if x.numel() == 0:
        return torch.empty_like(x)
    if x.is_cuda:
        statistics = _cuda_statistics(x, mean, invstd)
        # The kernel takes eps beside 1 / sqrt(var + eps), and does not use it.
        weight, bias = _like(weight, statistics[0]), _like(bias, statistics[0])
        return torch.batch_norm_elemt(_dense(x), weight, bias, *statistics, 0.0)
    if x.dtype == torch.float64:
        y = (x - per_channel(mean, x)) * per_channel(invstd, x)
        y = y if weight is None else y * per_channel(weight, x)
        return y if bias is None else y + per_channel(bias, x)
    wide = _dense(x.float())
    y, vectors = torch.empty_like(wide), wide.new_empty(3 * len(mean))
    weight, bias = _like(weight, wide), _like(bias, wide)
    _compiled.megdet_normalise(*_pointers(wide, mean, invstd, weight, bias), *_shape(wide), *_pointers(vectors, y))
    return y.to(x.dtype)


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """Returns ``[sum dy, sum dy * xhat]``, the gradients of bias and weight: (2, C) float64.

    xhat is the normalised x before weight and bias.
    """
    if x.numel() == 0:
        return mean.new_zeros(2, len(mean))
    if x.is_cuda:
        first, second, _, _ = torch.batch_norm_backward_reduce(
            _dense(dy), _dense(x), *_cuda_statistics(x, mean, invstd), None, True, False, False
        )
        result = torch.stack([first, second]).double()
    else:
        result = _sums(dy, x, mean, mean.new_empty(2, len(mean)))
    result[1].mul_(invstd)
    return result


def input_gradient(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, total: Tensor, count: Tensor
) -> Tensor:
    """Returns ``dx = weight * invstd * (dy - sum dy / M - xhat * sum(dy * xhat) / M)`` in the type of ``x``.

    ``total`` is ``[sum dy, sum dy * xhat]`` over all ranks, (2, C) float64; ``count`` is M, the values per channel over
    all ranks, () float64.
    """
    if x.numel() == 0:
        return torch.zeros_like(x)
    if x.is_cuda:
        statistics = _cuda_statistics(x, mean, invstd)
        sums_of_all = total[0].to(statistics[0]), (total[1] / invstd).to(statistics[0])
        weight = _like(weight, statistics[0])
        return torch.batch_norm_backward_elemt(
            _dense(dy), _dense(x), *statistics, weight, *sums_of_all, count.to(torch.int32).view(1)
        )
    if x.dtype == torch.float64:
        xhat = (x - per_channel(mean, x)) * per_channel(invstd, x)
        mean_dy, mean_dy_xhat = (per_channel(values, x) for values in total / count)
        scale = invstd if weight is None else weight * invstd
        return per_channel(scale, x) * (dy - mean_dy - xhat * mean_dy_xhat)
    wide = _dense(x.float())
    dy, dx, vectors = _as_laid_out(dy.float(), wide), torch.empty_like(wide), wide.new_empty(4 * len(mean))
    weight = _like(weight, wide)
    _compiled.megdet_input_gradient(
        *_pointers(dy, wide, mean, invstd, weight, total),
        float(count),
        *_shape(wide),
        *_pointers(vectors, dx),
    )
    return dx.to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 if it is of a 16-bit type, else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) values in a shape that broadcasts over ``x`` (N, C, *)."""
    return values.view(-1, *(1,) * (x.dim() - 2))


def _sums(a: Tensor, b: Tensor, centre: Tensor | None, result: Tensor) -> Tensor:
    """Writes ``[sum a, sum a * (b - centre)]`` per channel to ``result``, (2, C) float64, and returns it."""
    if b.dtype == torch.float64:
        difference = b if centre is None else b - per_channel(centre, b)
        return torch.stack([a.sum(_all_but_channels(b)), (a * difference).sum(_all_but_channels(b))], out=result)
    b = _dense(b.float())
    a = _as_laid_out(a.float(), b)
    _compiled.megdet_sums(*_pointers(a, b, centre), *_shape(b), *_pointers(result))
    return result


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
    """Addresses for the compiled kernels; the tensors have to have names, or they are gone before the call."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _cuda_statistics(x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps) in the type that the CUDA kernels compute in."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return mean.to(dtype), invstd.to(dtype)


def _load_compiled() -> ctypes.CDLL:
    name = "horovod_megdet.layers._batch_norm_cpu"
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise ImportError(f"{name} is not compiled: run 'make setup', or 'pip install -e .' in the checkout")
    library = ctypes.CDLL(found.origin)
    tensor, shape = ctypes.c_void_p, [ctypes.c_ssize_t] * 3 + [ctypes.c_int]
    library.megdet_sums.argtypes = [tensor] * 3 + shape + [tensor]
    library.megdet_normalise.argtypes = [tensor] * 5 + shape + [tensor] * 2
    library.megdet_input_gradient.argtypes = [tensor] * 6 + [ctypes.c_double] + shape + [tensor] * 2
    for function in (library.megdet_sums, library.megdet_normalise, library.megdet_input_gradient):
        function.restype = None
    return library


_compiled = _load_compiled()
