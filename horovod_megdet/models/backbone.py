"""ResNet and FPN from torchvision's parts: norms, frozen stages, initial weights and recomputation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from horovod_megdet.config import ModelConfig
from horovod_megdet.layers.recomputation import recomputed
from horovod_megdet.models.norms import Norms, freeze_norms
from horovod_megdet.models.resnet import BasicBlock, Body, Bottleneck, ResNet, build_resnet

STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
"""The modules of each backbone stage, from the image up."""

LEVELS = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}
"""The FPN's levels P2 to P5 in its output, by the stage below."""


class RecomputedStage(nn.Sequential):
    """A stage of a ResNet whose activations are computed again in the backward pass instead of kept.

    ``by_block`` keeps the input of every block and recomputes one at a time; otherwise only the stage's input is kept.
    """

    def __init__(self, stage: nn.Sequential, by_block: bool) -> None:
        super().__init__(*stage)
        self.by_block = by_block

    def forward(self, input: Tensor) -> Tensor:
        """As the stage: (N, C, H, W) in, (N, C', H', W') out."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(input)
        if not self.by_block:
            return recomputed(super().forward, input)
        for block in self:
            input = recomputed(block, input)
        return input


def build_backbone(model: ModelConfig, norms: Norms) -> BackboneWithFPN:
    """ResNet + FPN with random weights.

    The output is ``{"0".."3", "pool"}``, the levels P2 to P6 of (N, fpn_channels, H / stride, W / stride). Stages
    below ``trainable_stages`` are frozen: neither weights nor normalization statistics change in any mode. With random
    weights there is nothing to keep, and all stages train.
    """
    resnet = _build_resnet(model, norms)
    frozen = 0 if model.weights == "none" else len(STAGES) - model.trainable_stages
    for stage in STAGES[:frozen]:
        for name in stage:
            _freeze(resnet, name)
    backbone = with_fpn(resnet, model.fpn_channels, norms.layer(model.fpn_norm))
    backbone.body = Body(resnet, return_layers=LEVELS)
    norms.finish(backbone.body, model.backbone_norm, "backbone.body")
    norms.finish(backbone.fpn, model.fpn_norm, "backbone.fpn")
    if model.activation_checkpointing != "none":
        for name, *_ in STAGES[max(frozen, 1) :]:
            backbone.body[name] = RecomputedStage(backbone.body[name], model.activation_checkpointing == "blocks")
    return backbone


def with_fpn(resnet: models.ResNet, channels: int, norm_layer: Callable[..., nn.Module] | None) -> BackboneWithFPN:
    """torchvision's FPN of ``channels`` on a ResNet."""
    narrowest = resnet.inplanes // 8
    return BackboneWithFPN(
        resnet,
        return_layers=LEVELS,
        in_channels_list=[narrowest, 2 * narrowest, 4 * narrowest, 8 * narrowest],
        out_channels=channels,
        norm_layer=norm_layer,
    )


def _build_resnet(model: ModelConfig, norms: Norms) -> ResNet:
    # Without a norm its place is taken by the identity, and the shift by the convolution's bias.
    resnet = build_resnet(model.backbone, norms.layer(model.backbone_norm) or nn.Identity)
    if model.backbone_norm == "none":
        add_biases(resnet)
    if model.backbone_norm in ("none", "frozen"):
        _bound_variance(resnet)
    return resnet


def add_biases(resnet: nn.Module) -> None:
    """Gives each convolution of a ResNet without norms a bias of 0."""
    for layer in resnet.modules():
        if isinstance(layer, nn.Conv2d):
            layer.bias = nn.Parameter(torch.zeros(layer.out_channels))


@torch.no_grad()
def _bound_variance(resnet: ResNet) -> None:
    """Scales the last convolution of each of L residual blocks by L^-1/2; without norms they double the variance."""
    blocks = [block for block in resnet.modules() if isinstance(block, BasicBlock | Bottleneck)]
    for block in blocks:
        last = block.conv3 if isinstance(block, Bottleneck) else block.conv2
        last.weight.mul_(len(blocks) ** -0.5)


def _freeze(resnet: ResNet, name: str) -> None:
    part = nn.ModuleDict({name: resnet.get_submodule(name)})
    freeze_norms(part)
    setattr(resnet, name, part[name].requires_grad_(False))
