"""The optimizers. Weight decay acts on weights only, and each module of the detector has a learning rate of its own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from horovod_megdet.config import SolverConfig
from horovod_megdet.errors import UserError
from horovod_megdet.models.modules import MODULES, trainable_parameters


def build_optimizer(detector: nn.Module, solver: SolverConfig) -> torch.optim.Optimizer:
    """Returns ``solver.optimizer`` over the trainable parameters; norms and biases (1-d) get no weight decay.

    The learning rate is a placeholder: :func:`set_lr` gives each step its own. Raises :class:`UserError` where the
    optimizer is not installed.
    """
    return _optimizer(parameter_groups(detector, solver.weight_decay), solver)


def state_bytes(detector: nn.Module, solver: SolverConfig) -> int:
    """Bytes that the optimizer keeps for the trainable parameters of ``detector``, which may be on the meta device.

    A step on a small parameter shows how much it keeps for each value. Raises :class:`UserError` where the optimizer is
    not installed.
    """
    sample = nn.Parameter(torch.zeros(8, 8, device="cpu"))
    sample.grad = torch.zeros_like(sample)
    optimizer = _optimizer([{"params": [sample]}], solver)
    optimizer.step()
    kept = [value for value in optimizer.state[sample].values() if isinstance(value, Tensor)]
    trainable = sum(parameter.nbytes for parameter in detector.parameters() if parameter.requires_grad)
    return trainable * sum(value.nbytes for value in kept if value.shape == sample.shape) // sample.nbytes


def parameter_groups(detector: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters: first all with weight decay, then all without, by module."""
    by_module = trainable_parameters(detector)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in by_module[module] if (p.ndim > 1) == decays], "module": module, "weight_decay": decay}
        for decays, decay in ((True, weight_decay), (False, 0.0))
        for module in MODULES
    ]
    return [group for group in groups if group["params"]]


def set_lr(optimizer: torch.optim.Optimizer, lr: float, factors: Mapping[str, float]) -> None:
    """Sets the learning rate of every parameter group: ``lr`` times the factor of its module."""
    for group in optimizer.param_groups:
        group["lr"] = lr * factors[group["module"]]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a state dict into ``optimizer``, also one of version 0.1, whose groups held the parameters of all modules.

    The order of the parameters has always been the same, and that is what the state goes by.
    """
    current = optimizer.state_dict()["param_groups"]
    saved = [number for group in state["param_groups"] for number in group["params"]]
    if saved != [number for group in current for number in group["params"]]:
        raise UserError("the optimizer's state belongs to another detector")
    if len(current) != len(state["param_groups"]):
        state = state | {"param_groups": current}
    optimizer.load_state_dict(state)


def _optimizer(groups: list[dict[str, Any]], solver: SolverConfig) -> torch.optim.Optimizer:
    if solver.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, lr=solver.base_lr, betas=(solver.momentum, 0.999))
    if solver.optimizer == "lars":
        return _lars()(groups, lr=solver.base_lr, momentum=solver.momentum)
    return torch.optim.SGD(groups, fused=True, lr=solver.base_lr, momentum=solver.momentum)


def _lars() -> Any:
    try:
        from timm.optim import Lars
    except ImportError:
        raise UserError("solver.optimizer: lars needs the package timm: pip install 'horovod-megdet[lars]'.") from None
    return Lars
