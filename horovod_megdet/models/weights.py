"""Starting weights: torchvision's ImageNet and detection files, and our own checkpoints.

Nothing is unpickled but tensors. What does not fit is an error that names the file and the setting to change, except
where starting without it makes sense: another number of classes, another kind of box head, other norms.
"""

import pickle
import re
import socket
import urllib.parse
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models import WeightsEnum, get_model_weights

from horovod_megdet.config import ModelConfig
from horovod_megdet.errors import UserError
from horovod_megdet.models.detector import Detector
from horovod_megdet.wording import some

Weights = dict[str, Tensor]

DOWNLOAD_TIMEOUT = 10.0
"""Seconds without an answer after which a download is given up."""

MODEL_FILE = "model.safetensors"
"""The weights in a checkpoint folder of ours."""

_OLD_NAMES = (
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2"),
    (r"^(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2"),
)
"""Names in torchvision's older detection files, and what they are called since."""


def load_weights(detector: Detector, model: ModelConfig) -> list[str]:
    """Loads ``model.weights`` into ``detector``; returns sentences about what was left out, for the user to read.

    ``none`` leaves the random weights, ``imagenet`` takes torchvision's classification weights of the backbone from the
    hub cache or downloads them. Otherwise it is a path: a torchvision classification or detection file, or a checkpoint
    of ours (its folder or the ``.safetensors`` file). Into a backbone without norms those of a classification file are
    folded: it computes the same function.

    Not collective: load on one rank and broadcast, or on all. Raises :class:`UserError`.
    """
    if model.weights == "none":
        return []
    path = imagenet_file(model.backbone) if model.weights == "imagenet" else Path(model.weights)
    weights = read_weights(path)
    if "conv1.weight" in weights:
        weights = {f"backbone.body.{name}": value for name, value in weights.items() if not name.startswith("fc.")}
        expected = {name for name in detector.state_dict() if name.startswith("backbone.body.")}
    else:
        expected = set(detector.state_dict())
    if "backbone.body.conv1.weight" not in weights:
        raise UserError(f"{path}: not weights of a ResNet or of a detector: there is no conv1.weight in it.")
    if model.backbone_norm == "none" and "backbone.body.bn1.weight" in weights:
        weights = _without_backbone_norms(weights)
    return _load(detector, weights, expected, path)


def download_weights(model: ModelConfig) -> None:
    """Puts the ImageNet weights into the hub cache, if they are configured and missing. Raises :class:`UserError`."""
    if model.weights == "imagenet":
        imagenet_file(model.backbone)


def load_checkpoint(detector: Detector, path: str | Path) -> None:
    """Loads the weights of one of our own checkpoints, all of them: the detector has to be the one that was saved.

    Raises :class:`UserError`.
    """
    weights = read_weights(Path(path))
    own = detector.state_dict()
    wrong = sorted(_without_counters(own.keys() ^ weights.keys()))
    wrong += [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if wrong:
        raise UserError(
            f"{path}: belongs to another detector ({some(sorted(wrong), shown=3)} differ): use the configuration it "
            "was saved with."
        )
    detector.load_state_dict(weights, strict=False)


def imagenet_file(backbone: str) -> Path:
    """The ImageNet weights of a backbone in the hub cache, downloaded if they are not there."""
    entry: WeightsEnum = get_model_weights(backbone)["IMAGENET1K_V1"]
    name = Path(urllib.parse.urlparse(entry.url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        _download(entry.url, path)
    return path


def read_weights(path: Path) -> Weights:
    """Reads a ``.safetensors`` file, a checkpoint folder with one, or a PyTorch file of tensors, onto the CPU."""
    if path.is_dir():
        path = path / MODEL_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such weights file (model.weights is `imagenet`, `none` or a path).")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as weights, it may be damaged or incomplete: {reason}") from None
    content = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: not a state dict of tensors.")
    return {_current_name(name): value for name, value in content.items()}


def _download(url: str, path: Path) -> None:
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = path.stem.rpartition("-")[2]
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"The ImageNet weights cannot be downloaded ({error}): get {url} on another machine and put it at {path}, "
            "or set model.weights to a file or to `none`."
        ) from None
    finally:
        socket.setdefaulttimeout(previous)


def _load(detector: Detector, weights: Weights, expected: set[str], path: Path) -> list[str]:
    own = detector.state_dict()
    reshaped = {name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape}
    missing = _without_counters(expected - weights.keys())
    unknown = _without_counters(weights.keys() - own.keys())
    notices = []
    for kind, names, consequence in (
        ("have another shape", reshaped, "keep their initial values"),
        ("are missing", missing, "keep their initial values"),
        ("are not in this detector", unknown, "are ignored"),
    ):
        fatal = {name for name in names if not _dispensable(name, own.get(name, weights.get(name)))}
        if fatal:
            raise UserError(
                f"{path}: does not fit this detector: {some(sorted(fatal), shown=3)} {kind} "
                "(compare model.backbone, fpn_channels, anchor_aspect_ratios and box_head_channels)."
            )
        if names:
            notices.append(f"{path}: {some(sorted(names), shown=3)} {kind} and {consequence}.")
    usable = own.keys() & (weights.keys() - reshaped)
    detector.load_state_dict({name: weights[name] for name in usable}, strict=False)
    return notices


def _dispensable(name: str, value: Tensor | None) -> bool:
    """Whether training can start without it: part of the box head, a norm, or a bias that a norm replaces."""
    return name.startswith(("roi_heads.box_predictor.", "roi_heads.box_head.")) or (
        value is not None and value.dim() < 2
    )


def _without_counters(names: set[str]) -> set[str]:
    """Without the batch counters of normalization layers, which frozen ones do not have."""
    return {name for name in names if not name.endswith(".num_batches_tracked")}


def _without_backbone_norms(weights: Weights) -> Weights:
    """Folds each backbone norm (fixed statistics) into the convolution before it."""
    folded = {name: value for name, value in weights.items() if not name.startswith("backbone.body.")}
    for name, value in weights.items():
        if not (name.startswith("backbone.body.") and name.endswith(".weight") and value.dim() == 4):
            continue
        convolution = name.removesuffix(".weight")
        norm = re.sub(r"downsample\.0$", "downsample.1", re.sub(r"conv(\d)$", r"bn\1", convolution))
        mean, var, scale, shift = (
            weights[f"{norm}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")
        )
        weight, bias = fuse_conv_bn_weights(value, None, mean, var, 1e-5, scale, shift)
        folded[name], folded[f"{convolution}.bias"] = weight.detach(), bias.detach()
    return folded


def _current_name(name: str) -> str:
    for pattern, replacement in _OLD_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
