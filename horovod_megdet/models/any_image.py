"""A detector that takes photos as they are: resizing and scaling back are inside, for export."""

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FasterRCNN


class AnyImage(nn.Module):
    """A detector around which an image of any size is resized as in an evaluation, and boxes are scaled back.

    Can be scripted and traced. Image and result are on the detector's device.
    """

    def __init__(self, detector: FasterRCNN, shorter_side: int, longer_side: int) -> None:
        super().__init__()
        self.detector = detector
        self.sides: Tensor
        self.register_buffer("sides", torch.tensor([shorter_side, longer_side], dtype=torch.float64))

    def forward(self, image: Tensor, original_size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The detections in one image, by falling score.

        Args:
            image: uint8 (H, W, 3), RGB.
            original_size: int64 (2,), height and width of the image that boxes shall be in pixels of, where ``image``
                has been decoded at a fraction of its size; zeros stand for the size of ``image``.

        Returns boxes float32 (k, 4) xyxy, scores float32 (k,) and labels int64 (k,), from 1.
        """
        stored_size = torch._shape_as_tensor(image)[:2].to(original_size)
        size = torch.where(original_size > 0, original_size, stored_size).double()
        scale = torch.minimum(self.sides[0] / size.min(), self.sides[1] / size.max())
        new_size = (size * scale).round().clamp(min=1)
        pixels = image.permute(2, 0, 1).float()
        # Pillow's order, in which PyTorch resizes 8-bit images, too: rows, rounded, then columns.
        pixels = _round(pixels @ _weights(stored_size[1], new_size[1]).t())
        pixels = _round(_weights(stored_size[0], new_size[0]) @ pixels)
        found = self._detect(pixels / 255)
        ratio = (size / new_size).float().flip(0)
        return found["boxes"] * torch.cat([ratio, ratio]), found["scores"], found["labels"]

    def _detect(self, image: Tensor) -> dict[str, Tensor]:
        if torch.jit.is_scripting():
            return self.detector([image])[1][0]  # a scripted detector gives losses, too
        found: dict[str, Tensor] = self.detector([image])[0]
        return found


def _weights(old: Tensor, new: Tensor) -> Tensor:
    """How much each of ``old`` pixels counts in each of ``new``: (new, old), the triangle filter with antialiasing.

    As in PyTorch's ``interpolate(..., antialias=True)`` for 8-bit images they are integers below 2^15, over a power of 2.
    """
    step = old.double() / new
    center = (torch.arange(new, dtype=torch.float64, device=old.device) + 0.5) * step
    pixel = torch.arange(old, dtype=torch.float64, device=old.device) + 0.5
    weights = (1 - (pixel[None] - center[:, None]).abs() / step.clamp(min=1)).clamp(min=0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    unit = torch.pow(2.0, (32767.5 / weights.max()).log2().floor().clamp(max=22))
    return ((weights * unit + 0.5).floor() / unit).float()


def _round(pixels: Tensor) -> Tensor:
    return (pixels + 0.5).floor().clamp(min=0, max=255)
