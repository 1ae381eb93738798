"""What training reads, data sets and starting weights, as one host sees them."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from horovod_megdet.cluster.doctor.facts import InputSummary
from horovod_megdet.config import Config
from horovod_megdet.data.configured import SYNTHETIC, load_split, split_paths
from horovod_megdet.errors import UserError
from horovod_megdet.models.weights import MODEL_FILE, imagenet_file

HASHED_BYTES = 2**20
"""Bytes at either end of a weights file that stand for the whole: all hosts reading all of a large file would take
minutes."""


def data_sets(config: Config) -> dict[str, InputSummary]:
    """Reads annotations and image headers as training does when it starts; generates nothing."""
    return {
        "training set": _summary(lambda: _read_split(config, training=True)),
        "validation set": _summary(lambda: _read_split(config, training=False)),
    }


def starting_weights(config: Config) -> InputSummary | None:
    """Reads the file with the starting weights, which is downloaded if training would do so; None if there is none."""
    model = config.model
    if model.weights == "none":
        return None
    imagenet = model.weights == "imagenet"
    return _summary(lambda: _read_weights(imagenet_file(model.backbone) if imagenet else Path(model.weights)))


def _summary(read: Callable[[], tuple[str, str]]) -> InputSummary:
    try:
        return InputSummary(*read())
    except UserError as error:
        return InputSummary("", "", str(error))


def _read_split(config: Config, training: bool) -> tuple[str, str]:
    annotations, _ = split_paths(config.data, training)
    name = config.data.train_annotations if training else config.data.val_annotations
    if name.startswith(SYNTHETIC) and not annotations.exists():
        return "generated", "generated when training starts"
    dataset = load_split(config.data, training)
    skipped = f", {len(dataset.problems)} bad entries skipped" if dataset.problems else ""
    return dataset.fingerprint, f"{len(dataset)} images, {len(dataset.class_names)} classes{skipped}"


def _read_weights(path: Path) -> tuple[str, str]:
    if path.is_dir():
        path = path / MODEL_FILE
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(HASHED_BYTES))
            file.seek(max(0, size - HASHED_BYTES))
            digest.update(file.read())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
    return f"{size} {digest.hexdigest()}", str(path)
