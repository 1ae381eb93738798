"""torchvision's own Faster R-CNN that detects what a detector of ours detects: for export."""

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import get_model
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from horovod_megdet.config import DataConfig, ModelConfig, Norm
from horovod_megdet.models.backbone import add_biases, with_fpn
from horovod_megdet.models.box_head import ROI_SIZE
from horovod_megdet.models.detector import build_anchors, canonical_scale, with_fpn_scales

EPS = 1e-5
"""Of torchvision's normalization layers."""


def torchvision_detector(
    model: ModelConfig, data: DataConfig, weights: dict[str, Tensor], eps: float, num_classes: int
) -> FasterRCNN:
    """The detector with the ``weights`` of one of ours, in evaluation mode.

    All of it is torchvision's. Norms of any kind become ``BatchNorm2d``, whose ``eps`` is torchvision's, 1e-5: their
    variances make up for another one. Those of the FPN are folded into its convolutions, as torchvision's has none.
    Images have the size that the network shall see.
    """
    resnet = get_model(model.backbone, weights=None, norm_layer=_layer(model.backbone_norm) or nn.Identity)
    if model.backbone_norm == "none":
        add_biases(resnet)
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], ROI_SIZE, 2, canonical_scale=canonical_scale(model))
    detector = FasterRCNN(
        with_fpn(resnet, model.fpn_channels, _layer(model.fpn_norm)),
        min_size=data.shorter_side_test,
        max_size=data.longer_side_test,
        rpn_anchor_generator=build_anchors(model),
        rpn_pre_nms_top_n_test=model.rpn_candidates_test,
        rpn_post_nms_top_n_test=model.proposals_test,
        box_roi_pool=with_fpn_scales(pool),
        box_head=_box_head(model),
        box_predictor=FastRCNNPredictor(model.box_head_channels, num_classes + 1),
        box_score_thresh=model.score_threshold,
        box_nms_thresh=model.nms_threshold,
        box_detections_per_img=model.detections_per_image,
        _skip_resize=True,
    )
    detector.load_state_dict(
        {name: value + (eps - EPS) if name.endswith("running_var") else value for name, value in weights.items()}
    )
    detector.eval()
    _fold(detector.backbone.fpn)
    return detector


def _layer(norm: Norm) -> type[nn.BatchNorm2d] | None:
    return None if norm == "none" else nn.BatchNorm2d


def _box_head(model: ModelConfig) -> nn.Module:
    channels = model.fpn_channels
    if model.box_head_norm == "none":
        return TwoMLPHead(channels * ROI_SIZE**2, model.box_head_channels)
    size = (channels, ROI_SIZE, ROI_SIZE)
    return FastRCNNConvFCHead(size, [channels] * 4, [model.box_head_channels], nn.BatchNorm2d)


def _fold(fpn: FeaturePyramidNetwork) -> None:
    """Makes one convolution of each convolution and its norm."""
    for block in (*fpn.inner_blocks, *fpn.layer_blocks):
        if len(block) > 1:
            block[0] = fuse_conv_bn_eval(block[0], block[1])
            del block[1]
