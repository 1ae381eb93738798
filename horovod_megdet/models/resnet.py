"""torchvision's ResNets, whose blocks hand a normalization layer what follows it: the shortcut and the ReLU.

The modules, the keys of the state dict and the random weights are torchvision's.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models._utils import IntermediateLayerGetter

from horovod_megdet.layers.cross_gpu_bn import CrossGPUBatchNorm
from horovod_megdet.layers.kernels import activate


def rectified(norm: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """Returns ``max(0, norm(x) + shortcut)``, in one pass if the layer can; ``x`` and ``shortcut`` are (N, C, H, W)."""
    if isinstance(norm, CrossGPUBatchNorm):
        y: Tensor = norm(x, shortcut, relu=True)
        return y
    return activate(norm(x), shortcut, relu=True)


class BasicBlock(resnet.BasicBlock):
    """The block of ResNet-18 and 34."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in, (N, C', H / stride, W / stride) out."""
        out = rectified(self.bn1, self.conv1(x))
        out = self.conv2(out)
        return rectified(self.bn2, out, x if self.downsample is None else self.downsample(x))


class Bottleneck(resnet.Bottleneck):
    """The block of the deeper ResNets and of ResNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in, (N, C', H / stride, W / stride) out."""
        out = rectified(self.bn1, self.conv1(x))
        out = rectified(self.bn2, self.conv2(out))
        out = self.conv3(out)
        return rectified(self.bn3, out, x if self.downsample is None else self.downsample(x))


class ResNet(resnet.ResNet):
    """The classifier."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in, (N, classes) out."""
        x = self.maxpool(rectified(self.bn1, self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


class Body(IntermediateLayerGetter):
    """The part of a ResNet below the classifier: (N, 3, H, W) in, a dict of the outputs of chosen stages."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """See the class."""
        x = self["maxpool"](rectified(self["bn1"], self["conv1"](x)))
        found = {}
        for name, stage in self.items():
            if name.startswith("layer"):
                x = stage(x)
            if name in self.return_layers:
                found[self.return_layers[name]] = x
        return found


class NormalizedConv(nn.Sequential):
    """A convolution, its normalization and a ReLU."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) in, (N, C', H', W') out."""
        convolution, norm, _ = self
        return rectified(norm, convolution(input))


_RESNETS = {
    "resnet18": (BasicBlock, [2, 2, 2, 2], 1, 64),
    "resnet34": (BasicBlock, [3, 4, 6, 3], 1, 64),
    "resnet50": (Bottleneck, [3, 4, 6, 3], 1, 64),
    "resnet101": (Bottleneck, [3, 4, 23, 3], 1, 64),
    "resnext101_32x8d": (Bottleneck, [3, 4, 23, 3], 32, 8),
    "resnext101_64x4d": (Bottleneck, [3, 4, 23, 3], 64, 4),
}
"""Blocks, their number per stage, groups of the 3 x 3 convolutions, and channels per group at 64 planes."""


def build_resnet(name: str, norm_layer: Callable[..., nn.Module], num_classes: int = 1000) -> ResNet:
    """A ResNet with random weights."""
    block, numbers, groups, width = _RESNETS[name]
    return ResNet(block, numbers, num_classes, groups=groups, width_per_group=width, norm_layer=norm_layer)
