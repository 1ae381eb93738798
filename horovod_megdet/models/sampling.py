"""Sampling of anchors and RoIs that depends on the image alone: not on ranks, nor on the other images of a batch.

torchvision's RPN and RoI heads sample from the global random generator. Here each image's samples come from its own
seed, ``targets[i]["seed"]``, and the number of samples is returned with the losses, so that the losses of several ranks
can be put together.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

Targets = list[dict[str, Any]]

SAMPLED_ANCHORS, SAMPLED_ROIS = "sampled_anchors", "sampled_rois"
"""Beside the losses: how many anchors or RoIs of all images they are the mean of."""


class SeededSampler:
    """Samples the positive and negative anchors, or RoIs, of the images of one pass."""

    def __init__(self, seeds: list[int], count: int, positive_fraction: float) -> None:
        self.seeds = seeds
        self.count = count
        self.positive_fraction = positive_fraction
        self.sampled = 0
        """The number of samples in all images so far."""

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Takes each image's labels (n,): 1 or more positive, 0 negative, -1 neither.

        Returns the uint8 masks (n,) of the sampled positive, and of the sampled negative ones.
        """
        masks = [self._sample(of_image, seed) for of_image, seed in zip(labels, self.seeds, strict=True)]
        return [positive for positive, _ in masks], [negative for _, negative in masks]

    def _sample(self, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        # On the CPU on every device, so that a GPU samples the same.
        generator = torch.Generator().manual_seed(seed % 2**63)
        positive, negative = torch.where(labels >= 1)[0], torch.where(labels == 0)[0]
        positives = min(len(positive), int(self.count * self.positive_fraction))
        negatives = min(len(negative), self.count - positives)
        self.sampled += positives + negatives
        masks = []
        for candidates, number in ((positive, positives), (negative, negatives)):
            chosen = torch.randperm(len(candidates), generator=generator)[:number].to(labels.device)
            masks.append(torch.zeros_like(labels, dtype=torch.uint8).index_fill_(0, candidates[chosen], 1))
        return masks[0], masks[1]


class SeededRPN(RegionProposalNetwork):
    """torchvision's RPN; in training it samples ``anchors_per_image`` anchors by the images' seeds."""

    def __init__(self, *arguments: Any, anchors_per_image: int, **keywords: Any) -> None:
        super().__init__(*arguments, batch_size_per_image=anchors_per_image, positive_fraction=0.5, **keywords)
        self.anchors_per_image = anchors_per_image

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: Targets | None = None
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """As torchvision's, with the number of sampled anchors beside the losses."""
        if not self.training or targets is None:
            return super().forward(images, features, targets)
        seeds = [2 * target["seed"] for target in targets]
        self.fg_bg_sampler = sampler = SeededSampler(seeds, self.anchors_per_image, 0.5)
        proposals, losses = super().forward(images, features, targets)
        return proposals, losses | {SAMPLED_ANCHORS: sampler.sampled}


class SeededRoIHeads(RoIHeads):
    """torchvision's RoI heads; in training they sample ``rois_per_image`` RoIs by the images' seeds."""

    def __init__(self, *arguments: Any, rois_per_image: int, **keywords: Any) -> None:
        super().__init__(*arguments, batch_size_per_image=rois_per_image, positive_fraction=0.25, **keywords)
        self.rois_per_image = rois_per_image

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
        """As torchvision's, with the number of sampled RoIs beside the losses."""
        if not self.training or targets is None:
            return super().forward(features, proposals, image_shapes, targets)
        seeds = [2 * target["seed"] + 1 for target in targets]  # others than the RPN's
        self.fg_bg_sampler = sampler = SeededSampler(seeds, self.rois_per_image, 0.25)
        detections, losses = super().forward(features, proposals, image_shapes, targets)
        return detections, losses | {SAMPLED_ROIS: sampler.sampled}
