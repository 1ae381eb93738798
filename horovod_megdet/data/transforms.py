"""Resizing and augmentation of uint8 images and their boxes; every random number comes from an explicit generator."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from horovod_megdet.config import DataConfig

BRIGHTNESS = 0.125
"""Largest relative change of brightness, contrast, saturation and hue (SSD's values)."""
CONTRAST = 0.5
SATURATION = 0.5
HUE = 0.05


@dataclass(frozen=True)
class DetectionTransform:
    """Multi-scale resizing, horizontal flip and photometric distortion.

    All random numbers come from the generator that the caller passes, so that an image's augmentation depends on
    nothing else.
    """

    shorter_sides: tuple[int, ...]
    longer_side: int
    horizontal_flip: float = 0.0
    photometric: bool = False

    def draw_size(self, size: tuple[int, int], generator: torch.Generator) -> tuple[int, int]:
        """Draws the shorter side; returns the size ``(height, width)`` that an image of ``size`` is resized to."""
        choice = int(torch.randint(len(self.shorter_sides), (), generator=generator))
        return fit_size(size, self.shorter_sides[choice], self.longer_side)

    def apply(
        self,
        image: Tensor,
        boxes: Tensor,
        size: tuple[int, int],
        new_size: tuple[int, int],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Resizes to ``new_size`` and augments.

        ``image`` is uint8 (3, h, w), of any resolution; ``boxes`` float32 (k, 4) xyxy in the pixels of an image of
        ``size = (height, width)``. Returns the uint8 image (3, *new_size), which may not be contiguous, and the boxes
        in its pixels.
        """
        if self.photometric:
            # Before resizing: training sizes tend to exceed those of the files, and distortion is the costliest step.
            image = distort(image, generator)
        image = F.resize(image, list(new_size), antialias=True)
        ratio_y, ratio_x = new_size[0] / size[0], new_size[1] / size[1]
        boxes = boxes * boxes.new_tensor([ratio_x, ratio_y, ratio_x, ratio_y])
        if torch.rand((), generator=generator) < self.horizontal_flip:
            image = F.horizontal_flip(image)
            boxes = torch.stack([new_size[1] - boxes[:, 2], boxes[:, 1], new_size[1] - boxes[:, 0], boxes[:, 3]], dim=1)
        return image, boxes


def training_transform(data: DataConfig) -> DetectionTransform:
    """The random transform for training."""
    return DetectionTransform(data.shorter_side_train, data.longer_side_train, data.horizontal_flip, data.photometric)


def evaluation_transforms(data: DataConfig, scales: tuple[int, ...]) -> list[DetectionTransform]:
    """The transforms for evaluation at several shorter sides; without ``scales`` at that of the configuration.

    The upper bound of the longer side grows and shrinks with the shorter side.
    """
    bound, side_test = data.longer_side_test, data.shorter_side_test
    return [DetectionTransform((side,), round(bound * side / side_test)) for side in scales or (side_test,)]


def fit_size(size: tuple[int, int], shorter_side: int, longer_side: int) -> tuple[int, int]:
    """Scales ``(height, width)`` to a shorter side, or to less if the longer side would exceed its upper bound."""
    scale = min(shorter_side / min(size), longer_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def distort(image: Tensor, generator: torch.Generator) -> Tensor:
    """Random brightness, contrast, saturation and hue of a uint8 image (3, h, w)."""
    brightness, contrast, saturation, hue = (2 * torch.rand(4, generator=generator) - 1).tolist()
    image = F.adjust_brightness(image, 1 + BRIGHTNESS * brightness)
    image = F.adjust_contrast(image, 1 + CONTRAST * contrast)
    image = F.adjust_saturation(image, 1 + SATURATION * saturation)
    return F.adjust_hue(image, HUE * hue)
