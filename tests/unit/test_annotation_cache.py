"""The cache of annotations: what it saves, and that nothing stale, damaged or foreign is ever trusted."""

import json
import mmap
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from horovod_megdet.data import annotation_cache, annotation_json, image_files, reading
from horovod_megdet.data.annotation_cache import Source
from horovod_megdet.data.annotation_json import read_annotation_file
from horovod_megdet.data.annotations import Annotations
from horovod_megdet.data.array_file import MappedArrays
from horovod_megdet.data.coco import CocoDataset, check_dataset, load_dataset
from horovod_megdet.data.image_files import CheckedFiles
from horovod_megdet.errors import UserError

LONG_AGO = 1_700_000_000
"""Seconds; times of files that have not changed lately."""

Content = dict[str, Any]


def content_of(images: int) -> Content:
    """Images of 40 x 30 with two boxes each."""
    return {
        "images": [{"id": id, "file_name": f"{id}.png", "width": 40, "height": 30} for id in range(1, images + 1)],
        "annotations": [
            {"id": id, "image_id": 1 + id % images, "category_id": 1 + id % 2, "bbox": [id % 9, 2, 10.5, 20]}
            for id in range(1, 2 * images + 1)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dög"}],
    }


class Folder:
    """A data set on disk, as if it had been there for long."""

    def __init__(self, root: Path, images: int = 3) -> None:
        self.annotations, self.images = root / "train.json", root / "images"
        self.images.mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(root / "picture.png")
        for number in range(1, images + 1):
            os.link(root / "picture.png", self.images / f"{number}.png")
        self.write(content_of(images))
        os.utime(root / "picture.png", (LONG_AGO, LONG_AGO))

    def write(self, content: Content, seconds: int = LONG_AGO) -> None:
        self.annotations.write_text(json.dumps(content))
        os.utime(self.annotations, (seconds, seconds))

    def replace(self, name: str, pixels: bytes, seconds: int = LONG_AGO + 10) -> None:
        (self.images / name).unlink()
        (self.images / name).write_bytes(pixels)
        os.utime(self.images / name, (seconds, seconds))

    def load(self, **options: Any) -> CocoDataset:
        return load_dataset(self.annotations, self.images, **({"training": True} | options))

    def caches(self) -> list[Path]:
        return sorted(self.annotations.parent.glob(".train.json.*"))


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of the user: one of the test, not that of who runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "horovod_megdet"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "data")


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read since the last ``work.clear()``: names of JSON and image files."""
    read: list[str] = []
    header, parse = image_files.read_header, reading.read_annotation_file

    def read_header(path: Path) -> Any:
        read.append(path.name)
        return header(path)

    def read_json(path: Path) -> Any:
        read.append(path.name)
        return parse(path)

    monkeypatch.setattr(image_files, "read_header", read_header)
    monkeypatch.setattr(reading, "read_annotation_file", read_json)
    return read


def same(first: Annotations, second: Annotations) -> bool:
    """Whether every bit is the same."""
    for name in (field.name for field in fields(Annotations) if field.name != "mapping"):
        one, other = getattr(first, name), getattr(second, name)
        if isinstance(one, np.ndarray):
            if one.dtype.kind != other.dtype.kind or one.shape != other.shape or one.tobytes() != other.tobytes():
                return False
        elif one != other:
            return False
    return True


# Parsing

NUMBERS = st.one_of(
    st.integers(-5, 60), st.floats(-5, 60), st.sampled_from([10**9, 10**400, -0.0, 1e-3, None, True, "7", 2**63, 2**64])
)
IDS = st.one_of(st.integers(1, 6), st.sampled_from([0, -1, 2**63 - 1, 2**63, 1.0, "1", None]))


@st.composite
def annotation_files(draw: st.DrawFn) -> Content:
    """Mostly good content, with some bad entries of every kind."""
    content = content_of(4)
    for entry in draw(st.lists(st.sampled_from(content["annotations"]), max_size=4)):
        key = draw(st.sampled_from(["id", "image_id", "category_id", "bbox", "area", "iscrowd", "missing"]))
        if key == "bbox":
            entry["bbox"] = draw(st.lists(NUMBERS, min_size=3, max_size=4))
        elif key == "missing":
            entry.pop(draw(st.sampled_from(["id", "image_id", "category_id", "bbox"])), None)
        else:
            entry[key] = draw(IDS if key.endswith("id") else NUMBERS)
    for entry in draw(st.lists(st.sampled_from(content["annotations"]), max_size=2)):
        entry["note"] = draw(st.sampled_from(["}, {", '"}, {"', [{}, {"id": 1}], [[{"a": []}], {}], {"a": {}}]))
    for entry in draw(st.lists(st.sampled_from(content["images"]), max_size=2)):
        entry[draw(st.sampled_from(["id", "width", "file_name"]))] = draw(IDS)
    if draw(st.booleans()):
        content["annotations"] += draw(st.lists(st.sampled_from([1, "x", None, []]), max_size=1))
    return content


@settings(deadline=None, max_examples=300)
@given(
    content=annotation_files(),
    bad_file=st.integers(0, 5),
    piece=st.sampled_from([1, 100, 300, 1 << 24]),
    indent=st.sampled_from([None, 1]),
)
def test_both_parsers_find_the_same(
    tmp_path_factory: pytest.TempPathFactory, content: Content, bad_file: int, piece: int, indent: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"

    def read() -> Annotations:
        file = read_annotation_file(path)
        checked = CheckedFiles(np.tile(np.array([30, 40, 30, 40], np.int32), (len(file.images), 1)), {})
        if bad_file < len(file.images):
            checked.errors[bad_file] = "not an image"
        return file.pack(checked)

    path.write_text(json.dumps(content, indent=indent))
    with mock.patch.object(annotation_json, "PIECE_BYTES", piece):
        typed = read()
    path.write_text(json.dumps(content | {"info": float("nan")}))  # only Python's parser takes that
    assert same(typed, read())


@pytest.mark.parametrize("listed", ["{}", "null", "3", '""', "[{}]", "[1, 2]", '[{"id": 1}, ]', "[,]"])
def test_what_is_no_list_of_annotations_goes_to_the_parser_that_explains(tmp_path: Path, listed: str) -> None:
    path = tmp_path / "any.json"
    path.write_text(json.dumps(content_of(1) | {"annotations": "HERE"}).replace('"HERE"', listed))
    with pytest.raises(msgspec.DecodeError):
        annotation_json._read_typed(path)


def test_the_text_of_annotations_is_given_back_while_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page by page: of all pages that hold nothing but annotations none is left at the end."""
    monkeypatch.setattr(annotation_json, "PIECE_BYTES", 2 * mmap.PAGESIZE)
    content = content_of(2)
    content["annotations"] = [content["annotations"][0] | {"id": id, "note": "x" * 500} for id in range(1, 100)]
    path = tmp_path / "any.json"
    path.write_text(json.dumps(content))
    given_back: list[tuple[int, int]] = []

    class Memory(mmap.mmap):
        def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
            assert option == mmap.MADV_DONTNEED
            given_back.append((start, length))
            super().madvise(option, start, length)

    with monkeypatch.context() as patched:
        patched.setattr(mmap, "mmap", Memory)
        entries = read_annotation_file(path).entries
    assert [entry.id for entry in entries] == list(range(1, 100))
    ends = [start + length for start, length in given_back]
    assert [start for start, _ in given_back] == [0, *ends[:-1]]
    assert len(ends) > 3
    assert ends[-1] == path.read_bytes().index(b'], "categories"') // mmap.PAGESIZE * mmap.PAGESIZE


