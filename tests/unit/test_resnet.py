"""ResNets whose normalization layers take the shortcut and the ReLU into their passes, against torchvision's."""

import copy
from collections.abc import Callable

import pytest
import torch
from operators import Operators
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import Conv2dNormActivation

from horovod_megdet import comm
from horovod_megdet.layers.cross_gpu_bn import convert_batch_norm
from horovod_megdet.models.norms import freeze_norms
from horovod_megdet.models.resnet import Body, NormalizedConv, build_resnet

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d")
PAIR = comm.Group((0, 1), None)


pytestmark = pytest.mark.usefixtures("one_thread", "twins")


def both(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and torchvision's, with the same random weights."""
    ours = build_resnet(name, nn.BatchNorm2d, num_classes=10)
    theirs = get_model(name, num_classes=10)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def step(model: Callable[[Tensor], Tensor | dict[str, Tensor]], parameters: nn.Module, images: Tensor) -> list[Tensor]:
    """Outputs and gradients of a fixed function of them."""
    images = images.clone().requires_grad_()
    outputs = model(images)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
    torch.stack([output.sin().sum() for output in outputs]).sum().backward()
    return [*outputs, images.grad, *(each.grad for each in parameters.parameters() if each.grad is not None)]


@pytest.mark.parametrize("name", NAMES)
def test_every_resnet_has_the_modules_of_torchvision(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = build_resnet(name, nn.BatchNorm2d), get_model(name)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    convolutions = [
        [each.extra_repr() for each in net.modules() if isinstance(each, nn.Conv2d)] for net in (ours, theirs)
    ]
    assert convolutions[0] == convolutions[1]


def test_the_same_seed_gives_the_random_weights_of_torchvision() -> None:
    torch.manual_seed(3)
    ours = build_resnet("resnet50", nn.BatchNorm2d, num_classes=10).state_dict()
    torch.manual_seed(3)
    theirs = get_model("resnet50", num_classes=10).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("training", [True, False])
def test_a_step_has_the_bits_of_separate_operators(name: str, training: bool) -> None:
    ours, theirs = both(name)
    convert_batch_norm(ours, group=PAIR)
    convert_batch_norm(theirs, group=PAIR)
    images = torch.randn(2, 3, 64, 64)
    results = [step(model.train(training), model, images) for model in (ours, theirs)]
    assert len(results[0]) == len(results[1]) > 60
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(ours.buffers(), theirs.buffers(), strict=True))


@pytest.mark.parametrize("kind", ["frozen", "none", "batch"])
def test_layers_that_take_nothing_in_are_followed_by_operators(kind: str) -> None:
    models = both("resnet18")
    levels = {"layer1": "0", "layer2": "1", "layer4": "2"}
    bodies = []
    for model, body in zip(models, (Body, IntermediateLayerGetter), strict=True):
        for module in model.modules() if kind == "none" else ():
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.Identity())
        if kind == "frozen":
            freeze_norms(model)
        bodies.append(body(model, levels))
    images = torch.randn(2, 3, 64, 64)
    ours, theirs = (step(body, body, images) for body in bodies)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_no_relu_and_no_addition_of_a_shortcut_runs_beside_the_normalization() -> None:
    for group in (PAIR, comm.Group((0,), None)):
        model = convert_batch_norm(build_resnet("resnet50", nn.BatchNorm2d, num_classes=10), group=group)
        with Operators() as forward:
            loss = model(torch.randn(2, 3, 64, 64)).sum()
        with Operators() as backward:
            loss.backward()
        assert not forward.named("relu")
        assert not backward.named("threshold_backward")
        additions = [size for name, size in forward.calls if name.startswith(("aten.add.", "aten.add_."))]
        assert max(additions) == 1, "only the layers' counters of batches are added to"


def test_the_convolutions_of_a_box_head() -> None:
    theirs = Conv2dNormActivation(3, 4, 3)
    convert_batch_norm(theirs, group=PAIR)
    ours = NormalizedConv(*copy.deepcopy(theirs))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    images = torch.randn(2, 3, 8, 8)
    assert all(map(torch.equal, step(ours, ours, images), step(theirs, theirs, images)))
