"""SGD with momentum, as MegDet and FPN train: weight decay on weights only."""

import torch
from torch import nn

from horovod_megdet.config import SolverConfig


def build_optimizer(module: nn.Module, solver: SolverConfig) -> torch.optim.SGD:
    """Returns SGD over the trainable parameters; norms and biases (1-d parameters) get no weight decay.

    The learning rate is a placeholder: the trainer sets it before every step.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": solver.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, fused=True, lr=solver.base_lr, momentum=solver.momentum)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
