"""The region proposal network (Ren et al. 2015), computed for all images of a batch together."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from horovod_megdet.models.boxes import decode, encode
from horovod_megdet.models.sampling import Objects, Proposals, Targets, box_loss, image_seeds, match, sample, take
from horovod_megdet.models.suppression import not_suppressed

SAMPLED_ANCHORS = "sampled_anchors"
"""Beside the losses: how many anchors of all images they are the mean of, () int64."""

WEIGHTS = (1.0, 1.0)
"""Of the offsets from anchors; see :mod:`horovod_megdet.models.boxes`."""

POSITIVE_FRACTION = 0.5
"""Of the sampled anchors, at most."""


class RPN(RegionProposalNetwork):
    """torchvision's RPN without its loops over images; in training it samples by the images' seeds.

    For the same samples, losses and proposals are torchvision's. Anchors have the type of the offsets: torchvision's
    have that of the features, and 16 bits are too few for pixels.
    """

    def __init__(self, *arguments: Any, anchors_per_image: int, **keywords: Any) -> None:
        super().__init__(
            *arguments, batch_size_per_image=anchors_per_image, positive_fraction=POSITIVE_FRACTION, **keywords
        )
        self.anchors_per_image = anchors_per_image

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: Targets | None = None
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """The proposals by falling objectness, and in training the losses and their count."""
        levels = list(features.values())
        objectness_levels, offset_levels = self.head(levels)
        anchor_levels = self._anchors(images.tensors, levels, offset_levels[0].dtype)
        anchors = torch.cat(anchor_levels)
        objectness, offsets = concat_box_prediction_layers(objectness_levels, offset_levels)
        objectness, offsets = objectness.view(-1, len(anchors)), offsets.view(-1, len(anchors), 4)
        losses = {}
        if self.training and targets is not None:
            losses = self._losses(anchors, objectness, offsets, targets)
        sizes = [len(level) for level in anchor_levels]
        return self._proposals(anchors, objectness.detach(), offsets.detach(), sizes, images.image_sizes), losses

    def _anchors(self, images: Tensor, levels: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The anchors of each level, (n, 4); the same for all images."""
        (height, width), grids = images.shape[-2:], [level.shape[-2:] for level in levels]
        self.anchor_generator.set_cell_anchors(dtype, images.device)
        strides = [[height // rows, width // columns] for rows, columns in grids]
        anchors: list[Tensor] = self.anchor_generator.grid_anchors(grids, strides)
        return anchors

    def _losses(self, anchors: Tensor, objectness: Tensor, offsets: Tensor, targets: Targets) -> dict[str, Tensor]:
        objects = Objects.of(targets, anchors.dtype)
        matcher = self.proposal_matcher
        matches = match(objects, anchors[None], matcher.high_threshold, matcher.low_threshold, keep_best=True)
        samples = sample(matches, 2 * image_seeds(targets, anchors.device), self.anchors_per_image, POSITIVE_FRACTION)
        matches = matches.gather(1, samples.indices)
        positive = samples.valid & (matches >= 0)
        expected = encode(take(objects.boxes, matches.clamp(min=0)), anchors[samples.indices], WEIGHTS)
        count = samples.valid.sum()
        logits = objectness.gather(1, samples.indices)
        entropy = F.binary_cross_entropy_with_logits(logits, positive.to(logits), samples.valid, reduction="sum")
        return {
            "loss_objectness": entropy / count.clamp(min=1),
            "loss_rpn_box_reg": box_loss(take(offsets, samples.indices), expected, positive) / count.clamp(min=1),
            SAMPLED_ANCHORS: count,
        }

    @torch.no_grad()
    def _proposals(
        self,
        anchors: Tensor,
        objectness: Tensor,
        offsets: Tensor,
        level_sizes: list[int],
        image_sizes: list[tuple[int, int]],
    ) -> Proposals:
        """The best anchors of each level, moved by their offsets, without those that others suppress."""
        top = self._get_top_n_idx(objectness, level_sizes)
        boxes = decode(take(offsets, top), anchors[top], WEIGHTS)
        limits = torch.tensor([[width, height] * 2 for height, width in image_sizes], dtype=boxes.dtype)
        boxes = boxes.clamp(min=0).minimum(limits.to(boxes.device, non_blocking=True)[:, None])
        scores = objectness.gather(1, top).sigmoid()
        large = (boxes[..., 2:] - boxes[..., :2] >= self.min_size).all(dim=2)
        sizes = [min(size, self.pre_nms_top_n()) for size in level_sizes]
        kept = not_suppressed(boxes, scores, large, sizes, self.nms_thresh, self.training)
        scores = scores.masked_fill(~(large & kept), -1)
        best, places = scores.topk(min(self.post_nms_top_n(), scores.shape[1]))
        return Proposals(take(boxes, places), best >= 0)
