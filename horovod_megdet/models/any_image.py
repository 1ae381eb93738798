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
            original_size: int64 (2,), height and width that boxes shall be in pixels of. They are those of ``image``,
                or larger where it was decoded at a fraction of its size.

        Returns boxes float32 (k, 4) xyxy, scores float32 (k,) and labels int64 (k,), from 1.
        """
        stored_size = torch._shape_as_tensor(image)[:2].to(original_size)
        size = original_size.double()
        scale = torch.minimum(self.sides[:1] / size.amin(0, keepdim=True), self.sides[1:] / size.amax(0, keepdim=True))
        new_size = (size * scale).round().clamp(min=1)
        # Pillow's order, in which PyTorch resizes 8-bit images, too: rows, rounded, then columns. In float64 the sums
        # are exact, so that what is rounded is the same number.
        pixels = image.permute(2, 0, 1).double()
        pixels = _round(pixels @ _weights(stored_size[1:], new_size[1:]).t())
        pixels = _round(_weights(stored_size[:1], new_size[:1]) @ pixels)
        found = self._detect(pixels.float() / 255)
        ratio = (size / new_size).float().flip(0)
        return found["boxes"] * torch.cat([ratio, ratio]), found["scores"], found["labels"]

    def _detect(self, image: Tensor) -> dict[str, Tensor]:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.detector([image])[1][0]  # a scripted detector gives losses, too
        found: dict[str, Tensor] = self.detector([image])[0]
        return found


def _weights(old: Tensor, new: Tensor) -> Tensor:
    """How much each of ``old`` pixels counts in each of ``new``: (new, old), the triangle filter with antialiasing.

    As in PyTorch's ``interpolate(..., antialias=True)`` for 8-bit images they are integers below 2^15, over a power of
    2. Numbers are float64 (1,): without a dimension, the exporter to ONNX would make float32 of them.
    """
    step = old.double() / new
    center = (torch.arange(new[0], dtype=torch.float64, device=old.device) + 0.5) * step  # type: ignore[call-overload]
    pixel = torch.arange(old[0], dtype=torch.float64, device=old.device) + 0.5  # type: ignore[call-overload]
    weights = (1 - (pixel[None] - center[:, None]).abs() / step.clamp(min=1)).clamp(min=0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    largest = weights.flatten().amax(0, keepdim=True)
    power = (32767.5 / largest).log2().floor().clamp(max=22)
    unit = torch.pow(torch.full_like(power, 2), power)
    return (weights * unit + 0.5).floor() / unit


def _round(pixels: Tensor) -> Tensor:
    return (pixels + 0.5).floor().clamp(min=0, max=255)