def test_polygons_and_other_keys_are_passed_over(folder: Folder) -> None:
    fingerprint = folder.load().fingerprint
    content = content_of(3)
    for entry in content["annotations"]:
        entry.update(segmentation=[[1, 2, 3, 4.5]], attributes={"occluded": True})
    folder.write(content, LONG_AGO + 5)
    assert folder.load().fingerprint == fingerprint


# What a cache saves


def test_a_later_start_reads_no_file_again(folder: Folder, work: list[str]) -> None:
    first = folder.load()
    assert sorted(work) == ["1.png", "2.png", "3.png", "train.json"]
    work.clear()
    second = folder.load()
    assert work == []
    assert second.fingerprint == first.fingerprint
    assert same(second.ground_truth, first.ground_truth)
    assert all(np.array_equal(a, b) for a, b in zip(first.read(1), second.read(1), strict=True))
    assert second.ground_truth.mapping is not None


def test_the_cache_holds_what_a_reading_without_it_finds(folder: Folder, tmp_path: Path) -> None:
    content = content_of(3)
    content["annotations"][0]["bbox"][2] = 0
    folder.write(content)
    (tmp_path / "file").write_text("")
    folder.replace("3.png", b"")
    folder.load(bad="skip")
    mapped = folder.load(bad="skip", training=False).ground_truth
    unmapped = folder.load(bad="skip", training=False, cache_dir=tmp_path / "file" / "x").ground_truth
    assert mapped.mapping is not None
    assert unmapped.mapping is None
    assert same(mapped, unmapped)
    assert len(mapped.problems) == 2


