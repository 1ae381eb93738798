"""The detector: torchvision's Faster R-CNN on a ResNet and FPN with the chosen norms."""

import math
import sys
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from horovod_megdet import comm
from horovod_megdet.config import BatchNormConfig, ModelConfig
from horovod_megdet.layers.kernels import widened
from horovod_megdet.layers.roi_align import TrainedRoIAlign
from horovod_megdet.models.backbone import build_backbone
from horovod_megdet.models.box_head import ROI_SIZE, Predictor, build_box_head
from horovod_megdet.models.norms import Norms
from horovod_megdet.models.roi_heads import SAMPLED_ROIS, RoIHeads
from horovod_megdet.models.rpn import RPN, SAMPLED_ANCHORS

IMAGE_MEAN = [0.485, 0.456, 0.406]
IMAGE_STD = [0.229, 0.224, 0.225]

Pool = TypeVar("Pool", bound=MultiScaleRoIAlign)

SIZE_DIVISIBLE = 32
"""The detector pads images to multiples of this, in pixels: the stride of P5."""

COCO_CLASSES = 80
"""Used where the size of a detector matters, which hardly depends on the number of classes."""

COUNT_OF_LOSS = {
    "loss_objectness": SAMPLED_ANCHORS,
    "loss_rpn_box_reg": SAMPLED_ANCHORS,
    "loss_classifier": SAMPLED_ROIS,
    "loss_box_reg": SAMPLED_ROIS,
}
"""The losses, and what each is the mean over."""


@dataclass(frozen=True)
class Losses:
    """The losses of one forward pass, and how many samples each is the mean of.

    The loss of a larger batch that this one is a part of is the mean of the parts' losses weighted by their counts.
    """

    values: dict[str, Tensor]
    """``loss_objectness``, ``loss_rpn_box_reg`` (mean over the sampled anchors), ``loss_classifier`` and
    ``loss_box_reg`` (mean over the sampled RoIs): 0-d float tensors. A loss without samples is 0."""
    counts: dict[str, Tensor]
    """The number of samples of each, on this rank: () int64, on the losses' device."""


class Detector(GeneralizedRCNN):
    """Faster R-CNN whose losses can be put together over ranks, and whose sampling depends on the image alone.

    Images are a list of (3, H, W) tensors, uint8 or float in [0, 1], of the size that the network shall see. The state
    dict has the keys of torchvision's detection models.
    """

    def forward_losses(self, images: list[Tensor], targets: list[dict[str, Any]]) -> Losses:
        """The losses in training mode. Collective within the group of the normalization layers.

        Each target has ``boxes`` (k, 4) float xyxy in pixels of the image, ``labels`` (k,) int64 from 1, and ``seed``,
        an int that decides which anchors and RoIs of the image are sampled.
        """
        batch, _ = self.transform(images)
        features = self.backbone(batch.tensors)
        proposals, of_anchors = self.rpn(batch, features, targets)
        _, of_rois = self.roi_heads(features, proposals, batch.image_sizes, targets)
        found = of_anchors | of_rois
        return Losses(
            {name: found[name] for name in COUNT_OF_LOSS},
            {name: found[count] for name, count in COUNT_OF_LOSS.items()},
        )

    @torch.no_grad()
    def evaluation_losses(self, images: list[Tensor], targets: list[dict[str, Any]]) -> Losses:
        """:meth:`forward_losses` in evaluation mode, with the running statistics; does not communicate."""
        assert not self.training, "evaluation_losses() needs eval()"
        heads = (self.rpn, self.roi_heads)
        try:
            for head in heads:
                head.training = True  # of the head itself: the layers in it stay in evaluation mode
            return self.forward_losses(images, targets)
        finally:
            for head in heads:
                head.training = False

    @torch.no_grad()
    def predict(self, images: list[Tensor], suppress: bool = True) -> list[dict[str, Tensor]]:
        """The detections in evaluation mode; does not communicate.

        For each image ``boxes`` (k, 4) float32 xyxy in its pixels, ``labels`` (k,) int64 from 1 and ``scores`` (k,)
        float32, by falling score. Without ``suppress`` these are all candidates above the lowest score: however much
        they overlap, and however many they are.
        """
        assert not self.training, "predict() needs eval()"
        heads = self.roi_heads
        limits = heads.nms_thresh, heads.detections_per_img
        try:
            if not suppress:
                heads.nms_thresh, heads.detections_per_img = math.inf, sys.maxsize
            detections: list[dict[str, Tensor]] = self(images)
            return detections
        finally:
            heads.nms_thresh, heads.detections_per_img = limits


