"""The four modules of a detector whose gradients are looked at apart: backbone, FPN, RPN and box head."""

from torch import nn
from torch.nn import Parameter

PREFIXES = {"backbone": "backbone.body.", "fpn": "backbone.fpn.", "rpn": "rpn.", "box_head": "roi_heads."}
"""Where the names of a module's parameters begin."""

MODULES = tuple(PREFIXES)
"""In the order of the detector's parameters."""


def trainable_parameters(detector: nn.Module) -> dict[str, list[Parameter]]:
    """The parameters that train, by module; a module that is frozen has none."""
    found: dict[str, list[Parameter]] = {module: [] for module in MODULES}
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            found[module_of(name)].append(parameter)
    return found


def module_of(name: str) -> str:
    """The module that a parameter of the detector belongs to."""
    return next(module for module, prefix in PREFIXES.items() if name.startswith(prefix))
