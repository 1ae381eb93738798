"""The optimizers against plain formulas, and the states that are loaded into them."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from horovod_megdet.config import BatchNormConfig, ModelConfig, SolverConfig
from horovod_megdet.errors import UserError
from horovod_megdet.models.detector import build_detector
from horovod_megdet.models.modules import MODULES, trainable_parameters
from horovod_megdet.solver.optimizer import build_optimizer, load_optimizer, set_lr

PATH = Path("runs/x/checkpoints/step_00000003")
FACTORS = dict(zip(MODULES, (1.0, 0.5, 2.0, 3.0), strict=True))
STEPS = 6


class Small(nn.Module):
    """Named as a detector, with a weight and a bias in each module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.ModuleDict({"body": nn.Linear(3, 4), "fpn": nn.Linear(4, 2)})
        self.rpn, self.roi_heads = nn.Linear(2, 5), nn.Linear(5, 2)


def solver(**values: Any) -> SolverConfig:
    return SolverConfig.model_validate({"momentum": 0.8, "weight_decay": 0.01} | values)


def gradients(module: nn.Module, step: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        yield parameter, torch.randn(parameter.shape, generator=generator)


def take_step(module: nn.Module, optimizer: torch.optim.Optimizer, step: int, lr: float = 0.1) -> None:
    for parameter, gradient in gradients(module, step):
        parameter.grad = gradient
    set_lr(optimizer, lr, FACTORS)
    optimizer.step()


def sgd(weight: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float, decay: float) -> Tensor:
    state["buffer"] = 0.8 * state.get("buffer", 0.0) + gradient + decay * weight
    return weight - lr * state["buffer"]


def lars(weight: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float, decay: float) -> Tensor:
    """You et al. 2017, algorithm 1, with the learning rate outside of the momentum; weights only have a trust ratio."""
    ratio = 0.001 * weight.norm() / (gradient.norm() + decay * weight.norm()) if weight.ndim > 1 else 1.0
    state["buffer"] = 0.8 * state.get("buffer", 0.0) + ratio * (gradient + decay * weight)
    return weight - lr * state["buffer"]


def adamw(weight: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float, decay: float) -> Tensor:
    """Loshchilov and Hutter 2019, algorithm 2."""
    step = state["step"] = state.get("step", 0) + 1
    state["m"] = 0.8 * state.get("m", 0.0) + 0.2 * gradient
    state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * gradient**2
    mean, square = state["m"] / (1 - 0.8**step), state["v"] / (1 - 0.999**step)
    return weight - lr * (mean / (square.sqrt() + 1e-8) + decay * weight)


@pytest.mark.parametrize("rule", [sgd, lars, adamw], ids=lambda rule: rule.__name__)
def test_steps_are_those_of_the_formula(rule: Callable[..., Tensor]) -> None:
    """With learning rates by step and module, and without decay of biases."""
    module = Small()
    optimizer = build_optimizer(module, solver(optimizer=rule.__name__))
    module_of = {p: name for name, parameters in trainable_parameters(module).items() for p in parameters}
    weights = {p: p.detach().double().clone() for p in module.parameters()}
    states: dict[nn.Parameter, dict[str, Tensor]] = {p: {} for p in weights}
    for step in range(STEPS):
        lr = 0.1 / (1 + step)
        for parameter, gradient in gradients(module, step):
            decay = 0.01 if parameter.ndim > 1 else 0.0
            lr_here = lr * FACTORS[module_of[parameter]]
            weights[parameter] = rule(weights[parameter], gradient.double(), states[parameter], lr_here, decay)
        take_step(module, optimizer, step, lr)
    for parameter, expected in weights.items():
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_going_on_from_a_saved_state_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    module = Small()
    optimizer = build_optimizer(module, solver(optimizer=name))
    for step in range(3):
        take_step(module, optimizer, step)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed = copy.deepcopy(module)
    again = build_optimizer(resumed, solver(optimizer=name))
    load_optimizer(again, torch.load(tmp_path / "state.pt", weights_only=True), PATH)
    for step in range(3, STEPS):
        take_step(module, optimizer, step)
        take_step(resumed, again, step)
    assert all(map(torch.equal, module.parameters(), resumed.parameters()))
    assert str(again.state_dict()["param_groups"]) == str(optimizer.state_dict()["param_groups"])


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_a_state_of_the_other_memory_layout_gives_the_same_steps(name: str) -> None:
    """Fused optimizers take what lies at the same place in memory for the same value."""
    first, last = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    last.load_state_dict(first.state_dict())
    modules = {module: nn.ModuleDict({"backbone": nn.ModuleDict({"body": module})}) for module in (first, last)}
    optimizers = {module: build_optimizer(modules[module], solver(optimizer=name)) for module in modules}

    def step(module: nn.Module, number: int) -> None:
        for parameter, gradient in gradients(module, number):
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        set_lr(optimizers[module], 0.1, dict.fromkeys(MODULES, 1.0))
        optimizers[module].step()

    for number in range(2):
        step(first, number)
    last.load_state_dict(first.state_dict())
    load_optimizer(optimizers[last], copy.deepcopy(optimizers[first].state_dict()), PATH)
    for number in range(2, 4):
        for module in modules:
            step(module, number)
    assert not last.weight.is_contiguous()
    torch.testing.assert_close(last.weight, first.weight)


def test_a_state_of_version_0_1_gives_the_same_steps() -> None:
    """There all weights were one group and all biases and norms another, in the order of the detector."""
    model = ModelConfig(
        backbone="resnet18", weights="imagenet", trainable_stages=3, fpn_channels=16, box_head_channels=8
    )
    detector = build_detector(model, BatchNormConfig(), 2)
    trainable = [p for p in detector.parameters() if p.requires_grad]
    assert len(trainable) < len(list(detector.parameters()))
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    old = torch.optim.SGD(groups, lr=0.1, momentum=0.8, fused=True)

    def old_step(step: int) -> None:
        for parameter, gradient in gradients(detector, step):
            parameter.grad = gradient if parameter.requires_grad else None
        old.step()

    for step in range(2):
        old_step(step)
    resumed = copy.deepcopy(detector)
    new = build_optimizer(resumed, solver())
    load_optimizer(new, copy.deepcopy(old.state_dict()), PATH)
    assert len(new.param_groups) == 8
    old_step(2)
    for parameter, gradient in gradients(resumed, 2):
        parameter.grad = gradient if parameter.requires_grad else None
    set_lr(new, 0.1, dict.fromkeys(MODULES, 1.0))
    new.step()
    assert all(map(torch.equal, detector.parameters(), resumed.parameters()))


def test_a_resumed_run_follows_its_configuration() -> None:
    optimizer = build_optimizer(Small(), solver())
    load_optimizer(optimizer, build_optimizer(Small(), solver(momentum=0.3, weight_decay=0.5)).state_dict(), PATH)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.8}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.01, 0.0}


def test_a_state_of_other_trained_parameters_is_an_error() -> None:
    frozen = Small()
    frozen.backbone["body"].requires_grad_(False)
    state = build_optimizer(Small(), solver()).state_dict()
    with pytest.raises(UserError, match=r"step_00000003: this checkpoint trains 8 parameters, and the configuration 6"):
        load_optimizer(build_optimizer(frozen, solver()), state, PATH)


def test_lars_without_its_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    with pytest.raises(UserError, match=r"pip install 'horovod-megdet\[lars\]'"):
        build_optimizer(Small(), solver(optimizer="lars"))
