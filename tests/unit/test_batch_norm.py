"""CrossGPUBatchNorm in one process: alone, and as one of two ranks with the same data."""

import copy
import importlib.util
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
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
from horovod_megdet.layers.kernels import PlainKernels, Statistics, kernels_for

PAIR = comm.Group((0, 1), None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def twins() -> Iterator[None]:
    """This process is one of two ranks with the same data: each sum is twice its own."""
    with mock.patch.object(comm, "sum_", lambda tensor, name, group=None: tensor.mul_(2)):
        yield


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


@pytest.mark.parametrize("shape", [(6, 3), (2, 35, 9, 8), (2, 3, 5, 6, 7)])
@pytest.mark.parametrize("affine", [True, False])
def test_compiled_kernels_agree_with_plain_operators(shape: tuple[int, ...], affine: bool) -> None:
    x, dy, channels = torch.randn(shape) * 2 + 3, torch.randn(shape), shape[1]
    weight, bias = torch.randn(2, channels) if affine else (None, None)
    running = torch.randn(channels), torch.rand(channels)
    results = []
    for kernels, dtype in ((kernels_for(x), torch.float32), (PlainKernels(), torch.float64)):
        x, dy = x.to(dtype), dy.to(dtype)
        statistics = kernels.statistics(kernels.sums(x), eps=1e-3)
        mean, var = (buffer.to(dtype, copy=True) for buffer in running)
        kernels.update_running(mean, var, statistics, factor=0.1)
        _, total = kernels.gradient_sums(dy, x, statistics)
        y, dx = kernels.normalize(x, weight, bias, statistics), kernels.input_gradient(dy, x, weight, statistics, total)
        differences = kernels.squared_differences(x, statistics.mean)
        results.append([each.double() for each in (statistics.values, mean, var, differences, total, y, dx)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_a_checkout_without_compiled_kernels_says_what_to_do_when_they_are_needed() -> None:
    c_library.library.cache_clear()
    with (
        mock.patch.object(importlib.util, "find_spec", return_value=None),
        pytest.raises(UserError, match=r"_cpu is not compiled.*make setup"),
    ):
        kernels_for(torch.ones(1)).sums(torch.ones(2, 3))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_number_of_threads_changes_no_bit_and_the_layout_is_kept(layout: torch.memory_format) -> None:
    # 19 channels are one whole block of the compiled kernels and part of another
    x, dy = torch.randn(3, 19, 5, 7).contiguous(memory_format=layout), torch.randn(3, 19, 5, 7)
    mean, var, weight = torch.randn(19).double(), torch.rand(19).double() + 0.5, torch.randn(19)
    statistics = Statistics.of(torch.tensor(105.0).double(), mean, var, eps=0.1)
    kernels, before = kernels_for(x), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            _, total = kernels.gradient_sums(dy, x, statistics)
            y = kernels.normalize(x, weight, None, statistics)
            dx = kernels.input_gradient(dy, x, weight, statistics, total)
            results.append((kernels.sums(x), total, y, dx))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    _, _, y, dx = results[0]
    assert y.is_contiguous(memory_format=layout)
    assert dx.is_contiguous(memory_format=layout)
    exact = (x.double() - mean.view(-1, 1, 1)) * (statistics.invstd * weight).view(-1, 1, 1)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
