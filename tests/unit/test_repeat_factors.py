"""Repeat factors of a training set, and the batches that follow from them."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from horovod_megdet.config import DataConfig
from horovod_megdet.data.annotations import Annotations
from horovod_megdet.data.coco import CocoDataset, load_dataset
from horovod_megdet.data.loader import build_train_loader, image_seed, image_stream
from horovod_megdet.data.repeat_factors import UNIT, repeat_factors
from horovod_megdet.data.sampler import PlannedImage
from horovod_megdet.data.synthetic import ensure_synthetic

CLASSES = 4

labels_of_images = st.lists(st.lists(st.tuples(st.integers(1, CLASSES), st.booleans()), max_size=5), min_size=1)
"""For each image, the label of each object and whether it is a crowd."""


def annotations(images: list[list[tuple[int, bool]]]) -> Annotations:
    objects = [entry for image in images for entry in image]
    return Annotations(
        category_ids=list(range(CLASSES)),
        class_names=list("abcd"),
        image_ids=np.arange(len(images)),
        file_names=np.array([f"{image}.jpg" for image in range(len(images))]),
        sizes=np.full((len(images), 2), 100, np.int32),
        annotated=np.array([bool(image) for image in images]),
        first_box=np.cumsum([0, *map(len, images)]),
        boxes=np.tile([0.0, 0.0, 9.0, 9.0], (len(objects), 1)),
        labels=np.array([label for label, _ in objects], np.int64),
        areas=np.full(len(objects), 81.0),
        crowd=np.array([crowd for _, crowd in objects], bool),
        problems=[],
    )


@given(images=labels_of_images, threshold=st.floats(0, 1))
def test_factors_are_those_of_the_paper(images: list[list[tuple[int, bool]]], threshold: float) -> None:
    factors = repeat_factors(annotations(images), threshold)
    shown = [{label for label, crowd in image if not crowd} for image in images]
    of_class = {}
    for label in range(1, CLASSES + 1):
        fraction = sum(label in classes for classes in shown) / len(images)
        of_class[label] = max(1, math.sqrt(threshold / fraction)) if fraction else 1
    assert factors.of_classes.tolist() == pytest.approx(list(of_class.values()))
    expected = [max([1, *(of_class[label] for label in classes)]) for classes in shown]
    np.testing.assert_allclose(factors.of_images / UNIT, expected, atol=1 / UNIT)
    assert (factors.of_images >= UNIT).all()


def test_a_class_without_images_and_images_without_objects_are_not_repeated() -> None:
    common, rare = [(1, False)], [(1, False), (2, False)]
    factors = repeat_factors(annotations([common] * 7 + [rare] + [[]] * 2 + [[(3, True)]]), 0.5)
    assert factors.of_classes.tolist() == pytest.approx([1, math.sqrt(0.5 * 11), 1, 1])
    assert (factors.of_images / UNIT).round(3).tolist() == [1] * 7 + [2.345] + [1] * 3
    assert factors.epoch_images == 13


@pytest.fixture(scope="module")
def rare_set(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    """24 images, of which two have a class of their own."""
    paths = ensure_synthetic(tmp_path_factory.mktemp("data") / "synthetic", 24, 1)
    annotations = Path(paths["train_annotations"])
    content = json.loads(annotations.read_text())
    content["categories"].append({"id": 99, "name": "rare"})
    images = sorted({entry["image_id"] for entry in content["annotations"]})[:2]
    for image in images:
        next(entry for entry in content["annotations"] if entry["image_id"] == image)["category_id"] = 99
    annotations.write_text(json.dumps(content))
    return load_dataset(annotations, paths["train_images"], training=True)


def data(repeat_factor: float = 0.75) -> DataConfig:
    sizes = {"shorter_side_train": (64, 80), "longer_side_train": 200}
    return DataConfig.model_validate({"workers": 0, "images_per_rank": 2, "repeat_factor": repeat_factor, **sizes})


def seen(dataset: CocoDataset, ranks: int, start: int, stop: int) -> list[tuple[int, int, int]]:
    """Index, seed and sum of pixels of all images that the ranks see, in the order of the stream."""
    loaders = [
        build_train_loader(dataset, data(), seed=3, rank=rank, ranks=ranks, start=start, stop=stop)
        for rank in range(ranks)
    ]
    return [
        (target["index"], target["seed"], int(image.long().sum()))
        for one_pass in zip(*loaders, strict=True)
        for batch in one_pass
        for image, target in zip(batch.images, batch.targets, strict=True)
    ]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_see_one_stream_and_go_on_with_it_in_the_middle(rare_set: CocoDataset, ranks: int) -> None:
    alone = seen(rare_set, 1, 0, 96)
    assert seen(rare_set, ranks, 0, 96) == alone
    assert seen(rare_set, ranks, 36, 84) == alone[36:84], "from the middle of an epoch into the next"


def test_images_of_the_rare_class_come_more_often_and_never_look_the_same(rare_set: CocoDataset) -> None:
    stream = image_stream(rare_set, data(), seed=3)
    factor = math.sqrt(0.75 * len(rare_set) / 2)
    rare = {index for index in range(len(rare_set)) if len(rare_set.class_names) in rare_set.read(index)[2]}
    assert len(rare) == 2
    epoch = seen(rare_set, 1, 0, len(stream))[: len(stream)]
    often = Counter(index for index, _, _ in epoch)
    assert {often[index] for index in rare} <= {math.floor(factor), math.ceil(factor)}
    for index in rare:
        seeds, pixels = zip(*((seed, pixels) for place, seed, pixels in epoch if place == index), strict=True)
        assert len(set(seeds)) == often[index]
        assert len(set(pixels)) > 1


def test_without_a_factor_the_seeds_are_those_of_earlier_versions(rare_set: CocoDataset) -> None:
    assert image_seed(1, PlannedImage(2, 3)) == 6498626229777268288
    assert image_seed(2**40, PlannedImage(7, 0)) == 9205147714447482943
    repeats = [image_seed(1, PlannedImage(2, 3, repeat)) for repeat in range(4)]
    assert all(a != b for a, b in itertools.combinations(repeats, 2))
    assert len(image_stream(rare_set, data(0.0), 3)) == len(rare_set)
