"""The CUDA kernels of batch normalization against the plain operators in float64.

The kernels compute in float32 (float64 for float64 input), whose unit is u. A variance loses by its condition number
kappa = sqrt(1 + (mean / std)^2) (Chan and Lewis 1979), and so does all that is computed from x - mean. The sums of
millions of values take few roundings in sequence, so that C kappa u with C = 32 holds for everything; an output of 16
bits is rounded once more, to its own type. The message to the other ranks has sums of squares, from which the variance
comes with kappa^2 units of float64.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from horovod_megdet.layers.kernels import PlainKernels, Statistics, kernels_for

C = 32
EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = {
    "2d": (6, 5),
    "2d, one channel": (300, 1),
    "3d": (4, 3, 9),
    "4d": (3, 37, 17, 13),
    "4d, 1 x 1": (8, 33, 1, 1),
    "4d, one channel": (2, 1, 9, 8),
    "4d, one image": (1, 2050, 7, 7),
    "4d, wide": (2, 3, 1, 4099),
    "5d": (2, 7, 3, 4, 5),
}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "neither": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}
MEANS = {"small mean": 0.5, "large mean": 1000.0}


def bound(dtype: torch.dtype, mean: float) -> float:
    """Relative error of what is computed in the kernels' own type from values with ``mean``, in their deviations."""
    unit, kappa = torch.finfo(torch.promote_types(dtype, torch.float32)).eps, math.hypot(1, mean)
    return C * (unit * kappa + torch.finfo(torch.float64).eps * kappa**2)


def output_bound(dtype: torch.dtype, mean: float) -> float:
    """The same for what is rounded to ``dtype``."""
    return bound(dtype, mean) + torch.finfo(dtype).eps


def error(value: Tensor, reference: Tensor, scale: Tensor | None = None) -> float:
    """Largest error, relative to the largest value of ``scale`` (of the reference, if None); infinite for a NaN."""
    scale = reference if scale is None else scale
    difference = (value.double() - reference.to(value.device)).abs().max() / scale.abs().max().to(value.device)
    return float(difference.nan_to_num(nan=math.inf))