def build_detector(
    model: ModelConfig,
    batch_norm: BatchNormConfig,
    num_classes: int,
    *,
    group: comm.Group | None = None,
    channels_last: bool = False,
) -> Detector:
    """Builds the detector with random weights; :func:`~horovod_megdet.models.weights.load_weights` loads others.

    ``num_classes`` does not count the background. ``group`` are the ranks that share statistics in ``cgbn`` layers
    (:func:`~horovod_megdet.models.norms.bn_group`), all by default. ``channels_last`` is the layout of activations and
    of the convolutions' weights. All ranks have to build the same detector.
    """
    norms = Norms(batch_norm, group)
    backbone = build_backbone(model, norms)
    rpn = _build_rpn(model)
    roi_heads = _build_roi_heads(model, norms, num_classes)
    detector = Detector(backbone, rpn, roi_heads, _Transform(channels_last))
    return detector.to(memory_format=torch.channels_last) if channels_last else detector


def build_anchors(model: ModelConfig) -> AnchorGenerator:
    """The anchors of all levels."""
    return AnchorGenerator(
        sizes=tuple((size,) for size in model.anchor_sizes),
        aspect_ratios=(tuple(model.anchor_aspect_ratios),) * len(model.anchor_sizes),
    )


def _build_rpn(model: ModelConfig) -> RPN:
    anchors = build_anchors(model)
    return RPN(
        anchors,
        _RPNHead(model.fpn_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        anchors_per_image=model.anchors_per_image,
        pre_nms_top_n={"training": model.rpn_candidates_train, "testing": model.rpn_candidates_test},
        post_nms_top_n={"training": model.proposals_train, "testing": model.proposals_test},
        nms_thresh=0.7,
    )


def _build_roi_heads(model: ModelConfig, norms: Norms, num_classes: int) -> RoIHeads:
    return RoIHeads(
        _build_roi_pool(model),
        build_box_head(model, norms),
        Predictor(model.box_head_channels, num_classes + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        rois_per_image=model.rois_per_image,
        score_thresh=model.score_threshold,
        nms_thresh=model.nms_threshold,
        detections_per_img=model.detections_per_image,
    )


def _build_roi_pool(model: ModelConfig) -> TrainedRoIAlign:
    scale = canonical_scale(model)
    return with_fpn_scales(
        TrainedRoIAlign(["0", "1", "2", "3"], output_size=ROI_SIZE, sampling_ratio=2, canonical_scale=scale)
    )


def canonical_scale(model: ModelConfig) -> int:
    """Side of the RoIs on P4. FPN puts those of 224 pixels there, whose anchors have 128; others scale it alike."""
    return round(model.anchor_sizes[2] * 224 / 128)


def with_fpn_scales(pool: Pool) -> Pool:
    """Sets what RoIAlign on P2 to P5 needs to know of them.

    torchvision would guess the strides from the first batch, wrongly if its images are small, and keep them: a resumed
    run, whose first batch is another one, would go on differently.
    """
    pool.scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    pool.map_levels = LevelMapper(2, 5, canonical_scale=pool.canonical_scale)
    return pool


class _Transform(GeneralizedRCNNTransform):
    """Normalizes and pads; the images come in the size that the network shall see.

    With ``channels_last`` the batch has that layout, which the convolutions pass on.
    """

    def __init__(self, channels_last: bool) -> None:
        super().__init__(0, 0, IMAGE_MEAN, IMAGE_STD)
        self.channels_last = channels_last
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        for name, values in (("pixel_mean", IMAGE_MEAN), ("pixel_std", IMAGE_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[ImageList, Any]:
        """The images as one batch, padded with 0 to a multiple of :data:`SIZE_DIVISIBLE`; the targets as they are."""
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        batch = self._normalized(self.batch_images(images, self.size_divisible))
        for image, (height, width) in zip(batch, sizes, strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return ImageList(batch, sizes), targets

    def batch_images(self, images: list[Tensor], size_divisible: int = SIZE_DIVISIBLE) -> Tensor:
        """The images in one tensor (n, 3, H, W) of their type."""
        height, width = (
            math.ceil(max(image.shape[side] for image in images) / size_divisible) * size_divisible for side in (1, 2)
        )
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        size = (len(images), 3, height, width)
        batch = torch.empty(size, dtype=images[0].dtype, device=images[0].device, memory_format=layout).zero_()
        for place, image in zip(batch, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]].copy_(image)
        return batch

    def _normalized(self, batch: Tensor) -> Tensor:
        pixels = batch.to(self.pixel_mean)
        pixels = pixels / 255 if batch.dtype == torch.uint8 else pixels
        return (pixels - self.pixel_mean) / self.pixel_std


class _RPNHead(RPNHead):
    """Gives float32 under autocast: torchvision rounds anchors to the type of the deltas; 16 bits are too coarse."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [widened(level) for level in logits], [widened(level) for level in deltas]
