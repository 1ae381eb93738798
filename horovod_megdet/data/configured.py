"""The data sets that a configuration names."""

from pathlib import Path

from horovod_megdet.config import DataConfig
from horovod_megdet.data.coco import CocoDataset, load_dataset
from horovod_megdet.data.reading import ALONE, Ranks
from horovod_megdet.data.synthetic import ensure_synthetic

SYNTHETIC = "synthetic:"


def make_synthetic(data: DataConfig) -> None:
    """Generates the synthetic data set if the configuration uses it and it does not exist yet."""
    if any(annotations.startswith(SYNTHETIC) for annotations in (data.train_annotations, data.val_annotations)):
        ensure_synthetic(Path(data.synthetic_root), data.synthetic_train_images, data.synthetic_val_images)


def split_paths(data: DataConfig, training: bool) -> tuple[Path, Path]:
    """Annotation file and image folder of the training or validation set."""
    annotations, images = (
        (data.train_annotations, data.train_images) if training else (data.val_annotations, data.val_images)
    )
    if annotations.startswith(SYNTHETIC):
        split = annotations.removeprefix(SYNTHETIC)
        root = Path(data.synthetic_root)
        return root / "annotations" / f"{split}.json", root / "images" / split
    return Path(data.root, annotations), Path(data.root, images)


def load_split(data: DataConfig, training: bool, ranks: Ranks = ALONE) -> CocoDataset:
    """Loads the training or validation set of a configuration. Collective over ``ranks``."""
    annotations, images = split_paths(data, training)
    return load_dataset(
        annotations,
        images,
        training=training,
        keep_empty=data.keep_empty_images,
        bad=data.bad_annotations,
        check_images=data.check_images,
        cache_dir=cache_folder(data),
        ranks=ranks,
    )


def cache_folder(data: DataConfig) -> Path | None:
    """Where to keep what was read, if the configuration says so."""
    return Path(data.root, data.cache_dir) if data.cache_dir else None
