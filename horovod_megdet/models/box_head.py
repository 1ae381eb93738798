"""The box head: what it makes of the feature maps of the RoIs, (n, C, 7, 7)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.ops.misc import Conv2dNormActivation

from horovod_megdet.config import ModelConfig
from horovod_megdet.layers.kernels import widened
from horovod_megdet.models.norms import Norms
from horovod_megdet.models.resnet import NormalizedConv

ROI_SIZE = 7
"""Side of the feature maps that RoIAlign cuts out."""

ROWS = 64
"""On a CPU in 16 bits, matrix products have a multiple of so many rows; see :func:`in_whole_blocks`."""


def build_box_head(model: ModelConfig, norms: Norms) -> nn.Module:
    """Two layers of an MLP or, with a norm, four convolutions and a layer."""
    channels = model.fpn_channels
    head: nn.Module
    if model.box_head_norm == "none":
        head = MLPHead(channels * ROI_SIZE**2, model.box_head_channels)
    else:
        size = (channels, ROI_SIZE, ROI_SIZE)
        head = FastRCNNConvFCHead(size, [channels] * 4, [model.box_head_channels], norms.layer(model.box_head_norm))
        norms.finish(head, model.box_head_norm, "roi_heads.box_head")
        for name, layer in head.named_children():
            if isinstance(layer, Conv2dNormActivation):
                setattr(head, name, NormalizedConv(*layer))
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    return head


class MLPHead(TwoMLPHead):
    """torchvision's, with rows in whole blocks."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, channels) of the RoIs' feature maps (n, C, 7, 7)."""
        return super().forward(in_whole_blocks(x.flatten(1)))[: len(x)]


class Predictor(FastRCNNPredictor):
    """Initialized as is customary: small class logits, smaller box deltas. Float32 under autocast."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, classes) and box offsets (n, 4 classes) of features (n, channels)."""
        logits, offsets = super().forward(in_whole_blocks(x))
        return widened(logits[: len(x)]), widened(offsets[: len(x)])


def in_whole_blocks(x: Tensor) -> Tensor:
    """Adds rows of zeros to (n, k), so that their number is a multiple of :data:`ROWS`, on a CPU in 16 bits.

    The number of RoIs varies from batch to batch where an image has few proposals, and oneDNN compiles a kernel for
    each number of rows and keeps it: a rank that trained on blood cells grew from 1.1 to 2.8 GB.
    """
    missing = -len(x) % ROWS
    if not missing or x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return x
    return F.pad(x, (0, 0, 0, missing))
