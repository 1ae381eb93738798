"""The detector in one process: its parts, frozen stages, losses that can be put together, sampling, recomputation."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from horovod_megdet.config import BatchNormConfig, ModelConfig
from horovod_megdet.errors import UserError
from horovod_megdet.layers.cross_gpu_bn import CrossGPUBatchNorm
from horovod_megdet.models.detector import Detector, build_detector
from horovod_megdet.models.norms import bn_group

SMALL = {"backbone": "resnet18", "weights": "none", "fpn_channels": 16, "box_head_channels": 32}
SMALL |= {"proposals_train": 100, "rois_per_image": 32, "anchors_per_image": 32, "anchor_sizes": (8, 16, 32, 64, 128)}
PARTS = ("backbone.body", "backbone.fpn", "roi_heads.box_head")
NORMS = {"cgbn": CrossGPUBatchNorm, "local": CrossGPUBatchNorm, "frozen": FrozenBatchNorm2d}
ALL_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)


pytestmark = pytest.mark.usefixtures("one_thread")


def build(channels_last: bool = False, **changes: Any) -> Detector:
    torch.manual_seed(1)
    return build_detector(ModelConfig(**SMALL | changes), BatchNormConfig(), 2, channels_last=channels_last)


def example(count: int = 4, size: tuple[int, int] = (64, 96)) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Images of one size with two objects each, but none in the second."""
    generator = torch.Generator().manual_seed(2)
    images = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for _ in range(count)]
    boxes = torch.tensor([[8.0, 10.0, 40.0, 50.0], [20.0, 4.0, 90.0, 30.0]])
    targets = []
    for number in range(count):
        objects = 0 if number == 1 else 2
        targets.append({"boxes": boxes[:objects], "labels": torch.tensor([1, 2])[:objects], "seed": number})
    return images, targets


def backward(detector: Detector, images: list[Tensor], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
    sum(detector.forward_losses(images, targets).values.values()).backward()
    return {name: each.grad for name, each in detector.named_parameters() if each.grad is not None}


@pytest.mark.parametrize(
    "backbone", ["resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d"]
)
def test_every_backbone_and_the_chosen_widths(backbone: str) -> None:
    with torch.device("meta"):
        detector = build(backbone=backbone, weights="imagenet", fpn_channels=24, box_head_channels=40)
    channels = 512 if backbone in ("resnet18", "resnet34") else 2048
    assert detector.backbone.fpn.inner_blocks[3][0].weight.shape == (24, channels, 1, 1)
    assert detector.rpn.head.cls_logits.weight.shape == (3, 24, 1, 1)
    assert detector.roi_heads.box_head.fc6.weight.shape == (40, 24 * 49)
    assert detector.roi_heads.box_predictor.cls_score.weight.shape == (3, 40)


def test_the_state_dict_has_the_keys_of_torchvision() -> None:
    with torch.device("meta"):
        ours = build(backbone="resnet50", weights="imagenet", backbone_norm="frozen", fpn_norm="none")
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    # torchvision takes frozen norms only together with pre-trained weights
    keys = [key for key in theirs.state_dict() if not key.endswith("num_batches_tracked")]
    assert list(ours.state_dict()) == keys


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["cgbn", "local", "frozen", "none"])
def test_norms_are_chosen_for_each_part(part: str, kind: str) -> None:
    choice = {"backbone_norm": "none", "fpn_norm": "none", "box_head_norm": "none"}
    choice[{"backbone.body": "backbone_norm", "backbone.fpn": "fpn_norm"}.get(part, "box_head_norm")] = kind
    detector = build(**choice)
    found = {name: module for name, module in detector.named_modules() if isinstance(module, ALL_NORMS)}
    assert all(name.startswith(part) for name in found)
    assert bool(found) == (kind != "none")
    assert all(type(module) is NORMS[kind] for module in found.values())
    for name, module in found.items():
        if kind == "cgbn":
            assert module.message_name == f"cgbn.{name}.{module.num_features}"
    if kind == "none":
        convolutions = [each for each in detector.modules() if isinstance(each, nn.Conv2d)]
        assert all(each.bias is not None for each in convolutions)


