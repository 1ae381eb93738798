"""RoIAlign in C, in training on the CPU, against torchvision's operator."""

import platform
from typing import Any
from unittest import mock

import pytest
import torch
from operators import Operators
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from horovod_megdet.config import BatchNormConfig, ModelConfig
from horovod_megdet.layers.roi_align import TrainedRoIAlign
from horovod_megdet.models.detector import build_detector

IMAGES, CHANNELS, SIDE = 3, 37, 128  # a whole block of the compiled functions' channels, and part of another
LAYOUTS = (torch.contiguous_format, torch.channels_last)
BOXES = {
    "inside": [[10.0, 12, 60, 90], [3, 3, 20, 9], [40.5, 40.25, 100.75, 70]],
    "at the borders": [[0.0, 0, 128, 128], [0, 0, 8, 8], [120, 120, 128, 128], [0, 60, 128, 64]],
    "across the borders": [[-20.0, -30, 40, 30], [100, 90, 160, 150], [-50, -50, 200, 200]],
    "outside": [[-90.0, -90, -60, -70], [300, 10, 330, 40], [10, 400, 20, 500]],
    "degenerate": [[30.0, 30, 30, 30], [50, 20, 40, 10], [64, 0, 64, 128], [10, 64.5, 90, 64.5]],
    "none": [],
}


pytestmark = pytest.mark.usefixtures("one_thread")


def boxes_of(*kinds: str) -> list[Tensor]:
    """Boxes of these kinds in the first image, none in the second, those inside in the third."""
    first = [box for kind in kinds for box in BOXES[kind]]
    return [torch.tensor(boxes).view(-1, 4) for boxes in (first, [], BOXES["inside"])]


