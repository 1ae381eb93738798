"""Autocast on processors that are slow with 16-bit types: the same values, multiplied and summed in float32.

Without instructions for bfloat16, oneDNN takes many times as long for a convolution in it as for one in float32
(docs/performance.md), and a run that began on processors with AMX keeps its precision on others. So its products are
computed as AMX computes them, but for the order of the sums: inputs, weights and bias are rounded to 16 bits,
multiplied and summed in float32, and the result is rounded. Autograd does the same with gradients.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = int | list[int]


@functools.cache
def use_float32_products() -> torch.library.Library:
    """Replaces what autocast does with convolutions and linear layers on the CPU, for the rest of the process.

    Outside autocast nothing changes. The library that is returned has to stay alive, which the cache sees to.
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("conv2d", _conv2d, "AutocastCPU")
    library.impl("linear", _linear, "AutocastCPU")
    return library


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        x, weight, bias = _rounded(dtype, x, weight, bias)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups).to(dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        x, weight, bias = _rounded(dtype, x, weight, bias)
        return F.linear(x, weight, bias).to(dtype)


def _rounded(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The nearest values of a 16-bit type, in float32. Layouts stay."""
    return tuple(None if tensor is None else tensor.to(dtype).float() for tensor in tensors)
