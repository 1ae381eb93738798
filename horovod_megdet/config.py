"""The configuration tree: YAML in, typed and validated sections out.

A configuration is a YAML file with the sections of :class:`Config`. It may name one ``base`` file, whose values it
overrides key by key. ``--set section.key=value`` overrides both. Every amount is in images or epochs, never in
iterations, so that one file is right for any number of ranks.
"""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from horovod_megdet.errors import UserError

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


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file, its ``base`` and the ``section.key=value`` overrides into a validated :class:`Config`.

    Raises :class:`UserError` naming the file, the key's path and the nearest valid key.
    """
    path = Path(path)
    values = _read_yaml(path)
    sources = dict.fromkeys(_key_paths(values), str(path))
    base = values.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base must be the path of a YAML file, not {base!r}.")
        base_path = path.parent / base
        base_values = _read_yaml(base_path)
        if "base" in base_values:
            raise UserError(f"{base_path}: a base file cannot have a base of its own (it is the base of {path}).")
        sources = dict.fromkeys(_key_paths(base_values), str(base_path)) | sources
        values = _merge(base_values, values)
    return _validate(values, overrides or [], sources, str(path))


def override(config: Config, overrides: list[str]) -> Config:
    """Returns the configuration with ``section.key=value`` overrides applied; raises like :func:`load_config`."""
    return _validate(config.model_dump(mode="json"), overrides, {}, "the configuration")


def _validate(values: dict[str, Any], overrides: list[str], sources: dict[str, str], where: str) -> Config:
    for text in overrides:
        override_values = _parse_override(text)
        sources = sources | dict.fromkeys(_key_paths(override_values), f"--set {text}")
        values = _merge(values, override_values)
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError(_explain(error, sources, where)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        repeated = _repeated_key(yaml.compose(text, Loader=yaml.SafeLoader))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}.") from None
    if values is None:
        return {}
    if repeated:
        key, line = repeated.value, repeated.start_mark.line + 1
        raise UserError(f"{path}, line {line}: `{key}` stands there for the second time: remove one of them.")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: the top level must be sections such as `solver:` with keys below them.")
    # A section whose keys are all commented out.
    return {key: {} if value is None and key in Config.model_fields else value for key, value in values.items()}


def _repeated_key(node: yaml.Node | None) -> yaml.Node | None:
    """The first key that a mapping has twice; YAML's loader takes the later value without a word."""
    if not isinstance(node, yaml.MappingNode):
        return None
    seen: set[str] = set()
    for key, value in node.value:
        if str(key.value) in seen:
            return key
        seen.add(str(key.value))
        if repeated := _repeated_key(value):
            return repeated
    return None


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    names = key.strip().split(".")
    if not separator or not all(names):
        raise UserError(f"--set {override}: write section.key=value, for example --set solver.base_lr=0.01.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: {text!r} is not a valid YAML value.") from None
    for name in reversed(names):
        value = {name: value}
    return value


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _key_paths(values: dict[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for key, value in values.items():
        paths.append(prefix + str(key))
        if isinstance(value, dict):
            paths += _key_paths(value, f"{prefix}{key}.")
    return paths


def _explain(error: pydantic.ValidationError, sources: dict[str, str], default: str) -> str:
    sentences = []
    for item in error.errors():
        names = [str(part) for part in item["loc"]]
        key = _existing_key(names, sources)
        where = sources.get(key, default)
        if item["type"] == "extra_forbidden":
            sentences.append(f"{where}: unknown key `{key}`{_nearest(names)}")
        elif item["type"] in ("model_type", "tuple_type"):
            kind = "a section with keys below it" if item["type"] == "model_type" else "a list such as [8, 10]"
            sentences.append(f"{where}: `{key}`: should be {kind}, not {item['input']!r}.")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = "" if isinstance(item["input"], dict | BaseModel) else f", not {item['input']!r}"
            sentences.append(f"{where}: `{key}`: {message[0].lower()}{message[1:]}{given}.")
    return "\n".join(dict.fromkeys(sentences))


def _existing_key(names: list[str], sources: dict[str, str]) -> str:
    """The longest prefix of a pydantic location that the user wrote: unions add names of their own at the end."""
    for length in range(len(names), 0, -1):
        if ".".join(names[:length]) in sources:
            return ".".join(names[:length])
    return ".".join(names)


def _nearest(names: list[str]) -> str:
    """The end of the sentence about an unknown key: what was meant, or what is possible."""
    sections = {name: list(section_type(name).model_fields) for name in Config.model_fields}
    valid = list(sections) if len(names) == 1 else sections[names[0]]
    # Without the section's name: a long one in common would make any key look near.
    close = difflib.get_close_matches(names[-1], valid, n=1, cutoff=0.6)
    if close:
        return f"; did you mean `{'.'.join([*names[:-1], close[0]])}`?"
    anywhere = {key: f"{name}.{key}" for name, keys in sections.items() for key in keys}
    elsewhere = difflib.get_close_matches(names[-1], anywhere, n=1, cutoff=0.8)
    if elsewhere:
        return f"; did you mean `{anywhere[elsewhere[0]]}`?"
    return f"; valid keys here are {', '.join(valid)}."


def section_type(name: str) -> type[Section]:
    """The class of a section, which holds its keys."""
    section = Config.model_fields[name].annotation
    assert isinstance(section, type)
    assert issubclass(section, Section)
    return section