@pytest.mark.parametrize("norm", ["cgbn", "local", "frozen", "none"])
def test_frozen_stages_do_not_change(norm: str) -> None:
    detector = build(weights="imagenet", trainable_stages=3, backbone_norm=norm).train()
    frozen = ("backbone.body.conv1.", "backbone.body.bn1.", "backbone.body.layer1.")
    before = copy.deepcopy(detector.state_dict())
    optimizer = torch.optim.SGD([each for each in detector.parameters() if each.requires_grad], 0.1, weight_decay=0.1)
    backward(detector, *example(2))
    optimizer.step()
    for name, value in detector.state_dict().items():
        if name.startswith(frozen):
            assert torch.equal(value, before[name]), name
        elif name.endswith("conv1.weight") or (name.endswith("running_mean") and norm in ("cgbn", "local")):
            assert not torch.equal(value, before[name]), name


def test_with_random_weights_every_stage_trains() -> None:
    assert all(each.requires_grad for each in build(trainable_stages=0).parameters())


@pytest.mark.parametrize("norm", ["cgbn", "frozen", "none"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_random_weights_keep_activations_in_bounds(backbone: str, norm: str) -> None:
    detector = build(backbone=backbone, backbone_norm=norm, fpn_norm="none")
    with torch.no_grad():
        levels = detector.backbone.body(torch.randn(2, 3, 96, 96))
    assert all(0.05 < level.std() < 20 for level in levels.values()), [level.std() for level in levels.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_halves_make_the_whole_mini_batch(dtype: torch.dtype) -> None:
    detector = build(backbone_norm="frozen", fpn_norm="none").to(dtype)
    images, targets = example(4)
    whole = detector.forward_losses(images, targets)
    sum(whole.values.values()).backward()
    expected = {name: each.grad for name, each in detector.named_parameters()}
    detector.zero_grad()
    halves = [detector.forward_losses(images[part], targets[part]) for part in (slice(0, 1), slice(1, 4))]
    for name, count in whole.counts.items():
        counts = [half.counts[name] for half in halves]
        assert sum(counts) == count
        loss = sum(half.values[name] * weight / count for half, weight in zip(halves, counts, strict=True))
        torch.testing.assert_close(loss, whole.values[name], rtol=1e-5, atol=1e-7)
        loss.backward(retain_graph=True)
    for name, each in detector.named_parameters():
        assert (each.grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_losses_and_counts() -> None:
    images, targets = example(3)
    losses = build().forward_losses(images, targets)
    assert list(losses.values) == ["loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"]
    assert all(value.shape == () and torch.isfinite(value) for value in losses.values.values())
    assert losses.counts["loss_objectness"] == losses.counts["loss_rpn_box_reg"] == 3 * 32
    assert losses.counts["loss_classifier"] == losses.counts["loss_box_reg"] <= 3 * 32


def test_a_loss_without_samples_is_zero_and_can_be_differentiated() -> None:
    detector = build(box_head_norm="frozen")
    detector.rpn._post_nms_top_n["training"] = 0
    images, targets = example(2)
    losses = detector.forward_losses(images[1:], targets[1:])
    assert losses.counts["loss_classifier"] == 0
    assert losses.values["loss_classifier"] == losses.values["loss_box_reg"] == 0
    sum(losses.values.values()).backward()
    assert all(torch.isfinite(each.grad).all() for each in detector.parameters())
    assert not detector.roi_heads.box_predictor.cls_score.weight.grad.any()


def test_losses_do_not_depend_on_the_images_of_the_first_step() -> None:
    fresh, other = build(), build()
    other.load_state_dict(fresh.state_dict())
    other.forward_losses(*example(2, size=(33, 65)))  # from these, torchvision would take the strides for others
    batch = example(2, size=(64, 96))
    one, two = (detector.forward_losses(*batch).values for detector in (fresh, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_same_step_twice_has_the_same_losses() -> None:
    detector = build(backbone_norm="frozen", fpn_norm="none")
    first, second = (detector.forward_losses(*example(2)) for _ in range(2))
    assert all(torch.equal(first.values[name], second.values[name]) for name in first.values)


@pytest.mark.parametrize("kind", ["stages", "blocks"])
@pytest.mark.parametrize("norm", ["cgbn", "local", "frozen", "none"])
def test_recomputation_changes_no_bit(kind: str, norm: str) -> None:
    plain, recomputing = (build(backbone_norm=norm, activation_checkpointing=each) for each in ("none", kind))
    assert list(plain.state_dict()) == list(recomputing.state_dict())
    expected, gradients = (backward(detector, *example(2)) for detector in (plain, recomputing))
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    buffers = dict(plain.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in recomputing.named_buffers())


def test_recomputation_keeps_fewer_activations() -> None:
    def saved_bytes(kind: str) -> int:
        detector, total = build(activation_checkpointing=kind), 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            detector.backbone.body(torch.zeros(1, 3, 64, 64))
        return total

    none, blocks, stages = (saved_bytes(kind) for kind in ("none", "blocks", "stages"))
    assert stages <= blocks < 0.6 * none


@pytest.mark.parametrize("channels_last", [False, True])
def test_predictions(channels_last: bool) -> None:
    detector = build(channels_last, score_threshold=0.0, detections_per_image=7)
    backward(detector, *example(2))
    detector.eval()
    images = [example(1)[0][0], example(1, (50, 70))[0][0]]
    found = detector.predict(images)
    as_floats = detector.predict([image / 255 for image in images])
    for image, each, again in zip(images, found, as_floats, strict=True):
        height, width = image.shape[1:]
        assert 0 < len(each["boxes"]) <= 7
        assert (each["boxes"] >= 0).all()
        assert (each["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert set(each["labels"].tolist()) <= {1, 2}
        assert each["scores"].tolist() == sorted(each["scores"].tolist(), reverse=True)
        torch.testing.assert_close(each["boxes"], again["boxes"])


def test_the_layout_changes_nothing_but_the_order_in_memory() -> None:
    last, first = build(channels_last=True), build()
    weight = last.backbone.body.layer4[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert all(map(torch.equal, last.parameters(), first.parameters()))
    gradients, expected = (backward(detector.double(), *example(2)) for detector in (last, first))
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 convolutions for this processor"
)
def test_with_channels_last_weights_are_copied_half_as_often() -> None:
    """Once forward and twice for the gradient, which oneDNN returns with channels first: not six times per step."""
    detector = build(channels_last=True)
    weights = [module.weight for module in detector.modules() if isinstance(module, nn.Conv2d)]
    shape = [512, 512, 3, 3]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled, torch.autocast("cpu"):
        backward(detector, *example(2))
    copied = [event for event in profiled.events() if event.name == "aten::copy_" and event.input_shapes[0] == shape]
    assert len(copied) == 3 * sum(list(weight.shape) == shape for weight in weights) > 0


def test_boxes_keep_their_precision_under_autocast() -> None:
    detector = build()
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.forward_losses(*example(2))
        outputs = detector.rpn.head([torch.zeros(1, 16, 4, 4)])
        found = detector.eval().predict(example(2)[0])
    assert all(level.dtype == torch.float32 for kind in outputs for level in kind)
    assert all(value.dtype == torch.float32 for value in losses.values.values())
    assert all(each["boxes"].dtype == each["scores"].dtype == torch.float32 for each in found)


def test_the_whole_state_moves_to_another_type() -> None:
    detector = build(box_head_norm="cgbn").double()
    assert all(value.dtype in (torch.float64, torch.int64) for value in detector.state_dict().values())
    assert all(gradient.dtype == torch.float64 for gradient in backward(detector, *example(2)).values())


def test_bn_size_of_the_images_of_one_rank() -> None:
    assert bn_group(BatchNormConfig(bn_size=2), 2).size == 1
    assert bn_group(BatchNormConfig(), 2).size == 1
    with pytest.raises(UserError, match=r"batch_norm.bn_size: 3 .* 1 rank of 2 images; possible are 2\."):
        bn_group(BatchNormConfig(bn_size=3), 2)
