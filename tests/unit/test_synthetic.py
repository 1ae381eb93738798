"""The generated data set: equal everywhere, valid, and safe to generate from several processes at once."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from horovod_megdet.data.coco import check_dataset, check_same_classes, load_dataset
from horovod_megdet.data.synthetic import (
    CATEGORY_IDS,
    CLASSES,
    IMAGE_SIZES,
    OBJECTS,
    VISIBLE_FRACTION,
    draw_image,
    ensure_synthetic,
)
from horovod_megdet.errors import UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return ensure_synthetic(tmp_path_factory.mktemp("data") / "synthetic", 60, 10)


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_it_is_a_valid_data_set(written: dict[str, str]) -> None:
    assert check_dataset(written["train_annotations"], written["train_images"]) == []
    train = load_dataset(written["train_annotations"], written["train_images"], training=True, keep_empty=True)
    val = load_dataset(written["val_annotations"], written["val_images"], training=False)
    check_same_classes(train, val)
    assert (len(train), len(val)) == (60, 10)
    assert train.class_names == list(CLASSES)
    assert train.category_ids == list(CATEGORY_IDS)
    portrait = train.sizes[:, 0] > train.sizes[:, 1]
    assert 0 < portrait.sum() < len(train), "both aspect-ratio groups"
    assert {tuple(sorted(size)) for size in train.sizes.tolist()} <= set(IMAGE_SIZES)
    labels = {int(label) for index in range(len(train)) for label in train.read(index)[2]}
    assert labels == {1, 2, 3, 4, 5, 6}, "every class"


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        ensure_synthetic(tmp_path / name, 5, 3, seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    different = digest(tmp_path / "a").items() - digest(tmp_path / "c").items()
    assert len(different) == len(digest(tmp_path / "a")), "another seed changes every file"


def test_more_images_do_not_change_the_first_ones(tmp_path: Path) -> None:
    ensure_synthetic(tmp_path / "few", 3, 1)
    ensure_synthetic(tmp_path / "many", 5, 2)
    few, many = digest(tmp_path / "few" / "images"), digest(tmp_path / "many" / "images")
    assert few.items() <= many.items()


def test_boxes_and_areas_fit_the_pictures() -> None:
    images = [draw_image(np.random.default_rng(seed)) for seed in range(200)]
    assert any(not objects for _, objects in images), "some images are empty"
    assert max(len(objects) for _, objects in images) <= OBJECTS[1]
    for pixels, objects in images:
        height, width, _ = pixels.shape
        for entry in objects:
            x, y, w, h = entry["bbox"]
            assert 0 <= x < x + w <= width + 0.01
            assert 0 <= y < y + h <= height + 0.01
            # A cross or star fills about a third of its box, half where it is turned; the rest may be hidden.
            assert 0.15 * VISIBLE_FRACTION * w * h < entry["area"] <= w * h + w + h
    sides = [max(entry["bbox"][2:]) for _, objects in images for entry in objects]
    assert np.percentile(sides, 95) > 2 * np.percentile(sides, 5), "several scales"
    shapes = [entry["bbox"][2] / entry["bbox"][3] for _, objects in images for entry in objects]
    assert np.percentile(shapes, 90) > 1.4 * np.percentile(shapes, 10), "several aspect ratios"


def test_a_second_call_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "folder"
    root.mkdir(parents=True)  # an empty folder counts as none
    paths = ensure_synthetic(root, 3, 2)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert ensure_synthetic(root, 3, 2) == paths
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert [path.name for path in root.parent.iterdir()] == ["folder"], "no drafts stay behind"


def test_other_settings_and_foreign_files_are_never_overwritten(tmp_path: Path) -> None:
    ensure_synthetic(tmp_path / "ours", 2, 1)
    with pytest.raises(UserError, match=r"other settings.*data\.synthetic_root"):
        ensure_synthetic(tmp_path / "ours", 3, 1)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="not a generated data set"):
        ensure_synthetic(tmp_path / "theirs", 2, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a generated data set"):
        ensure_synthetic(tmp_path / "file", 2, 1)
    with pytest.raises(UserError, match=r"cannot be written.*data\.synthetic_root"):
        ensure_synthetic(tmp_path / "file" / "below", 2, 1)


def test_several_writers_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(lambda _: ensure_synthetic(tmp_path / "shared", 6, 2), range(3)))
    assert results[0] == results[1] == results[2]
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]
    ensure_synthetic(tmp_path / "alone", 6, 2)
    assert digest(tmp_path / "shared") == digest(tmp_path / "alone")
