"""The detector: torchvision's Faster R-CNN on a ResNet and FPN with the chosen norms."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.misc import Conv2dNormActivation
from torchvision.ops.poolers import LevelMapper

from horovod_megdet import comm
from horovod_megdet.config import BatchNormConfig, ModelConfig
from horovod_megdet.layers.kernels import widened
from horovod_megdet.layers.roi_align import TrainedRoIAlign
from horovod_megdet.models.backbone import build_backbone
from horovod_megdet.models.norms import Norms
from horovod_megdet.models.resnet import NormalizedConv
from horovod_megdet.models.sampling import SAMPLED_ANCHORS, SAMPLED_ROIS, SeededRoIHeads, SeededRPN

IMAGE_MEAN = [0.485, 0.456, 0.406]
IMAGE_STD = [0.229, 0.224, 0.225]
ROI_SIZE = 7
"""Side of the feature maps that RoIAlign cuts out."""


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
    counts: dict[str, int]
    """The number of samples of each, on this rank."""


class Detector(GeneralizedRCNN):
    """Faster R-CNN whose losses can be put together over ranks, and whose sampling depends on the image alone.

    Images are a list of (3, H, W) tensors, uint8 or float in [0, 1], of the size that the network shall see. The state
    dict has the keys of torchvision's detection models.
    """

    def forward(self, images: list[Tensor], targets: list[dict[str, Any]] | None = None) -> Any:
        """torchvision's interface; see :meth:`forward_losses` and :meth:`predict`."""
        return super().forward([self._in_unit_range(image) for image in images], targets)

    def forward_losses(self, images: list[Tensor], targets: list[dict[str, Any]]) -> Losses:
        """The losses in training mode. Collective within the group of the normalization layers.

        Each target has ``boxes`` (k, 4) float xyxy in pixels of the image, ``labels`` (k,) int64 from 1, and ``seed``,
        an int that decides which anchors and RoIs of the image are sampled.
        """
        found = self(images, targets)
        counts = {name: found[count] for name, count in COUNT_OF_LOSS.items()}
        # The mean of no samples is NaN. Zero instead, still a function of the weights: the backward pass through the
        # normalization layers is collective.
        values = {name: found[name] if count else found[name].nan_to_num() for name, count in counts.items()}
        return Losses(values, counts)

    @torch.no_grad()
    def predict(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """The detections in evaluation mode; does not communicate.

        For each image ``boxes`` (k, 4) float32 xyxy in its pixels, ``labels`` (k,) int64 from 1 and ``scores`` (k,)
        float32, by falling score.
        """
        assert not self.training, "predict() needs eval()"
        detections: list[dict[str, Tensor]] = self(images)
        return detections

    def _in_unit_range(self, image: Tensor) -> Tensor:
        dtype = self.roi_heads.box_predictor.cls_score.weight.dtype
        return image.to(dtype) / 255 if image.dtype == torch.uint8 else image.to(dtype)


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
    (:func:`~horovod_megdet.models.norms.bn_group`), all by default. ``channels_last`` is the layout of the activations.
    All ranks have to build the same detector.
    """
    norms = Norms(batch_norm, group)
    backbone = build_backbone(model, norms)
    rpn = _build_rpn(model)
    roi_heads = _build_roi_heads(model, norms, num_classes)
    return Detector(backbone, rpn, roi_heads, _Transform(channels_last))


def _build_rpn(model: ModelConfig) -> SeededRPN:
    anchors = AnchorGenerator(
        sizes=tuple((size,) for size in model.anchor_sizes),
        aspect_ratios=(tuple(model.anchor_aspect_ratios),) * len(model.anchor_sizes),
    )
    return SeededRPN(
        anchors,
        _RPNHead(model.fpn_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        anchors_per_image=model.anchors_per_image,
        pre_nms_top_n={"training": model.rpn_candidates_train, "testing": model.rpn_candidates_test},
        post_nms_top_n={"training": model.proposals_train, "testing": model.proposals_test},
        nms_thresh=0.7,
    )


def _build_roi_heads(model: ModelConfig, norms: Norms, num_classes: int) -> SeededRoIHeads:
    return SeededRoIHeads(
        _build_roi_pool(model),
        _build_box_head(model, norms),
        _Predictor(model.box_head_channels, num_classes + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        rois_per_image=model.rois_per_image,
        bbox_reg_weights=None,
        score_thresh=model.score_threshold,
        nms_thresh=model.nms_threshold,
        detections_per_img=model.detections_per_image,
    )


def _build_roi_pool(model: ModelConfig) -> TrainedRoIAlign:
    """RoIAlign on P2 to P5. FPN puts RoIs of 224 pixels on P4, whose anchors have 128; others scale it alike."""
    scale = round(model.anchor_sizes[2] * 224 / 128)
    pool = TrainedRoIAlign(["0", "1", "2", "3"], output_size=ROI_SIZE, sampling_ratio=2, canonical_scale=scale)
    # torchvision would guess the strides from the first batch, wrongly if its images are small, and keep them: a
    # resumed run, whose first batch is another one, would go on differently.
    pool.scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    pool.map_levels = LevelMapper(2, 5, canonical_scale=scale)
    return pool


def _build_box_head(model: ModelConfig, norms: Norms) -> nn.Module:
    channels = model.fpn_channels
    head: nn.Module
    if model.box_head_norm == "none":
        head = TwoMLPHead(channels * ROI_SIZE**2, model.box_head_channels)
    else:
        size = (channels, ROI_SIZE, ROI_SIZE)
        head = FastRCNNConvFCHead(size, [channels] * 4, [model.box_head_channels], norms.layer(model.box_head_norm))
        norms.finish(head, model.box_head_norm, "roi_heads.box_head")
        for name, layer in head.named_children():
            if isinstance(layer, Conv2dNormActivation):
                setattr(head, name, NormalizedConv(*layer))
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    return head


class _Transform(GeneralizedRCNNTransform):
    """Normalizes and pads; the images come in the size that the network shall see.

    With ``channels_last`` the batch has that layout, which the convolutions pass on. The weights keep theirs: Horovod
    takes contiguous tensors only.
    """

    def __init__(self, channels_last: bool) -> None:
        super().__init__(0, 0, IMAGE_MEAN, IMAGE_STD)
        self.channels_last = channels_last

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        batch = super().batch_images(images, size_divisible)
        return batch.contiguous(memory_format=torch.channels_last) if self.channels_last else batch


class _RPNHead(RPNHead):
    """Gives float32 under autocast: torchvision rounds anchors to the type of the deltas; 16 bits are too coarse."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [widened(level) for level in logits], [widened(level) for level in deltas]


class _Predictor(FastRCNNPredictor):
    """Initialized as is customary: small class logits, smaller box deltas. Float32 under autocast."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return widened(logits), widened(deltas)
