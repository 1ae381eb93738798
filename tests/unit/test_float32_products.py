"""Products of 16-bit values in float32 are the exact ones, rounded; forward and backward."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from horovod_megdet.layers.float32_products import use_float32_products

SEED = 0
CONVOLUTIONS = {
    "plain": {},
    "stride": {"stride": 2, "padding": [1, 2]},
    "dilated": {"dilation": [2, 2]},
    "groups": {"groups": 4},
}


@pytest.fixture(autouse=True)
def _products() -> Iterator[None]:
    use_float32_products()
    yield
    use_float32_products.cache_clear()  # nothing else keeps the library, so that PyTorch's own products come back


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("arguments", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions(arguments: dict[str, Any], bias: bool, layout: torch.memory_format, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(2, 8, 13, 17, generator=generator).to(memory_format=layout)
    weight = torch.randn(12, 8 // arguments.get("groups", 1), 3, 3, generator=generator)
    inputs = [x, weight, *([torch.randn(12, generator=generator)] if bias else [])]
    y = compare(lambda *tensors: F.conv2d(*tensors, **arguments), inputs, dtype)
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(SEED)
    shapes = [(40, 96), (24, 96), *([(24,)] if bias else [])]
    compare(F.linear, [torch.randn(shape, generator=generator) for shape in shapes], dtype)


def compare(function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The output under autocast, after a comparison of it and of all gradients with the exact ones, rounded."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    exact_leaves = [tensor.to(dtype).double().requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", dtype):
        y = function(*leaves)
    assert y.dtype == dtype
    y_gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(SEED + 1)).to(dtype)
    found = [y, *torch.autograd.grad(y, leaves, y_gradient)]
    exact_y = function(*exact_leaves)
    exact = [exact_y, *torch.autograd.grad(exact_y, exact_leaves, y_gradient.double())]
    for tensor, reference in zip(found, exact, strict=True):
        # Sums in float32 that come to lie on the other side of the middle between two values of the type are rare.
        assert (tensor.double() != reference.to(dtype).double()).double().mean() < 0.02
        torch.testing.assert_close(tensor.double(), reference, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    return y


def test_without_autocast_nothing_changes() -> None:
    generator = torch.Generator().manual_seed(SEED)
    x, kernels, matrix = (torch.randn(shape, generator=generator) for shape in [(1, 4, 9, 9), (4, 4, 3, 3), (2, 9)])
    outputs = F.conv2d(x, kernels), F.linear(x, matrix)
    use_float32_products.cache_clear()
    assert all(map(torch.equal, outputs, (F.conv2d(x, kernels), F.linear(x, matrix))))
