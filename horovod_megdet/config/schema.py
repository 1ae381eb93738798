"""The keys of a configuration: typed sections, validated by pydantic.

Every amount is in images or epochs, never in iterations, so that one file is right for any number of ranks. The
docstring below a key is its documentation: ``scripts/write_configuration_docs.py`` makes docs/configuration.md of them.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

Norm = Literal["cgbn", "local", "frozen", "none"]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """What all sections share: unknown keys are errors, and values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The detector: ResNet + FPN + Faster R-CNN."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d"] = (
        "resnet50"
    )
    """The torchvision classification network below the FPN."""

    weights: str = "imagenet"
    """Initial weights: `imagenet` (torchvision's, from the hub cache), `none` (random), or the path of a torchvision
    classification file, a torchvision detection checkpoint, or a checkpoint of ours."""

    backbone_norm: Norm = "cgbn"
    """Normalization of the backbone: `cgbn` (statistics over ranks), `local` (over one rank's images), `frozen` (fixed
    statistics, scale and shift) or `none`."""

    fpn_norm: Norm = "cgbn"
    """Normalization after each FPN convolution."""

    box_head_norm: Norm = "none"
    """Normalization in the box head. With a norm the head is four convolutions and one fully connected layer, as in
    MegDet's "4conv1fc"; with `none` it is the two fully connected layers of FPN."""

    trainable_stages: Annotated[int, Field(ge=0, le=5)] = 3
    """How many backbone stages train, counted from the last; 5 means all, including the stem. The others are frozen
    completely: weights and normalization statistics."""

    fpn_channels: Positive = 256
    """Channels of every FPN level."""

    box_head_channels: Positive = 1024
    """Width of the fully connected layers of the box head."""

    anchor_sizes: tuple[Positive, ...] = (32, 64, 128, 256, 512)
    """Side of the square anchor at each of the five pyramid levels P2 to P6, in pixels of the resized image."""

    anchor_aspect_ratios: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (0.5, 1.0, 2.0)
    """Height / width of the anchors, at every level."""

    rpn_candidates_train: Positive = 2000
    """Highest-scoring anchors per level that enter non-maximum suppression, in training."""

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
    """Detections kept per image; COCO's metrics use 100."""

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
    """Folder that the generated data set is written to, once."""

    synthetic_train_images: Positive = 600
    """Images in the generated training set."""

    synthetic_val_images: Positive = 100
    """Images in the generated validation set."""

    keep_empty_images: bool = False
    """Train on images without annotations too."""

    repeat_factor: Fraction = 0.0
    """Threshold t of repeat-factor sampling (docs/data.md): images of a class that appears in less than this fraction
    of the images come sqrt(t / fraction) times per epoch. LVIS takes 0.001; 0: every image once."""

    bad_annotations: Literal["error", "skip"] = "error"
    """What to do about bad annotations and image files: `error` ends the run at the start and lists them; `skip` leaves
    them out, counts and reports them."""

    check_images: Literal["open", "decode", "trust"] = "open"
    """How the start checks image files that are new, or have changed since the last start: `open` reads their headers;
    `decode` decodes each file completely; `trust` does not look at the files, and takes their sizes, as displayed, from
    the JSON."""

    cache_dir: str = ""
    """Folder for what a start finds out about annotations and images, which later starts map in a second; left out, it
    is kept beside the JSON or, where that folder cannot be written, in the user's cache folder."""

    shorter_side_train: Annotated[tuple[Positive, ...], Field(min_length=1)] = (800,)
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
    """Mini-batch, learning rate and optimizer (the linear rule: see docs/method.md)."""

    mini_batch: Positive | None = None
    """Images per optimizer step over all ranks: the ranks make as many forward passes per step as that takes. Without
    it, the mini-batch is ranks x images_per_rank x accumulation."""

    accumulation: Positive = 1
    """Forward passes per optimizer step, where mini_batch is not given."""

    base_lr: Annotated[float, Field(gt=0)] = 0.02
    """Learning rate at reference_batch_size; the linear rule scales it to the mini-batch that runs."""

    reference_batch_size: Positive = 16
    """The mini-batch, in images, that base_lr belongs to."""

    epochs: Annotated[float, Field(gt=0)] = 11.0
    """Passes over the training set (*normal* schedule: 11, *long*: 18)."""

    warmup_epochs: Annotated[float, Field(ge=0)] = 0.5
    """Epochs over which the learning rate rises linearly, step by step, from base_lr (k = 1) to k x base_lr."""

    warmup_start: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Where the warm-up starts, as a fraction of base_lr; below 1, a mini-batch of the reference size warms up, too."""

    milestones: tuple[Annotated[float, Field(gt=0)], ...] = (8.0, 10.0)
    """Epochs at which the learning rate is multiplied by the gamma in the same place."""

    gammas: tuple[Annotated[float, Field(gt=0)], ...] = (0.1, 0.1)
    """The factor at each milestone."""

    schedule: Literal["steps", "cosine"] = "steps"
    """How the learning rate falls after the warm-up: in `steps`, at the milestones, or along half a `cosine` to 0, with
    no milestones."""

    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"
    """`sgd` with momentum, as MegDet; `lars` (trust ratio per layer, You et al. 2017; needs the extra `lars`); or
    `adamw`, with base_lr around 1e-4."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD and LARS, the first beta of AdamW."""

    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Weight decay of the weights; norms and biases have none."""

    clip_gradient_norm: Annotated[float, Field(gt=0)] | None = None
    """Upper bound of the L2 norm of the averaged gradient; without it, gradients are not clipped."""

    compression: Literal["none", "fp16"] = "none"
    """Send gradients as float32 or as float16."""

    measure_noise: Literal["auto", "never"] | Positive = "auto"
    """Steps between two measurements of the gradient's noise (docs/method.md); `auto` measures as often as possible
    within 1 % of the training time, and with agvm in every step. Needs two ranks, or two passes per step."""

    lr_modulation: Literal["none", "agvm"] = "none"
    """`agvm`: factors for the learning rates of FPN, RPN and box head that bring their gradient variances into line
    with the backbone's (Xue et al. 2022), for very large mini-batches."""

    ema: Annotated[float, Field(gt=0)] | None = None
    """Epochs over which weights and statistics are averaged (EMA). The averages are what evaluation, the best
    checkpoint, predict and export use. Left out, there are none."""

    patience: NotNegative = 0
    """Evaluations in a row without a better output.best_metric after which training ends early; 0: it does not. Choose
    it longer than the time between milestones: a lower learning rate often brings a better one."""

    @property
    def noise_interval(self) -> int | Literal["auto", "never"]:
        """Steps between two measurements of the gradient's noise. AGVM needs fixed ones, not those that time allows."""
        return 1 if self.lr_modulation == "agvm" and self.measure_noise == "auto" else self.measure_noise

    @model_validator(mode="after")
    def _fits_together(self) -> "SolverConfig":
        if len(self.milestones) != len(self.gammas):
            raise ValueError(
                f"milestones has {len(self.milestones)} entries and gammas {len(self.gammas)}: "
                "give one gamma for each milestone"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones must rise")
        if self.lr_modulation == "agvm" and self.measure_noise == "never":
            raise ValueError("lr_modulation: agvm follows the gradient's noise, so measure_noise cannot be never")
        if self.mini_batch is not None and self.accumulation != 1:
            raise ValueError("give mini_batch or accumulation, not both: accumulation follows from mini_batch")
        return self


class EvaluationConfig(Section):
    """How detections are evaluated."""

    backend: Literal["hotcoco", "pycocotools"] = "hotcoco"
    """What computes COCO's metrics; both give the same bits, `pycocotools` takes much longer."""

    loss: bool = False
    """Compute the validation loss too (docs/method.md); an evaluation then takes about twice as long."""

    scales: tuple[Positive, ...] = ()
    """Shorter sides for a multi-scale test, in pixels, whose detections are merged; left out, data.shorter_side_test
    alone. `megdet evaluate` and `predict` use scales, flip and merge, and so does one more evaluation at the end of a
    training; those in between take one scale, which is quicker."""

    flip: bool = False
    """Detect in the mirror image too, at each scale."""

    merge: Literal["nms", "soft_nms"] = "nms"
    """How the detections of all scales and flips become one list: class by class with NMS at model.nms_threshold, or
    with soft-NMS (Bodla et al. 2017), which lowers the scores of overlapping boxes. It can be set without scales."""

    @property
    def one_view(self) -> "EvaluationConfig":
        """The same with one scale, no flip and NMS."""
        return self.model_copy(update={"scales": (), "flip": False, "merge": "nms"})


class RuntimeConfig(Section):
    """How a run uses the machine."""

    seed: NotNegative = 0
    """Seed of the weights, the order of images, augmentation and sampling."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU with the number of the local rank where there is one."""

    threads_per_rank: NotNegative = 0
    """CPU threads of a rank; 0 divides the cores among the ranks that share them."""

    bind_cores: bool = True
    """Give each rank of a host cores of its own, unless the launcher did."""

    amp: Literal["none", "bfloat16", "float16", "auto"] = "auto"
    """Automatic mixed precision, in training and evaluation; float16 (with loss scaling) is for GPUs. `auto` takes what
    the hardware of all ranks is fast at (docs/performance.md); a resumed run keeps what it started with."""

    channels_last: bool | Literal["auto"] = "auto"
    """Store activations and weights of convolutions with channels last; `auto` does so on GPUs, and with bfloat16 on
    CPUs."""

    deterministic: bool = False
    """Fix the order of all sums, so that runs with more than two ranks, or on GPUs, repeat bit for bit; slower."""

    stall_timeout: Annotated[float, Field(ge=0.0)] = 600.0
    """Seconds without progress on any rank after which the job ends and says what each rank is stuck in; 0 never ends
    it. Choose it longer than the longest step, and than what one rank does alone while the others wait, such as
    computing COCO's metrics."""


class OutputConfig(Section):
    """What a run writes, and when."""

    run_dir: str = "runs/demo"
    """Folder of the run: checkpoints, metrics, detections, pictures."""

    log_every_images: Positive = 320
    """Images between two lines of metrics."""

    checkpoint_every_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between two checkpoints."""

    keep_checkpoints: Positive = 3
    """How many of the newest checkpoints to keep, besides the best one."""

    evaluate_every_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between two evaluations; the last step always evaluates."""

    best_metric: str = "AP"
    """What decides which checkpoint is the best: a metric of the evaluations (`AP`, `AP50`, `AP_small`, `AR_100`, ...),
    `AP of` and the name of a class, or, with evaluation.loss, `loss` or one of its parts (`loss_classifier`, ...)."""

    pictures: NotNegative = 16
    """Validation images drawn with ground truth and detections."""

    loggers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    """Where metrics, configuration and pictures go, in addition to the files of the run (docs/loggers.md):
    `tensorboard`, `mlflow`, `wandb` (extras of the same names). One that is missing or fails is a warning."""


def by_dotted_key(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The values of all sections by names such as ``solver.base_lr``."""
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


class Config(Section):
    """The whole configuration of a run."""

    model: ModelConfig = ModelConfig()
    batch_norm: BatchNormConfig = BatchNormConfig()
    data: DataConfig = DataConfig()
    solver: SolverConfig = SolverConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
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
