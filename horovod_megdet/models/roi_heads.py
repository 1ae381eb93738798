"""The box head on the regions of interest, RoIs (Girshick 2015; Lin et al. 2017), of all images of a batch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection import roi_heads

from horovod_megdet.models.boxes import encode
from horovod_megdet.models.sampling import IGNORED, Objects, Proposals, Targets, box_loss, image_seeds, match, sample

SAMPLED_ROIS = "sampled_rois"
"""Beside the losses: how many RoIs of all images they are the mean of, () int64."""

WEIGHTS = (10.0, 5.0)
"""Of the offsets from RoIs; see :mod:`horovod_megdet.models.boxes`."""

POSITIVE_FRACTION = 0.25
"""Of the sampled RoIs, at most."""


class RoIHeads(roi_heads.RoIHeads):
    """torchvision's RoI heads; in training they sample by the images' seeds, without loops over images.

    For the same samples, losses are torchvision's.
    """

    def __init__(self, *arguments: Any, rois_per_image: int, **keywords: Any) -> None:
        super().__init__(
            *arguments,
            batch_size_per_image=rois_per_image,
            positive_fraction=POSITIVE_FRACTION,
            bbox_reg_weights=(WEIGHTS[0], WEIGHTS[0], WEIGHTS[1], WEIGHTS[1]),
            **keywords,
        )
        self.rois_per_image = rois_per_image

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: Proposals,
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """The detections of each image in evaluation; in training the losses and their count."""
        if not self.training or targets is None:
            return super().forward(features, proposals.of_each_image(), image_shapes, targets)
        rois, labels, expected = self._sample(proposals, targets)
        pooled = self.box_roi_pool(features, rois, image_shapes)
        logits, offsets = self.box_predictor(self.box_head(pooled))
        of_label = labels[:, None, None].expand(-1, 1, 4)
        offsets = offsets.view(*logits.shape, 4).gather(1, of_label).squeeze(1)
        count = max(1, len(labels))
        return [], {
            "loss_classifier": F.cross_entropy(logits, labels, reduction="sum") / count,
            "loss_box_reg": box_loss(offsets, expected, labels > 0) / count,
            SAMPLED_ROIS: torch.full((), len(labels), device=logits.device),
        }

    @torch.no_grad()
    def _sample(self, proposals: Proposals, targets: Targets) -> tuple[list[Tensor], Tensor, Tensor]:
        """The sampled RoIs of each image, (k, 4), and for all of them the labels (n,) and expected offsets (n, 4)."""
        objects = Objects.of(targets, proposals.boxes.dtype)
        boxes = torch.cat([proposals.boxes, objects.boxes], dim=1)
        valid = torch.cat([proposals.valid, objects.valid], dim=1)
        matcher = self.proposal_matcher
        matches = match(objects, boxes, matcher.high_threshold, matcher.low_threshold, keep_best=False)
        matches = matches.masked_fill_(~valid, IGNORED)
        seeds = 2 * image_seeds(targets, boxes.device) + 1  # others than the RPN's
        samples = sample(matches, seeds, self.rois_per_image, POSITIVE_FRACTION)
        # The head's batch normalization must see real RoIs only, so that here, once, a GPU is waited for.
        counts = samples.valid.sum(dim=1).tolist()
        image, place = samples.valid.nonzero(as_tuple=True)
        index = samples.indices[image, place]
        rois, matched = boxes[image, index], matches[image, index]
        positive, matched = matched >= 0, matched.clamp(min=0)
        labels = torch.where(positive, objects.labels[image, matched], 0)
        return list(rois.split(counts)), labels, encode(objects.boxes[image, matched], rois, WEIGHTS)
