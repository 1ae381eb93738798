"""The optimizers. Weight decay acts on weights only, and each module of the detector has a learning rate of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from horovod_megdet.config import SolverConfig
from horovod_megdet.errors import UserError
from horovod_megdet.layers.kernels.layout import laid_out_like
from horovod_megdet.models.modules import MODULES, trainable_parameters

TRUST_COEFFICIENT = 0.001
"""Of LARS: the length of a layer's step over that of its weights, for a learning rate of 1 and without momentum."""


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


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """Loads the state dict of the checkpoint ``path``, also of the first format, whose two groups held all weights.

    Parameters are told by their number in the order of the groups, which is the same in both. Momentum, weight decay
    and whatever else the configuration gives are those that ``optimizer`` was made with. Raises :class:`UserError` if
    other parameters were trained.
    """
    groups, saved = optimizer.state_dict()["param_groups"], state["param_groups"]
    ours, theirs = (sum(len(group["params"]) for group in each) for each in (groups, saved))
    if ours != theirs:
        raise UserError(
            f"{path}: this checkpoint trains {theirs} parameters, and the configuration {ours}: use the configuration "
            "it was saved with, model.trainable_stages included."
        )
    if len(groups) == len(saved):  # keeps what an optimizer itself notes in its groups
        groups = [old | new for old, new in zip(saved, groups, strict=True)]
    optimizer.load_state_dict(state | {"param_groups": groups})
    for parameter, kept in optimizer.state.items():  # the fused steps go through memory, whatever the strides are
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                kept[name] = laid_out_like(value, parameter)


def _optimizer(groups: list[dict[str, Any]], solver: SolverConfig) -> torch.optim.Optimizer:
    if solver.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, lr=solver.base_lr, betas=(solver.momentum, 0.999))
    if solver.optimizer == "lars":
        return _lars()(groups, lr=solver.base_lr, momentum=solver.momentum, trust_coefficient=TRUST_COEFFICIENT)
    return torch.optim.SGD(groups, fused=True, lr=solver.base_lr, momentum=solver.momentum)


def _lars() -> Any:
    try:
        from pytorch_optimizer import LARS
    except ImportError:
        raise UserError(
            "solver.optimizer: lars needs the package pytorch_optimizer: pip install 'horovod-megdet[lars]'."
        ) from None
    return LARS
