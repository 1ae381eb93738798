"""The keys of a configuration: typed sections, validated by pydantic.

Every amount is in images or epochs, never in iterations, so that one file is right for any number of ranks. The
docstring below a key is its documentation: ``scripts/write_configuration_docs.py`` makes docs/configuration.md of them.
"""

import hashlib
import json
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

Norm = Literal["cgbn", "local", "frozen", "none"]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The detector: ResNet + FPN + Faster R-CNN."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d"] = (
        "resnet50"
    )
    """The torchvision classification network below the FPN."""

    weights: str = "imagenet"
    """Starting weights: `imagenet` (torchvision's, from the hub cache), `none` (random), or the path of a torchvision
    classification file, a torchvision detection checkpoint, or a checkpoint of ours."""

    backbone_norm: Norm = "cgbn"
    """Normalisation of the backbone: `cgbn` (statistics over ranks), `local` (over one rank's images), `frozen` (fixed
    statistics, scale and shift) or `none`."""

    fpn_norm: Norm = "cgbn"
    """Normalisation after each FPN convolution."""

    box_head_norm: Norm = "none"
    """Normalisation in the box head. With a norm the head is four convolutions and one fully connected layer, as in
    MegDet's "4conv1fc"; with `none` it is the two fully connected layers of FPN."""

    trainable_stages: Annotated[int, Field(ge=0, le=5)] = 3
    """How many backbone stages train, counted from the last; 5 is everything, the stem included. The others are fully
    frozen: weights and normalisation statistics."""

    fpn_channels: Positive = 256
    """Channels of every FPN level."""

    box_head_channels: Positive = 1024
    """Width of the fully connected layers of the box head."""

    anchor_sizes: tuple[Positive, ...] = (32, 64, 128, 256, 512)
    """Side of the square anchor at each of the five pyramid levels P2 to P6, in pixels of the resized image."""

    anchor_aspect_ratios: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 1.0, 2.0)
    """Height / width of the anchors, at every level."""

    rpn_candidates_train: Positive = 2000
    """Highest-scoring anchors per level kept before non-maximum suppression, in training."""

    rpn_candidates_test: Positive = 1000
    """The same in evaluation."""

    proposals_train: Positive = 2000
    """Proposals per image given to the box head in training (FPN: 2000; Faster R-CNN: about 300)."""

    proposals_test: Positive = 1000
    """The same in evaluation (FPN: 1000)."""

    anchors_per_image: Positive = 256
    """Anchors per image that enter the RPN loss."""

    rois_per_image: Positive = 512
    """Proposals per image that enter the box head's loss."""

    score_threshold: Fraction = 0.05
    """Detections below this score are dropped."""

    nms_threshold: Fraction = 0.5
    """Intersection over union above which the lower-scoring of two detections of a class is dropped."""

    detections_per_image: Positive = 100
    """Detections kept per image; COCO's metrics look at 100."""

    activation_checkpointing: Literal["none", "stages", "blocks"] = "none"
    """Recompute backbone activations in the backward pass instead of keeping them (the paper's sub-linear memory)."""

    @model_validator(mode="after")
    def _five_levels(self) -> "ModelConfig":
        if len(self.anchor_sizes) != 5:
            raise ValueError("anchor_sizes needs five sizes, one for each pyramid level P2 to P6")
        return self


