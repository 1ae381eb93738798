"""CrossGPUBatchNorm in one process: alone, and as one of two ranks with the same data."""

import copy
import importlib.util
from typing import Any
from unittest import mock

import pytest
import torch
from operators import Operators
from torch import Tensor, nn

from horovod_megdet import comm
from horovod_megdet.errors import UserError
from horovod_megdet.layers import c_library
from horovod_megdet.layers.cross_gpu_bn import (
    CrossGPUBatchNorm,
    average_running_statistics,
    convert_batch_norm,
    revert_batch_norm,
)
from horovod_megdet.layers.kernels import PlainKernels, Rectifier, Statistics, kernels_for
from horovod_megdet.layers.recomputation import recomputed

PAIR = comm.Group((0, 1), None)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
FOLLOWED = {"alone": (False, False), "relu": (False, True), "shortcut": (True, False), "both": (True, True)}
"""What follows the normalization: a shortcut, a ReLU."""

followed = pytest.mark.parametrize(("shortcut", "relu"), FOLLOWED.values(), ids=FOLLOWED)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels last"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _network() -> nn.Module:
    shared = nn.BatchNorm2d(4)
    return nn.ModuleDict(
        {
            "first": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=None)),
            "line": nn.BatchNorm1d(5, affine=False),
            "volume": nn.BatchNorm3d(2, track_running_stats=False),
            "shared": nn.ModuleList([shared, shared]),
        }
    )


def test_conversion_keeps_parameters_buffers_keys_dtype_and_mode() -> None:
    network = _network().double()
    network["line"].eval()
    before = dict(network.state_dict(keep_vars=True))
    assert convert_batch_norm(network, path="net") is network
    after = network.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is value for name, value in before.items())
    layer = network["first"][1]
    assert isinstance(layer, CrossGPUBatchNorm)
    assert (layer.eps, layer.momentum, layer.message_name) == (1e-3, None, "cgbn.net.first.1.4")
    assert layer.training
    assert not network["line"].training
    assert network["shared"][0] is network["shared"][1]


def test_reverting_restores_the_original_layer_types() -> None:
    original = _network()
    network = revert_batch_norm(convert_batch_norm(copy.deepcopy(original)))
    assert [type(module) for module in network.modules()] == [type(module) for module in original.modules()]
    network.load_state_dict(original.state_dict())
    assert repr(network) == repr(original)
    assert isinstance(revert_batch_norm(convert_batch_norm(nn.BatchNorm1d(3))), nn.BatchNorm1d)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_one_rank_equals_plain_batch_norm_to_the_bit(options: dict[str, bool | None]) -> None:
    plain = nn.BatchNorm2d(3, **options)
    layer = convert_batch_norm(copy.deepcopy(plain))
    x = torch.randn(4, 3, 5, 5)
    for training in (True, True, False):
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, reference = layer.train(training)(ours), plain.train(training)(theirs)
        y.square().sum().backward()
        reference.square().sum().backward()
        assert torch.equal(y, reference)
        assert torch.equal(ours.grad, theirs.grad)
    assert all(torch.equal(layer.get_buffer(name), buffer) for name, buffer in plain.named_buffers())


