"""The box head on the regions of interest, RoIs (Girshick 2015; Lin et al. 2017), of all images of a batch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection import roi_heads

from horovod_megdet.models.boxes import encode
from horovod_megdet.models.sampling import IGNORED, Targets, box_loss, image_seeds, match, padded, sample

SAMPLED_ROIS = "sampled_rois"
"""Beside the losses: how many RoIs of all images they are the mean of, () int64."""

WEIGHTS = (10.0, 5.0)
"""Of the offsets from RoIs; see :mod:`horovod_megdet.models.boxes`."""


class RoIHeads(roi_heads.RoIHeads):
    """torchvision's RoI heads; in training they sample by the images' seeds, without loops over images.

    For the same samples, losses are torchvision's.
    """

    def __init__(self, *arguments: Any, rois_per_image: int, **keywords: Any) -> None:
        super().__init__(
            *arguments,
            batch_size_per_image=rois_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=(WEIGHTS[0], WEIGHTS[0], WEIGHTS[1], WEIGHTS[1]),
            **keywords,
        )
        self.rois_per_image = rois_per_image

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """The detections of each image in evaluation; in training the losses and their count."""
        if not self.training or targets is None:
            return super().forward(features, proposals, image_shapes, targets)
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
    def _sample(self, proposals: list[Tensor], targets: Targets) -> tuple[list[Tensor], Tensor, Tensor]:
        """The sampled RoIs of each image, (k, 4), and for all of them the labels (n,) and expected offsets (n, 4)."""
        objects, object_labels = padded(targets, "boxes").to(proposals[0].dtype), padded(targets, "labels")
        matches, boxes = [], []
        for proposed, own, target in zip(proposals, objects, targets, strict=True):
            own = own[: len(target["boxes"])]
            boxes.append(torch.cat([proposed, own]))
            matches.append(match(own, boxes[-1], 0.5, 0.5, keep_best=False))
        all_matches = pad_sequence(matches, batch_first=True, padding_value=IGNORED)
        seeds = 2 * image_seeds(targets, all_matches.device) + 1  # others than the RPN's
        samples = sample(all_matches, seeds, self.rois_per_image, 0.25)
        # The head's batch normalization must see real RoIs only, so that here, once, a GPU is waited for.
        image, place = samples.valid.nonzero(as_tuple=True)
        index = samples.indices[image, place]
        rois, matched = pad_sequence(boxes, batch_first=True)[image, index], all_matches[image, index]
        positive, matched = matched >= 0, matched.clamp(min=0)
        labels = torch.where(positive, object_labels[image, matched], 0)
        expected = encode(objects[image, matched], rois, WEIGHTS)
        return list(rois.split(samples.valid.sum(dim=1).tolist())), labels, expected