@pytest.mark.parametrize("check_images", ["open", "decode"])
def test_problems_are_the_same_with_and_without_a_cache(folder: Folder, check_images: Any) -> None:
    content = content_of(3)
    content["annotations"][2]["bbox"][2] = 0
    folder.write(content)
    pixels = (folder.images / "2.png").read_bytes()
    folder.replace("2.png", pixels[:-30])
    (folder.images / "3.png").unlink()
    first = check_dataset(folder.annotations, folder.images, check_images)
    assert len(first) == (3 if check_images == "decode" else 2)
    assert check_dataset(folder.annotations, folder.images, check_images) == first


def test_loader_workers_map_the_file_even_when_it_is_gone(folder: Folder) -> None:
    dataset = folder.load()
    mapped = folder.load()
    folder.caches()[0].unlink()
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=describe, args=(mapped, sender))
    process.start()
    assert receiver.poll(60)
    boxes, maps = receiver.recv()
    process.join()
    assert boxes == [dataset.read(index)[1].tolist() for index in range(3)]
    assert ".train.json." in maps


def describe(dataset: CocoDataset, sender: Any) -> None:
    sender.send(([dataset.read(index)[1].tolist() for index in range(3)], Path("/proc/self/maps").read_text()))


def test_trust_takes_sizes_from_the_annotation_file(folder: Folder, work: list[str]) -> None:
    content = content_of(3)
    del content["images"][2]["width"]
    folder.write(content)
    (folder.images / "1.png").unlink()
    dataset = folder.load(check_images="trust")
    assert sorted(work) == ["3.png", "train.json"], "only where the annotation file has no size"
    assert dataset.sizes.tolist() == [[30, 40]] * 3
    work.clear()
    assert folder.load(check_images="trust").fingerprint == dataset.fingerprint
    assert work == []


# What changes between two starts


def test_a_changed_annotation_file_is_read_again_but_not_its_images(folder: Folder, work: list[str]) -> None:
    before = folder.load().fingerprint
    content = content_of(3)
    content["annotations"][0]["bbox"][0] = 5
    folder.write(content, LONG_AGO + 1)
    work.clear()
    assert folder.load().fingerprint != before
    assert work == ["train.json"]


def test_an_annotation_file_with_another_time_and_the_same_content_is_recognized(
    folder: Folder, work: list[str]
) -> None:
    before = folder.load().fingerprint
    folder.write(content_of(3), LONG_AGO + 1)
    work.clear()
    assert folder.load().fingerprint == before
    folder.annotations.read_bytes()
    assert work == []
    cache = next(annotation_cache.caches(Source(folder.annotations, folder.images)), None)
    assert cache is not None
    assert cache.json.time_ns == (LONG_AGO + 1) * 10**9, "its content need not be compared next time"


def test_a_change_within_the_resolution_of_times_is_noticed(folder: Folder) -> None:
    now = int(time.time())
    folder.write(content_of(3), now)
    before = folder.load().fingerprint
    content = content_of(3)
    content["categories"][0]["name"] = "cow"
    folder.write(content, now)
    assert folder.load().fingerprint != before


def test_an_image_that_became_damaged_is_found(folder: Folder, work: list[str]) -> None:
    good = folder.load()
    pixels = (folder.images / "2.png").read_bytes()
    folder.replace("2.png", b"damaged")
    work.clear()
    with pytest.raises(UserError, match=r"image 2 \(2\.png\): not an image"):
        folder.load()
    assert sorted(work) == ["2.png", "train.json"], "only what a listing shows as changed"
    assert folder.load(bad="skip").image_ids.tolist() == [1, 3]
    folder.replace("2.png", pixels, LONG_AGO + 20)
    assert folder.load().fingerprint == good.fingerprint


def test_images_that_disappear_and_come_back_are_noticed(folder: Folder) -> None:
    good = folder.load()
    (folder.images / "1.png").rename(folder.images / "away")
    assert folder.load(bad="skip").image_ids.tolist() == [2, 3]
    (folder.images / "away").rename(folder.images / "1.png")
    assert folder.load().fingerprint == good.fingerprint


def test_three_missing_of_three_thousand(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "data", images=3000)
    missing = [7, 1500, 2999]
    for number in missing:
        (folder.images / f"{number}.png").unlink()
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            folder.load()
        assert ": 3 problems in " in str(caught.value)
        assert all(f"image {number} ({number}.png): no such image file" in str(caught.value) for number in missing)


# Caches that must not be used


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-200] ^= 4
    path.write_bytes(content)


def other_version(path: Path) -> None:
    content = path.read_bytes()
    assert annotation_cache.FORMAT.encode() in content
    path.write_bytes(content.replace(annotation_cache.FORMAT.encode(), annotation_cache.FORMAT[:-1].encode() + b"0"))


def foreign(path: Path) -> None:
    path.write_bytes(b"\x89PNG not a cache at all, but long enough" * 10)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [truncate, cut_header, empty, flip_bit, other_version, foreign])