class Example:
    """Input, gradient, parameters and what the plain operators make of them, in float64."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, mean: float, device: torch.device | str) -> None:
        generator = torch.Generator(device).manual_seed(5)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        channels = shape[1]
        # wider than the type's resolution at the mean
        deviation = 1.5 + 4 * torch.finfo(dtype).eps * mean
        self.x, self.dy = (random(*shape) * deviation + mean).to(dtype), random(*shape).to(dtype)
        self.weight, self.bias = random(channels).abs() + 0.5, random(channels)
        plain, x, dy = PlainKernels(), self.x.double(), self.dy.double()
        self.sums = plain.sums(x)
        self.statistics = plain.statistics(self.sums, EPS)
        _, self.total = plain.gradient_sums(dy, x, self.statistics)
        self.scales = torch.stack([dy.abs().sum(self._dimensions()), self._products(x, dy).sum(self._dimensions())])

    def _products(self, x: Tensor, dy: Tensor) -> Tensor:
        xhat = PlainKernels().normalize(x, None, None, self.statistics)
        return xhat.mul_(dy).abs_()

    def _dimensions(self) -> list[int]:
        return [0, *range(2, self.x.dim())]

    def normalized(self, affine: bool) -> Tensor:
        """The output."""
        parameters = (self.weight.double(), self.bias.double()) if affine else (None, None)
        return PlainKernels().normalize(self.x.double(), *parameters, self.statistics)

    def input_gradient(self, affine: bool) -> Tensor:
        """The gradient of the input, where this rank's input is half of the group's."""
        weight = self.weight.double() if affine else None
        return PlainKernels().input_gradient(self.dy.double(), self.x.double(), weight, self.of_two, 2 * self.total)

    @property
    def of_two(self) -> Statistics:
        """Statistics of two ranks with this input."""
        values = self.statistics.values.clone()
        values[0] *= 2
        return Statistics(values)


def errors(example: Example, device: torch.device, layout: Any, affine: bool) -> dict[str, tuple[float, float]]:
    """Error and its bound, by function. Each function gets what the reference computed before it."""
    x, dy = (layout(each.to(device)) for each in (example.x, example.dy))
    weight, bias = (each.to(device) if affine else None for each in (example.weight, example.bias))
    statistics, of_two = (Statistics(each.values.to(device)) for each in (example.statistics, example.of_two))
    kernels = kernels_for(x)
    mean = float((example.statistics.mean.abs() / example.statistics.var.sqrt()).max())
    tight, loose = bound(x.dtype, mean), output_bound(x.dtype, mean)
    found = kernels.statistics(kernels.sums(x), EPS)
    assert found.values.dtype == torch.float64
    assert found.count == x.numel() // x.shape[1]
    _, sums = kernels.gradient_sums(dy, x, statistics)
    y = kernels.normalize(x, weight, bias, statistics)
    dx = kernels.input_gradient(dy, x, weight, of_two, 2 * example.total.to(device))
    assert y.shape == dx.shape == x.shape
    assert y.dtype == dx.dtype == x.dtype
    deviation, running = example.statistics.var.sqrt(), torch.ones_like(example.bias)
    buffers, references = [running.to(device).clone() for _ in range(2)], [running.clone() for _ in range(2)]
    kernels.update_running(*buffers, statistics, 0.1)
    PlainKernels().update_running(*references, example.statistics, 0.1)
    return {
        # of the mean in units of the deviation, which is what an output is off by
        "mean": (float(((found.mean.to(deviation) - example.statistics.mean) / deviation).abs().max()), tight),
        "var": (float((found.var.to(deviation) / example.statistics.var - 1).abs().max()), tight),
        "squared differences": (
            error(
                kernels.squared_differences(x, statistics.mean),
                example.statistics.var * example.statistics.count,
            ),
            tight,
        ),
        # the buffers are float32
        "running mean": (error(buffers[0], references[0].double()), bound(torch.float32, mean)),
        "running var": (error(buffers[1], references[1].double()), bound(torch.float32, mean)),
        "sum dy": (error(sums[0], example.total[0], example.scales[0]), tight),
        "sum dy xhat": (error(sums[1], example.total[1], example.scales[1]), tight),
        "y": (error(y, example.normalized(affine)), loose),
        "dx": (error(dx, example.input_gradient(affine)), loose),
    }


def exceeded(found: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """What is not within its bound, NaN included."""
    return {name: each for name, each in found.items() if not each[0] <= each[1]}


@pytest.mark.parametrize("mean", MEANS.values(), ids=MEANS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_agree_with_plain_operators(device: torch.device, dtype: torch.dtype, mean: float) -> None:
    wrong = {}
    for shape_name, shape in SHAPES.items():
        example = Example(shape, dtype, mean, "cpu")
        for layout_name, layout in LAYOUTS.items():
            for affine in (True, False):
                found = exceeded(errors(example, device, layout, affine))
                if found:
                    wrong[shape_name, layout_name, affine] = found
    assert not wrong


@pytest.mark.parametrize("mean", MEANS.values(), ids=MEANS.keys())
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_many_values(device: torch.device, layout: str, mean: float) -> None:
    """2.56 million values a channel. The plain operators compute where the kernels do: the CPU would take minutes."""
    shape = (16, 64, 400, 400) if device.type == "cuda" else (16, 4, 100, 100)
    example = Example(shape, torch.float32, mean, device)
    assert not exceeded(errors(example, device, LAYOUTS[layout], affine=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_and_input_in_different_layouts(device: torch.device, dtype: torch.dtype) -> None:
    example = Example((3, 37, 17, 13), dtype, 0.5, "cpu")
    statistics = Statistics(example.of_two.values.to(device))
    one, other = LAYOUTS["contiguous"], LAYOUTS["channels last"]
    for of_x, of_dy in ((one, other), (other, one)):
        x, dy = of_x(example.x.to(device)), of_dy(example.dy.to(device))
        _, sums = kernels_for(x).gradient_sums(dy, x, statistics)
        dx = kernels_for(x).input_gradient(dy, x, None, statistics, 2 * example.total.to(device))
        assert error(sums[0], example.total[0], example.scales[0]) <= bound(dtype, 0.5)
        assert error(sums[1], example.total[1], example.scales[1]) <= bound(dtype, 0.5)
        assert error(dx, example.input_gradient(affine=False)) <= output_bound(dtype, 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_input(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.full((4, 3, 50, 50), 3.0, dtype=dtype, device=device)
    statistics = kernels_for(x).statistics(kernels_for(x).sums(x), EPS)
    unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert (statistics.mean - 3).abs().max() <= C * 3 * unit
    assert statistics.var.max() <= (C * 3 * unit) ** 2 + 1e-18
    assert kernels_for(x).normalize(x, None, None, statistics).isfinite().all()


def test_infinities_and_nan_are_not_lost(device: torch.device) -> None:
    for bad in (math.inf, math.nan):
        x = torch.ones(2, 3, 4, 4, device=device)
        x[0, 1, 2, 2] = bad
        statistics = kernels_for(x).statistics(kernels_for(x).sums(x), EPS)
        finite = statistics.mean.isfinite() & statistics.var.isfinite()
        assert finite.tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5, 5), (2, 3, 0, 5), (0, 3, 2, 2, 2)], ids=str)
def test_a_rank_without_input(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.zeros(shape, dtype=dtype, device=device), torch.ones(3, device=device)
    kernels = kernels_for(x)
    assert kernels.sums(x).tolist() == [0.0] * 7
    assert kernels.sums(x).device.type == device.type
    message = torch.tensor([2.0, 2, 4, 6, 10, 10, 20], dtype=torch.float64, device=device)
    statistics = kernels.statistics(message, eps=0.0)
    assert statistics.mean.tolist() == [1, 2, 3]
    assert statistics.var.tolist() == [4, 1, 1]
    assert kernels.squared_differences(x, statistics.mean).tolist() == [0.0] * 3
    _, total = kernels.gradient_sums(x, x, statistics)
    assert total.tolist() == [[0.0] * 3] * 2
    for result in (
        kernels.normalize(x, weight, None, statistics),
        kernels.input_gradient(x, x, weight, statistics, total),
    ):
        assert (result.shape, result.dtype, result.device) == (x.shape, x.dtype, x.device)