def pooled_and_gradients(kind: type[MultiScaleRoIAlign], boxes: list[Tensor], dtype: torch.dtype, layout: Any) -> Any:
    """The pooled features of all boxes, and the gradients of all levels, for fixed random numbers."""
    pool = kind(["0", "1", "2", "3"], output_size=7, sampling_ratio=2)
    pool.scales, pool.map_levels = [1 / 4, 1 / 8, 1 / 16, 1 / 32], LevelMapper(2, 5, canonical_scale=64)
    generator = torch.Generator().manual_seed(0)
    shapes = [(IMAGES, CHANNELS, SIDE // stride, SIDE // stride - 1) for stride in (4, 8, 16, 32)]
    # values that 16 bits hold as well
    levels = [torch.randint(-64, 65, shape, generator=generator) / 64 for shape in shapes]
    levels = [level.to(dtype).contiguous(memory_format=layout).requires_grad_() for level in levels]
    features = {str(number): level for number, level in enumerate(levels)}
    half = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast("cpu", dtype if half else torch.bfloat16, enabled=half):
        pooled = pool(features, [each.to(torch.promote_types(dtype, torch.float32)) for each in boxes], [])
    gradient = torch.randint(-64, 65, pooled.shape, generator=generator) / 64
    pooled.backward(gradient.to(dtype))
    return pooled.detach(), [level.grad for level in levels]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [*BOXES, "all"])
def test_pooled_features_and_gradients_are_those_of_torchvision_in_float64(kind: str, layout: Any) -> None:
    boxes = boxes_of(*(BOXES if kind == "all" else [kind]))
    ours, gradients = pooled_and_gradients(TrainedRoIAlign, boxes, torch.float32, layout)
    reference, references = pooled_and_gradients(MultiScaleRoIAlign, boxes, torch.float64, layout)
    assert len(ours) == sum(map(len, boxes))
    for one, other in zip([ours, *gradients], [reference, *references], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    assert all(gradient.is_contiguous(memory_format=layout) for gradient in gradients)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere compilers join additions and products")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_are_those_of_torchvision_in_float32(dtype: torch.dtype, layout: Any) -> None:
    boxes = boxes_of(*BOXES)
    ours, gradients = pooled_and_gradients(TrainedRoIAlign, boxes, dtype, layout)
    reference, references = pooled_and_gradients(MultiScaleRoIAlign, boxes, dtype, layout)
    assert ours.dtype == reference.dtype == dtype
    for one, other in zip([ours, *gradients], [reference, *references], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_gradients_are_those_of_finite_differences() -> None:
    """The pooled features are linear in the maps: <gradient, direction> is what a step in that direction changes."""
    pool = TrainedRoIAlign(["0"], output_size=7, sampling_ratio=2)
    pool.scales, pool.map_levels = [1 / 4], LevelMapper(2, 2)
    boxes = boxes_of(*BOXES)
    features, direction = torch.randn(2, IMAGES, 8, 32, 32)
    features.requires_grad_()
    pooled = pool({"0": features}, boxes, [])
    weights = torch.randn(pooled.shape)
    (gradient,) = torch.autograd.grad(pooled, features, weights)
    change = (pool({"0": direction}, boxes, []) * weights).double().sum()
    torch.testing.assert_close((gradient * direction).double().sum(), change, rtol=1e-5, atol=1e-3)


def test_a_box_that_is_not_a_number_pools_nothing() -> None:
    boxes = boxes_of("inside")
    boxes[0][0] = torch.nan
    pool = TrainedRoIAlign(["0"], output_size=7, sampling_ratio=2)
    pool.scales, pool.map_levels = [1 / 4], lambda boxes: torch.zeros(sum(map(len, boxes)), dtype=torch.int64)
    assert pool({"0": torch.ones(IMAGES, 2, 32, 32)}, boxes, [])[:2].amax((1, 2, 3)).tolist() == [0, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_number_of_threads_changes_no_bit(layout: Any) -> None:
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        pooled, gradients = pooled_and_gradients(TrainedRoIAlign, boxes_of(*BOXES), torch.float32, layout)
        results.append([pooled, *gradients])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_a_level_without_gradient_gets_none_and_a_second_derivative_is_refused() -> None:
    pool = TrainedRoIAlign(["0", "1"], output_size=7, sampling_ratio=2)
    pool.scales, pool.map_levels = [1 / 4, 1 / 8], LevelMapper(2, 3, canonical_scale=64)
    fixed, trained = torch.randn(IMAGES, 2, 32, 32), torch.randn(IMAGES, 2, 16, 16, requires_grad=True)
    pooled = pool({"0": fixed, "1": trained}, boxes_of("inside"), [])
    (gradient,) = torch.autograd.grad(pooled.square().sum(), trained, create_graph=True)
    assert fixed.grad is None
    with pytest.raises(RuntimeError, match=r"twice.*once_differentiable"):
        gradient.sum().backward()


def test_too_little_memory_is_an_error() -> None:
    with (
        mock.patch("horovod_megdet.layers.c_library.library", return_value=mock.Mock(megdet_roi_align=lambda *_: 1)),
        pytest.raises(MemoryError, match="no memory for roi_align"),
    ):
        pooled_and_gradients(TrainedRoIAlign, boxes_of("inside"), torch.float32, torch.contiguous_format)


@pytest.mark.parametrize("half", [False, True])
def test_no_operator_of_torchvision_pools_in_a_training_step_on_the_cpu(half: bool) -> None:
    small = {"backbone": "resnet18", "weights": "none", "fpn_channels": 16, "box_head_channels": 32}
    model = ModelConfig(**small | {"proposals_train": 100, "rois_per_image": 32})
    detector = build_detector(model, BatchNormConfig(), 2).train()
    images = [torch.randint(0, 256, (3, 96, 64), dtype=torch.uint8) for _ in range(2)]
    target = {"boxes": torch.tensor([[8.0, 10, 40, 50]]), "labels": torch.tensor([1]), "seed": 0}
    # autograd runs the backward pass of this thread, and the mode goes with it
    with Operators() as training, torch.autocast("cpu", torch.bfloat16, enabled=half):
        losses = detector.forward_losses(images, [target, target])
        sum(losses.values.values()).backward()
    assert training.named("convolution_backward")
    assert not training.named("roi_align")
    with Operators() as evaluation:
        detector.eval().predict(images)
    assert evaluation.named("roi_align") == {"torchvision.roi_align.default"}