def test_a_spoiled_cache_is_replaced(folder: Folder, work: list[str], spoil: Callable[[Path], None]) -> None:
    expected = folder.load().fingerprint
    (path,) = folder.caches()
    good = MappedArrays.open(path).digest
    spoil(path)
    work.clear()
    assert folder.load().fingerprint == expected
    assert "train.json" in work, "it was read again"
    assert MappedArrays.open(path).digest == good
    assert MappedArrays.open(path).intact()
    assert folder.caches() == [path], "nothing else is left"


def test_a_cache_that_cannot_be_replaced_is_no_error(folder: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    expected = folder.load(cache_dir=folder.annotations.parent).fingerprint
    (path,) = folder.caches()
    a_folder(path)
    assert folder.load(cache_dir=folder.annotations.parent).fingerprint == expected
    assert "and at every start, because the result cannot be kept" in capfd.readouterr().err


def test_a_stale_cache_in_the_preferred_place_does_not_hide_another(folder: Folder, work: list[str]) -> None:
    load_dataset(folder.annotations, folder.images, training=True)
    source = Source(folder.annotations, folder.images)
    preferred, other = list(source.places())[:2]
    stale = preferred.read_bytes()
    content = content_of(3)
    content["annotations"] = content["annotations"][1:]
    folder.write(content)
    load_dataset(folder.annotations, folder.images, training=True)
    other.parent.mkdir(parents=True, exist_ok=True)
    preferred.rename(other)
    preferred.write_bytes(stale)
    work.clear()
    load_dataset(folder.annotations, folder.images, training=True)
    assert work == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_cache_of_another_user_is_not_trusted(folder: Folder, work: list[str]) -> None:
    folder.load()
    (path,) = folder.caches()
    os.chown(path, 12345, 12345)
    work.clear()
    folder.load()
    assert "train.json" in work
    os.chown(folder.caches()[0], 12345, 12345)
    os.chown(folder.annotations, 12345, 12345)  # who may change the annotations may as well change the cache
    work.clear()
    folder.load()
    assert "train.json" not in work


# Where a cache goes


def test_a_folder_without_write_permission_is_left_alone(folder: Folder, user_cache: Path, work: list[str]) -> None:
    folder.annotations.parent.chmod(0o555)
    folder.load()
    assert folder.caches() == []
    assert len(list(user_cache.iterdir())) == 1
    work.clear()
    folder.load()
    assert work == []
    folder.annotations.parent.chmod(0o755)


def test_data_sets_do_not_share_a_cache(folder: Folder, tmp_path: Path) -> None:
    other = Folder(tmp_path / "other", images=4)
    for each, images in ((folder, 3), (other, 4)):
        assert len(each.load(cache_dir=tmp_path / "caches")) == images
    assert len(list((tmp_path / "caches").iterdir())) == 2
    assert len(folder.load(cache_dir=tmp_path / "caches")) == 3


# with room for less than a cache
@pytest.mark.parametrize("small_disk", ["8k"], indirect=True)
def test_a_full_disk(tmp_path: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = Folder(tmp_path / "data", images=500)
    dataset = folder.load(cache_dir=small_disk)
    assert "No space left on device" in capfd.readouterr().err
    assert list(small_disk.iterdir()) == []
    assert dataset.fingerprint == folder.load().fingerprint


def test_two_jobs_at_once(folder: Folder) -> None:
    with ThreadPoolExecutor(4) as threads:
        fingerprints = {dataset.fingerprint for dataset in threads.map(lambda _: folder.load(), range(8))}
    assert len(fingerprints) == 1
    assert len(folder.caches()) == 1


# Arrays in a file


def test_a_mapping_outlives_its_file(folder: Folder) -> None:
    folder.load()
    (path,) = folder.caches()
    mapping = MappedArrays.open(path)
    before = {name: array.tobytes() for name, array in mapping.arrays.items()}
    path.unlink()
    arrays = mapping.arrays
    del mapping
    assert {name: array.tobytes() for name, array in arrays.items()} == before
    with pytest.raises(ValueError, match="read-only"):
        arrays["boxes"][0] = 0


def test_more_boxes_than_a_32_bit_integer_counts(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    found = folder.load().ground_truth
    many = 2**31 + 10
    rows = {name: np.broadcast_to(getattr(found, name)[:1], (many, *getattr(found, name).shape[1:])) for name in
            ("boxes", "labels", "areas", "crowd")}  # fmt: skip
    monkeypatch.setattr(CocoDataset, "_fingerprint", lambda self: "")
    huge = Annotations(**(vars(found) | rows | {"first_box": np.array([0, 1, many - 2, many]), "mapping": None}))
    dataset = CocoDataset(huge, Source(folder.annotations, folder.images), training=True)
    assert dataset.read(2)[1].tolist() == [folder.load().read(0)[1].tolist()[0]] * 2
