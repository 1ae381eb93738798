"""Non-maximum suppression of the proposals of all images and levels at once."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import batched_nms

from horovod_megdet.layers.c_library import call


def not_suppressed(
    boxes: Tensor, scores: Tensor, valid: Tensor, level_sizes: list[int], threshold: float, training: bool
) -> Tensor:
    """Whether no better box of the same image and level that is itself kept overlaps by more than ``threshold``.

    ``boxes`` (images, n, 4) are those of the first level, then of the next, ...; each by falling ``scores`` (images,
    n). Boxes that are not ``valid`` (images, n) suppress none. Returns (images, n) bool. Intersection over union is
    compared.
    """
    boxes = boxes.masked_fill(~valid[..., None], 0)  # without area they overlap none
    if boxes.is_cuda:
        return _in_triton(boxes, level_sizes, threshold)
    # Evaluation has the operator that exported models have: with few boxes it rounds overlaps otherwise.
    if training and boxes.dtype == torch.float32:
        return _in_c(boxes, level_sizes, threshold)
    return image_by_image(boxes, scores, level_sizes, threshold)


def _in_c(boxes: Tensor, level_sizes: list[int], threshold: float) -> Tensor:
    sizes, kept = torch.tensor(level_sizes), boxes.new_empty(boxes.shape[:2], dtype=torch.bool)
    call("suppress", boxes, *kept.shape, sizes, len(sizes), threshold, torch.get_num_threads(), kept)
    return kept


def image_by_image(boxes: Tensor, scores: Tensor, level_sizes: list[int], threshold: float) -> Tensor:
    """As :func:`not_suppressed`, by torchvision's operator."""
    level = torch.cat([boxes.new_full((size,), number) for number, size in enumerate(level_sizes)])
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for of_image, image_boxes, image_scores in zip(kept, boxes, scores, strict=True):
        of_image[batched_nms(image_boxes, image_scores, level, threshold)] = True
    return kept


def _in_triton(boxes: Tensor, level_sizes: list[int], threshold: float) -> Tensor:
    # torchvision's operator goes through the boxes of an image one after the other, and its host waits for them.
    from horovod_megdet.models import suppression_gpu  # Triton comes with builds of PyTorch for GPUs only

    levels = pad_sequence([level.transpose(0, 1) for level in boxes.split(level_sizes, dim=1)])
    kept = suppression_gpu.kept(levels.permute(2, 1, 0, 3).flatten(0, 1), threshold)
    per_level = kept.view(len(boxes), len(level_sizes), -1).unbind(1)
    return torch.cat([level[:, :size] for level, size in zip(per_level, level_sizes, strict=True)], dim=1)
