"""The detector on the GPU against the same on the CPU; what recomputation saves there."""

import copy
from typing import Any

import cgbn_detector as common
import pytest
import torch
from torch import Tensor

from horovod_megdet.config import BatchNormConfig, ModelConfig
from horovod_megdet.models.detector import Detector, build_detector

SIZES = [(64, 96), (96, 64), (64, 64)]


def losses_and_gradients(
    detector: Detector, device: torch.device | str, names: tuple[str, ...]
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """The losses of that name (n,), the gradient of their sum by all parameters (m,), and the numbers of samples."""
    detector = copy.deepcopy(detector).to(device)
    found = detector.forward_losses(*common.on_device(device, *common.make_images(SIZES)))
    losses = torch.stack([found.values[name] for name in names])
    losses.sum().backward()
    gradients = [each.grad for each in detector.parameters() if each.grad is not None]
    return losses.detach().cpu(), torch.cat([each.flatten() for each in gradients]).cpu(), found.counts


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_losses_and_gradients_in_float64(device: torch.device, backbone: str, channels_last: bool) -> None:
    """Sampling included: in float64 no comparison of scores comes out differently."""
    torch.manual_seed(1)
    model = ModelConfig(**common.SMALL | {"backbone": backbone})
    detector = build_detector(model, BatchNormConfig(), 2, channels_last=channels_last).double()
    losses, gradient, counts = losses_and_gradients(detector, device, common.LOSSES)
    reference_losses, reference_gradient, reference_counts = losses_and_gradients(detector, "cpu", common.LOSSES)
    assert counts == reference_counts
    torch.testing.assert_close(losses, reference_losses, rtol=1e-9, atol=1e-12)
    assert (gradient - reference_gradient).norm() <= 1e-9 * reference_gradient.norm()


def test_losses_and_gradients_of_the_rpn_in_float32(device: torch.device) -> None:
    """Which RoIs are sampled depends on comparisons, which rounding may change; the RPN's losses are smooth."""
    detector = common.build()
    losses, gradient, _ = losses_and_gradients(detector, device, common.LOSSES[:2])
    reference_losses, reference_gradient, _ = losses_and_gradients(detector, "cpu", common.LOSSES[:2])
    torch.testing.assert_close(losses, reference_losses, rtol=1e-4, atol=1e-6)
    assert (gradient - reference_gradient).norm() <= 1e-3 * reference_gradient.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_gives_float32_losses_and_finite_gradients(device: torch.device, dtype: torch.dtype) -> None:
    detector = common.build().to(device)
    images, targets = common.on_device(device, *common.make_images(SIZES))
    with torch.autocast(device.type, dtype=dtype):
        found = detector.forward_losses(images, targets)
    assert {value.dtype for value in found.values.values()} == {torch.float32}
    sum(found.values.values()).backward()
    assert all(each.grad.isfinite().all() for each in detector.parameters() if each.grad is not None)
    reference, _, _ = losses_and_gradients(common.build(), "cpu", common.LOSSES[:2])
    ours = torch.stack([found.values[name] for name in common.LOSSES[:2]]).detach().cpu()
    # Two bytes have 8 bits of precision, and 18 layers add up their rounding.
    torch.testing.assert_close(ours, reference, rtol=0.1, atol=0.02)


class Backbone:
    """A backbone's gradients with and without recomputation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = (8, 3, 512, 512) if device.type == "cuda" else (2, 3, 64, 64)
        self.images = torch.randn(size, generator=torch.Generator().manual_seed(2)).to(device)

    def gradients(self, recomputation: str, **autocast: Any) -> tuple[dict[str, Tensor], int]:
        """The gradients by parameter, and the most bytes that the pass allocated beside weights and images."""
        detector = common.build(backbone="resnet50", activation_checkpointing=recomputation).to(self.device)
        backbone = detector.backbone
        with Peak(self.device) as peak:
            with torch.autocast(self.device.type, **autocast):
                loss = sum(level.float().square().mean() for level in backbone(self.images).values())
            loss.backward()
        return {name: each.grad for name, each in backbone.named_parameters() if each.grad is not None}, peak.bytes


class Peak:
    """A context that notes how many bytes more than at its start were allocated at most; 0 on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.bytes = -torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes += torch.cuda.max_memory_allocated(self.device)


@pytest.mark.parametrize("kind", ["stages", "blocks"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_recomputation_changes_no_bit_and_needs_less_memory(
    device: torch.device, kind: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    backbone = Backbone(device)
    autocast = {"enabled": dtype is not None, "dtype": dtype or torch.bfloat16}
    backbone.gradients("none", **autocast)  # makes the workspaces of the libraries
    kept, kept_bytes = backbone.gradients("none", **autocast)
    recomputed, recomputed_bytes = backbone.gradients(kind, **autocast)
    assert kept.keys() == recomputed.keys()
    different = [name for name, gradient in kept.items() if not torch.equal(gradient, recomputed[name])]
    assert not different
    if device.type == "cuda":
        assert recomputed_bytes < 0.8 * kept_bytes, f"{recomputed_bytes >> 20} MiB against {kept_bytes >> 20} MiB"
