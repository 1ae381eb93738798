"""Compares the detector's gradients on all ranks with those of one process that has all images."""

import copy
from typing import Any

import cgbn_common as common
import torch
from torch import Tensor

from horovod_megdet import comm
from horovod_megdet.config import BatchNormConfig, ModelConfig
from horovod_megdet.layers.cross_gpu_bn import CrossGPUBatchNorm
from horovod_megdet.models.detector import Detector, build_detector

IMAGES = 8
LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")
SMALL = {"backbone": "resnet18", "weights": "none", "fpn_channels": 16, "box_head_channels": 32}
SMALL |= {"proposals_train": 100, "rois_per_image": 32, "anchors_per_image": 32, "anchor_sizes": (8, 16, 32, 64, 128)}


def make_images(sizes: list[tuple[int, int]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Random images of these heights and widths, the second one without an object."""
    generator = torch.Generator().manual_seed(3)
    images, targets = [], []
    for number, size in enumerate(sizes):
        images.append(torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8))
        boxes = torch.tensor([[8.0, 10.0, 40.0, 50.0], [20.0, 4.0, 52.0, 30.0 + number]])[: 0 if number == 1 else 2]
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 2])[: len(boxes)], "seed": number})
    return images, targets


def on_device(
    device: torch.device | str, images: list[Tensor], targets: list[dict[str, Any]]
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """The same images and targets on ``device``."""
    moved = [target | {name: target[name].to(device) for name in ("boxes", "labels")} for target in targets]
    return [image.to(device) for image in images], moved


def build(dtype: torch.dtype = torch.float32, **changes: Any) -> Detector:
    """The same small detector on every rank."""
    torch.manual_seed(1)
    return build_detector(ModelConfig(**SMALL | changes), BatchNormConfig(), 2).to(dtype)


def gradients(
    detector: Detector, images: list[Tensor], targets: list[dict[str, Any]], names: tuple[str, ...] = LOSSES
) -> dict[str, Tensor]:
    """This rank's part of the gradient of the common loss, weighted as in the trainer."""
    losses = detector.forward_losses(images, targets)
    counts = torch.tensor([float(losses.counts[name]) for name in names], dtype=torch.float64)
    weights = counts / comm.sum_(counts.clone(), f"test.counts.{len(names)}")
    sum(losses.values[name] * weight for name, weight in zip(names, weights, strict=True)).backward()
    return {name: parameter.grad for name, parameter in detector.named_parameters() if parameter.grad is not None}


def alone(detector: Detector) -> Detector:
    """A copy whose normalization layers do not communicate."""
    detector = copy.deepcopy(detector)
    for layer in detector.modules():
        if isinstance(layer, CrossGPUBatchNorm):
            layer.group = comm.Group((comm.rank(),), None)
    return detector


def agreement_with_one_process(dtype: torch.dtype, names: tuple[str, ...], device: torch.device | str = "cpu") -> float:
    """Norm of the difference between the two gradients, relative to the gradient's."""
    images, targets = on_device(device, *make_images([(64, 64)] * IMAGES))
    detector = build(dtype, box_head_norm="cgbn").to(device)
    reference = alone(detector)
    losses = reference.forward_losses(images, targets)
    sum(losses.values[name] for name in names).backward()
    theirs = torch.cat([each.grad.double().flatten() for each in reference.parameters() if each.grad is not None])
    share = IMAGES // comm.size()
    mine = slice(comm.rank() * share, (comm.rank() + 1) * share)
    ours = torch.cat(
        [common.summed(each).flatten() for each in gradients(detector, images[mine], targets[mine], names).values()]
    )
    return float((ours - theirs).norm() / theirs.norm())


def same_order_everywhere() -> dict[str, bool]:
    """Whether the messages have one order on all ranks, whose images differ in number, size and content."""
    images, targets = make_images([(64, 64 + 32 * comm.rank())] * (1 + comm.rank() % 2))
    detector = build(box_head_norm="cgbn")
    with common.messages() as names:
        gradients(detector, images, targets)
    forward = [name for name in names if name.startswith("cgbn") and not name.endswith(".backward")]
    backward = [name.removesuffix(".backward") for name in names if name.endswith(".backward")]
    layers = sum(isinstance(layer, CrossGPUBatchNorm) for layer in detector.modules())
    return {
        "on all ranks": len({tuple(each) for each in comm.gather_objects(names, "test.order")}) == 1,
        "backward reverses forward": backward == forward[::-1],
        "one message each way": len(forward) == len(set(forward)) == layers,
    }


def recomputation() -> dict[str, dict[str, bool]]:
    """Whether gradients, running statistics and messages are those of keeping all activations, to the bit."""
    images, targets = make_images([(64, 64 + 32 * comm.rank())] * 2)
    found = {}
    for kind in ("none", "stages", "blocks"):
        detector = build(activation_checkpointing=kind)
        with common.messages() as names:
            found[kind] = gradients(detector, images, targets), dict(detector.named_buffers()), names
    reference = found.pop("none")
    return {
        kind: {
            "gradients": _equal(each[0], reference[0]),
            "buffers": _equal(each[1], reference[1]),
            "messages": each[2] == reference[2],
        }
        for kind, each in found.items()
    }


def _equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def measure() -> dict[str, Any]:
    """Everything, in a few seconds."""
    return {
        # Which RoIs are sampled depends on comparisons of scores, and so does the gradient: rounding may change it by
        # some percent in float32, on one process as well. The RPN's losses are smooth.
        "float32, RPN": agreement_with_one_process(torch.float32, LOSSES[:2]),
        "float64": agreement_with_one_process(torch.float64, LOSSES),
        "order": same_order_everywhere(),
        "recomputation": recomputation(),
    }


if __name__ == "__main__":
    common.main(measure)