@pytest.mark.usefixtures("twins")
@pytest.mark.parametrize("algorithm", ["one_pass", "two_pass"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mean", [0.0, 20.0, 1e4])
def test_two_equal_ranks_equal_one_process_with_twice_the_batch(
    algorithm: str, layout: torch.memory_format, mean: float
) -> None:
    plain = nn.BatchNorm2d(3).double()
    layer = convert_batch_norm(copy.deepcopy(plain).float(), group=PAIR, algorithm=algorithm)
    x, dy = (torch.randn(2, 3, 9, 8) + mean).to(memory_format=layout), torch.randn(2, 3, 9, 8)
    ours, theirs = x.clone().requires_grad_(), torch.cat([x, x]).double().requires_grad_()
    y, reference = layer(ours), plain(theirs)
    y.backward(dy)
    reference.backward(torch.cat([dy, dy]).double())
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y.double(), reference[:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad.double(), theirs.grad[:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(2 * layer.weight.grad.double(), plain.weight.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.running_mean.double(), plain.running_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer.running_var.double(), plain.running_var, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("twins")
def test_a_second_derivative_is_refused() -> None:
    layer = CrossGPUBatchNorm(2, group=PAIR)
    x = torch.randn(3, 2, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice.*once_differentiable"):
        gradient.sum().backward()


@pytest.mark.usefixtures("twins")
def test_an_input_without_gradient_needs_no_message_in_the_backward_pass() -> None:
    layer = CrossGPUBatchNorm(2, group=PAIR)
    y = layer(torch.randn(3, 2, 4, 4))
    with mock.patch.object(comm, "sum_", side_effect=AssertionError):
        y.square().sum().backward()
    assert layer.weight.grad is not None


def test_evaluation_does_not_communicate() -> None:
    with mock.patch.object(comm, "sum_", side_effect=AssertionError):
        for tracks in (True, False):
            layer = CrossGPUBatchNorm(2, track_running_stats=tracks, group=PAIR).eval()
            plain = nn.BatchNorm2d(2, track_running_stats=tracks).eval()
            x = torch.randn(3, 2, 4, 4)
            assert torch.equal(layer(x), plain(x))


def test_wrong_arguments_are_errors() -> None:
    with pytest.raises(ValueError, match="one_pass or two_pass"):
        CrossGPUBatchNorm(2, algorithm="three_pass")
    with pytest.raises(ValueError, match=r"\(N, 2, \*\), got \(1, 3\)"):
        CrossGPUBatchNorm(2)(torch.zeros(1, 3))
    with (
        mock.patch.object(comm, "sum_", lambda tensor, name, group: tensor),
        pytest.raises(ValueError, match="more than one value per channel in the group, got 1"),
    ):
        CrossGPUBatchNorm(2, group=PAIR)(torch.zeros(1, 2))


def test_averaging_running_statistics_over_one_rank_changes_nothing() -> None:
    layer = nn.BatchNorm2d(2)
    layer(torch.randn(3, 2, 4, 4))
    before = layer.running_var.clone()
    average_running_statistics(layer)
    assert torch.equal(layer.running_var, before)


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 9), (2, 3, 9, 8), (2, 3, 5, 6, 7), (2, 3, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 100).to(dtype)
    rows: Tensor = x.double().movedim(1, -1).reshape(-1, 3)
    expected = torch.cat([torch.tensor([len(rows)]), rows.sum(0), rows.square().sum(0)])
    # tight enough for the variance, a small difference of large numbers
    torch.testing.assert_close(kernels_for(x).sums(x), expected, rtol=1e-8, atol=0)


def test_a_rank_without_input_adds_nothing() -> None:
    x, weight = torch.zeros(0, 3, 4), torch.ones(3)
    kernels = kernels_for(x)
    assert kernels.sums(x).tolist() == [0.0] * 7
    assert kernels.squared_differences(x, torch.ones(3, dtype=torch.float64)).tolist() == [0.0] * 3
    statistics = kernels.statistics(torch.tensor([2.0, 2, 4, 6, 10, 10, 20], dtype=torch.float64), eps=0.0)
    assert statistics.mean.tolist() == [1, 2, 3]
    assert statistics.var.tolist() == [4, 1, 1]
    _, total = kernels.gradient_sums(x, x, statistics)
    assert total.tolist() == [[0.0] * 3] * 2
    assert kernels.normalize(x, weight, None, statistics).shape == x.shape
    assert kernels.input_gradient(x, x, weight, statistics, total).shape == x.shape


# channels last with many rows, and many pixels of a channel, are added up in parts
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((6, 3), torch.contiguous_format),
        ((2, 35, 9, 8), torch.contiguous_format),
        ((2, 35, 9, 8), torch.channels_last),
        ((2, 3, 5, 6, 7), torch.contiguous_format),
        ((2, 3, 5, 6, 7), torch.channels_last_3d),
        ((2, 19, 31, 37), torch.contiguous_format),
        ((2, 19, 31, 37), torch.channels_last),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [True, False])
@followed
def test_compiled_kernels_agree_with_plain_operators_in_float64(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, affine: bool, shortcut: bool, relu: bool
) -> None:
    tensors = (torch.randn(shape) * 2 + 3, torch.randn(shape), torch.randn(shape) - 1)
    x, dy, other = (each.to(dtype).contiguous(memory_format=layout) for each in tensors)
    other, channels = other if shortcut else None, shape[1]
    weight, bias = torch.randn(2, channels) if affine else (None, None)
    running = torch.randn(channels), torch.rand(channels)
    assert kernels_for(x).fuses
    results = []
    for kernels, wide in ((kernels_for(x), dtype), (PlainKernels(), torch.float64)):
        x, dy, other = x.to(wide), dy.to(wide), None if other is None else other.to(wide)
        statistics = kernels.statistics(kernels.sums(x), eps=1e-3)
        mean, var = (buffer.to(torch.promote_types(wide, torch.float32), copy=True) for buffer in running)
        kernels.update_running(mean, var, statistics, factor=0.1)
        y = kernels.normalize(x, weight, bias, statistics, other, relu)
        rectifier = Rectifier(y, weight, bias, shortcut) if relu else None
        dz, total = kernels.gradient_sums(dy, x, statistics, rectifier)
        dx = kernels.input_gradient(dz, x, weight, statistics, total, rectifier)
        differences = kernels.squared_differences(x, statistics.mean)
        behind = [dz] if shortcut else []
        results.append([statistics.values, mean, var, differences, total, y, dx, *behind])
    for ours, reference in zip(*results, strict=True):
        half = ours.dtype in (torch.bfloat16, torch.float16)
        torch.testing.assert_close(ours.double(), reference.double(), rtol=1e-2 if half else 1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mean", [0.1, 1e4, 3e7])
def test_squared_differences_do_not_cancel(mean: float, layout: torch.memory_format) -> None:
    """Of channels with one value that is one bit off, far from zero, and from a mean that is no float32 number."""
    x = torch.full((2, 3, 33, 31), mean).contiguous(memory_format=layout)
    x[0, :, 4, 5] = torch.nextafter(x[0, :, 4, 5], torch.tensor(torch.inf))
    mean_of_ranks = x.double().mean((0, 2, 3)) - 1e-9 * mean
    ours, reference = (kernels.squared_differences(x, mean_of_ranks) for kernels in (kernels_for(x), PlainKernels()))
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=0)


def test_a_checkout_without_compiled_kernels_says_what_to_do_when_they_are_needed() -> None:
    c_library.library.cache_clear()
    with (
        mock.patch.object(importlib.util, "find_spec", return_value=None),
        pytest.raises(UserError, match=r"_cpu is not compiled.*make setup"),
    ):
        kernels_for(torch.ones(1)).sums(torch.ones(2, 3))


@layouts
@followed
def test_the_number_of_threads_changes_no_bit_and_the_layout_is_kept(
    layout: torch.memory_format, shortcut: bool, relu: bool
) -> None:
    # with channels last 1036 rows are two whole parts and some of a third
    x, dy, other = (torch.randn(4, 19, 7, 37).contiguous(memory_format=layout) for _ in range(3))
    mean, var, weight = torch.randn(19).double(), torch.rand(19).double() + 0.5, torch.randn(19)
    statistics = Statistics.of(torch.tensor(1036.0).double(), mean, var, eps=0.1)
    kernels, before = kernels_for(x), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            y = kernels.normalize(x, weight, None, statistics, other if shortcut else None, relu)
            rectifier = Rectifier(y, weight, None, shortcut) if relu else None
            dz, total = kernels.gradient_sums(dy, x, statistics, rectifier)
            dx = kernels.input_gradient(dz, x, weight, statistics, total, rectifier)
            results.append((kernels.sums(x), total, dz, y, dx))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert all(each.is_contiguous(memory_format=layout) for each in results[0][2:])
    exact = (x.double() - mean.view(-1, 1, 1)) * (statistics.invstd * weight).view(-1, 1, 1)
    exact = exact + other if shortcut else exact
    torch.testing.assert_close(results[0][3].double(), exact.relu() if relu else exact, rtol=1e-5, atol=1e-6)


def _gradients(
    layer: CrossGPUBatchNorm, x: Tensor, other: Tensor | None, relu: bool, dy: Tensor, fused: bool
) -> list[Tensor | None]:
    """Output and gradients, where the layer does what follows it, or separate operators do."""
    x, other = x.clone().requires_grad_(), None if other is None else other.clone().requires_grad_()
    if fused:
        y = layer(x, other, relu)
    else:
        y = layer(x)
        y = y if other is None else y + other
        y = y.relu() if relu else y
    y.backward(dy)
    return [y.detach(), x.grad, None if other is None else other.grad, layer.weight.grad, layer.bias.grad]


@pytest.mark.usefixtures("twins")
@layouts
@followed
@pytest.mark.parametrize("algorithm", ["one_pass", "two_pass"])
def test_what_follows_changes_no_bit_in_float32(
    layout: torch.memory_format, shortcut: bool, relu: bool, algorithm: str
) -> None:
    x, other, dy = (torch.randn(3, 19, 31, 37).contiguous(memory_format=layout) for _ in range(3))
    layer = CrossGPUBatchNorm(19, group=PAIR, algorithm=algorithm)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    twin = copy.deepcopy(layer)
    fused = _gradients(layer, x, other if shortcut else None, relu, dy, fused=True)
    separate = _gradients(twin, x, other if shortcut else None, relu, dy, fused=False)
    for ours, reference in zip(fused, separate, strict=True):
        assert (ours is None) == (reference is None)
        assert ours is None or torch.equal(ours, reference)
    assert all(torch.equal(layer.get_buffer(name), buffer) for name, buffer in twin.named_buffers())
    assert not relu or (fused[0] == 0).float().mean() > 0.1


@pytest.mark.usefixtures("twins")
@pytest.mark.parametrize("layer_options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_follows_in_other_kinds_of_layers(layer_options: dict[str, Any], dtype: torch.dtype) -> None:
    reference = nn.BatchNorm2d(3, **layer_options).double()
    layer = convert_batch_norm(copy.deepcopy(reference).to(dtype), group=PAIR)
    x, other, dy = (torch.randn(2, 3, 9, 8, dtype=dtype) for _ in range(3))
    ours, shortcut = x.clone().requires_grad_(), other.clone().requires_grad_()
    y = layer(ours, shortcut, relu=True)
    y.backward(dy)
    theirs, second = (torch.cat([each, each]).double().requires_grad_() for each in (x, other))
    whole = (reference(theirs) + second).relu()
    whole.backward(torch.cat([dy, dy]).double())
    for one, two in ((y, whole), (ours.grad, theirs.grad), (shortcut.grad, second.grad)):
        torch.testing.assert_close(one.double(), two[:2], rtol=1e-5, atol=1e-5)


@layouts
@followed
def test_one_rank_alone_takes_what_follows_into_the_same_passes(
    layout: torch.memory_format, shortcut: bool, relu: bool
) -> None:
    """In evaluation, and with recomputation too."""
    reference = nn.BatchNorm2d(3).double()
    layer = convert_batch_norm(copy.deepcopy(reference).float(), group=comm.Group((0,), None))
    twin = copy.deepcopy(layer)
    x, other, dy = (torch.randn(2, 3, 9, 8).contiguous(memory_format=layout) for _ in range(3))
    other = other if shortcut else None
    for training in (True, False):
        wide = None if other is None else other.double()
        ours = _gradients(layer.train(training), x, other, relu, dy, fused=True)
        theirs = _gradients(reference.train(training), x.double(), wide, relu, dy.double(), fused=False)
        for one, two in zip(ours, theirs, strict=True):
            assert one is two or torch.allclose(one.double(), two, rtol=1e-5, atol=1e-5)
        again = x.clone().requires_grad_()
        recomputed(lambda x: twin.train(training)(x, other, relu), again).backward(dy)  # noqa: B023
        assert torch.equal(again.grad, ours[1])
    assert all(torch.equal(twin.get_buffer(name), buffer) for name, buffer in layer.named_buffers())
    with Operators() as operators:
        _gradients(layer.train(), x, other, relu, dy, fused=True)
    assert bool(operators.named("native_batch_norm")) == (not shortcut and not relu)


@pytest.mark.usefixtures("twins")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@layouts
def test_nothing_of_the_size_of_the_activations_is_copied_or_computed_outside_the_kernels(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x, other, dy = (torch.randn(4, 6, 9, 8).to(dtype).contiguous(memory_format=layout) for _ in range(3))
    x.requires_grad_()
    other.requires_grad_()
    layer = CrossGPUBatchNorm(6, group=PAIR)
    with Operators() as operators:
        layer(x, other, relu=True).backward(dy)
    made = [name for name in operators.of_size(x.numel()) if "detach" not in name and "view" not in name]
    # the output, the gradient behind the ReLU, the gradient of the input
    assert made == ["aten.empty_like.default"] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@layouts
def test_sixteen_bits_are_read_and_rounded_as_torch_does(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """All 65,536 patterns, times factors that make rounding, overflow and values below the smallest normal one."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 256, 256)
    factors = torch.tensor([1.0, 1.0078125, -0.3337, 3e-5, 7e4, 1e-39, 1e30])
    x = x.expand(1, len(factors), 256, 256).contiguous(memory_format=layout)
    ones = torch.ones(len(factors), dtype=torch.float64)
    statistics = Statistics.of(torch.tensor(2.0).double(), 0 * ones, ones, eps=0.0)
    y = kernels_for(x).normalize(x, factors, None, statistics)
    expected = (x.float() * factors.view(-1, 1, 1)).to(dtype)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_a_number_passes_the_relu_both_ways(dtype: torch.dtype) -> None:
    x = torch.full((2, 3, 4, 4), torch.nan, dtype=dtype)
    statistics = Statistics.of(torch.tensor(32.0).double(), *torch.ones(2, 3).double(), eps=0.0)
    kernels = kernels_for(x)
    y = kernels.normalize(x, None, None, statistics, relu=True)
    assert y.isnan().all()
    for shortcut in (False, True):
        _, total = kernels.gradient_sums(torch.ones_like(x), x, statistics, Rectifier(y, None, None, shortcut))
        assert total[0].tolist() == [32] * 3


@pytest.mark.usefixtures("twins")
def test_a_shortcut_of_another_type_or_layout_is_taken_and_one_of_another_shape_refused() -> None:
    layer = CrossGPUBatchNorm(3, group=PAIR)
    x = torch.randn(2, 3, 4, 5)
    other = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(x, other, relu=True)
    y.sum().backward()
    assert torch.equal(other.grad, (y > 0).double())
    with pytest.raises(ValueError, match=r"a shortcut of \(2, 3, 4, 5\), got \(3, 4, 5\)"):
        layer(x, other[0])