class BatchNormConfig(Section):
    """Cross-GPU Batch Normalization."""

    bn_size: Literal["world"] | Positive = "world"
    """Images that share statistics: `world`, or a number of images that a group of ranks holds together."""

    algorithm: Literal["one_pass", "two_pass"] = "one_pass"
    """`one_pass`: one allreduce of sums and sums of squares; `two_pass`: the paper's, the mean first."""

    momentum: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Weight of the new batch in the running statistics."""

    eps: Annotated[float, Field(gt=0.0)] = 1e-5
    """Added to the variance."""


class DataConfig(Section):
    """Images, annotations, augmentation and loading."""

    root: str = ""
    """Folder that the relative paths below start from."""

    train_annotations: str = "synthetic:train"
    """COCO JSON of the training set, or `synthetic:train` for the generated data set."""

    train_images: str = ""
    """Folder with the training images."""

    val_annotations: str = "synthetic:val"
    """COCO JSON of the validation set, or `synthetic:val`."""

    val_images: str = ""
    """Folder with the validation images."""

    synthetic_root: str = "data/synthetic"
    """Where the generated data set is written, once."""

    synthetic_train_images: Positive = 600
    """Images in the generated training set."""

    synthetic_val_images: Positive = 100
    """Images in the generated validation set."""

    keep_empty_images: bool = False
    """Train on images without annotations too."""

    bad_annotations: Literal["error", "skip"] = "error"
    """What to do with bad annotations and image files: one error at the start, or skip, count and report them."""

    check_images: Literal["open", "decode"] = "open"
    """What the check at the start does with each image file: read its header, or decode all of it."""

    shorter_side_train: tuple[Positive, ...] = (800,)
    """Shorter side after resizing, in pixels; one is drawn per image and epoch (multi-scale training)."""

    longer_side_train: Positive = 1333
    """Upper bound of the longer side after resizing, in pixels."""

    shorter_side_test: Positive = 800
    """Shorter side in evaluation."""

    longer_side_test: Positive = 1333
    """Upper bound of the longer side in evaluation."""

    horizontal_flip: Fraction = 0.5
    """Probability of a horizontal flip."""

    photometric: bool = False
    """Random brightness, contrast, saturation and hue."""

    images_per_rank: Positive = 2
    """Images in one forward pass of one rank."""

    workers: NotNegative = 4
    """Loader processes per rank; 0 loads in the main process."""


class SolverConfig(Section):
    """Mini-batch, learning rate and optimiser (the linear rule: see docs/method.md)."""

    mini_batch: Positive | None = None
    """Images per optimiser step over all ranks. Given, the ranks make as many forward passes per step as that takes;
    left out, it is ranks x images_per_rank x accumulation."""

    accumulation: Positive = 1
    """Forward passes per optimiser step, when mini_batch is left out."""

    base_lr: Annotated[float, Field(gt=0)] = 0.02
    """Learning rate at reference_batch_size; the linear rule scales it to the mini-batch that runs."""

    reference_batch_size: Positive = 16
    """The mini-batch, in images, that base_lr belongs to."""

    epochs: Annotated[float, Field(gt=0)] = 11.0
    """Passes over the training set (*normal* schedule: 11, *long*: 18)."""

    warmup_epochs: Annotated[float, Field(ge=0)] = 0.5
    """Epochs over which the learning rate rises linearly, step by step, from base_lr (k = 1) to k x base_lr."""

    warmup_start: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Where the warm-up starts, as a part of base_lr; below 1 it also eases in a mini-batch of the reference size."""

    milestones: tuple[Annotated[float, Field(gt=0)], ...] = (8.0, 10.0)
    """Epochs at which the learning rate is multiplied by the gamma in the same place."""

    gammas: tuple[Annotated[float, Field(gt=0)], ...] = (0.1, 0.1)
    """Factors of the milestones."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""

    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Weight decay of the weights; norms and biases have none."""

    clip_gradient_norm: Annotated[float, Field(gt=0)] | None = None
    """Upper bound of the gradient's L2 norm after averaging; left out, no clipping."""

    compression: Literal["none", "fp16"] = "none"
    """Send gradients as float32 or as float16."""

    @model_validator(mode="after")
    def _fits_together(self) -> "SolverConfig":
        if len(self.milestones) != len(self.gammas):
            raise ValueError(
                f"milestones has {len(self.milestones)} entries and gammas {len(self.gammas)}: "
                "give one gamma for each milestone"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones must rise")
        if self.mini_batch is not None and self.accumulation != 1:
            raise ValueError("give mini_batch or accumulation, not both: accumulation follows from mini_batch")
        return self


class RuntimeConfig(Section):
    """How a run uses the machine."""

    seed: NotNegative = 0
    """Seed of the weights, the order of images, augmentation and sampling."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU with the number of the local rank where there is one."""

    threads_per_rank: NotNegative = 0
    """CPU threads of a rank; 0 divides the host's cores among its ranks."""

    bind_cores: bool = True
    """Give each rank of a host cores of its own, where the launcher has not."""

    amp: Literal["none", "bfloat16", "float16"] = "none"
    """Automatic mixed precision; float16 (with loss scaling) is for GPUs."""

    channels_last: bool | Literal["auto"] = "auto"
    """Store activations with channels last, which GPUs with mixed precision prefer; `auto` does so on GPUs only."""

    deterministic: bool = False
    """Fix the order of all sums, so that runs with more than two ranks repeat bit for bit. Slower."""

    stall_timeout: Annotated[float, Field(ge=0.0)] = 600.0
    """Seconds after which a job ends in which no rank gets on, naming what each is stuck in; 0 waits for ever. Longer
    than the longest step, and than what one rank does alone while the others wait, such as COCO's metrics."""


class OutputConfig(Section):
    """What a run writes, and when."""

    run_dir: str = "runs/demo"
    """Folder of the run: checkpoints, metrics, detections, pictures."""

    log_every_images: Positive = 320
    """Images between two lines of metrics."""

    checkpoint_every_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between two checkpoints."""

    keep_checkpoints: Positive = 3
    """Newest checkpoints that are kept, besides the best one."""

    evaluate_every_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between two evaluations; the last step always evaluates."""

    pictures: NotNegative = 16
    """Validation images drawn with ground truth and detections."""


class Config(Section):
    """The whole configuration of a run."""

    model: ModelConfig = ModelConfig()
    batch_norm: BatchNormConfig = BatchNormConfig()
    data: DataConfig = DataConfig()
    solver: SolverConfig = SolverConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    output: OutputConfig = OutputConfig()

    def fingerprint(self) -> str:
        """SHA-256 of all values: equal on every rank of a run."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved configuration, complete and without ``base``, in a form that :func:`load_config` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def section_type(name: str) -> type[Section]:
    """The class of a section, which holds its keys."""
    section = Config.model_fields[name].annotation
    assert isinstance(section, type)
    assert issubclass(section, Section)
    return section
