"""RoIAlign on the levels of a feature pyramid, with a gradient of our own for training on CPUs.

torchvision's operator adds up its gradient one number at a time, which takes a sixth of a training step on a CPU core.
``roi_align_cpu.c`` adds runs of channels, in the same order, so that float32 results have the same bits. It also fills
in all levels in one go, where torchvision copies the RoIs of each level into place, and reads and writes 16-bit types
and both memory layouts as they are.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.ops import MultiScaleRoIAlign

from horovod_megdet.layers.c_library import TYPES, call
from horovod_megdet.layers.kernels.layout import dense


class TrainedRoIAlign(MultiScaleRoIAlign):
    """torchvision's ``MultiScaleRoIAlign``; in training on the CPU it is computed in C, both ways.

    Features are (N, C, H_l, W_l) per level, boxes a list of (k, 4) xyxy in pixels per image; the result is (sum k, C,
    size, size) in the features' type. Evaluation, GPUs, float64, and features of several types have torchvision's
    operator. Second derivatives are refused. ``output_size`` is one number, ``sampling_ratio`` is above 0, and
    ``scales`` and ``map_levels`` have to be set.
    """

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """As torchvision's."""
        features = [x[name] for name in self.featmap_names]
        assert self.scales is not None
        assert self.map_levels is not None
        if not (self.training and _for_c(features)) or torchvision._is_tracing():
            pooled: Tensor = super().forward(x, boxes, image_shapes)
            return pooled
        images = [torch.full_like(of_image[:, :1], index) for index, of_image in enumerate(boxes)]
        rois = torch.cat([torch.cat(images), torch.cat(boxes)], dim=1).float()
        regions = _Regions(rois, self.map_levels(boxes), self.scales, self.output_size[0], self.sampling_ratio)
        result: Tensor = _RoIAlign.apply(regions, *features)
        return result


def _for_c(features: list[Tensor]) -> bool:
    types = {level.dtype for level in features}
    return len(types) == 1 and types <= TYPES.keys() and all(level.device.type == "cpu" for level in features)


@dataclass(frozen=True)
class _Regions:
    """RoIs, and how they are pooled."""

    boxes: Tensor
    """(K, 5) float32: the image, x1, y1, x2, y2 in its pixels."""
    levels: Tensor
    """(K,) int64."""
    scales: list[float]
    """Pixels of each level's map per pixel of the image."""
    size: int
    """Bins along each side of a RoI."""
    samples: int
    """Samples along each side of a bin."""

    def call(self, function: str, source: Tensor, features: Tensor, level: int, result: Tensor) -> None:
        """Calls a function of ``roi_align_cpu.c``; ``features`` has the shape and layout of the level's map."""
        call(
            function, source, TYPES[features.dtype], *features.shape, not features.is_contiguous(),
            self.boxes, self.levels, len(self.boxes), level, self.scales[level], self.size, self.samples,
            torch.get_num_threads(), result,
        )  # fmt: skip


class _RoIAlign(torch.autograd.Function):
    """Of the features of all levels."""

    @staticmethod
    def forward(ctx: Any, regions: _Regions, *features: Tensor) -> Tensor:
        ctx.regions = regions
        # Only shapes and layouts are needed again, not the values.
        ctx.like = [torch.empty_like(level, device="meta") for level in map(dense, features)]
        pooled = features[0].new_empty(len(regions.boxes), features[0].shape[1], regions.size, regions.size)
        for level, of_level in enumerate(map(dense, features)):
            regions.call("roi_align", of_level, of_level, level, pooled)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * len(ctx.like)
        for level, like in enumerate(ctx.like):
            if ctx.needs_input_grad[1 + level]:
                gradients[level] = of_level = torch.empty_like(like, device="cpu")
                ctx.regions.call("roi_align_backward", gradient.contiguous(), of_level, level, of_level)
        return None, *gradients
