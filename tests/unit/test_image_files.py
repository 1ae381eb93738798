"""Checking image files: what is found does not depend on how they are read."""

import io
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from horovod_megdet.data import image_files
from horovod_megdet.data.image_files import FILES_PER_TASK, check_files
from horovod_megdet.data.images import ImageFileError, ImageHeader, _size_of_plain_jpeg, read_header, read_image


@pytest.mark.parametrize("waits", [0, FILES_PER_TASK])
def test_files_are_read_in_threads_where_reading_means_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: int
) -> None:
    names = [f"{number}.png" for number in range(4 * FILES_PER_TASK)]
    for number, name in enumerate(names):
        Image.new("L", (number + 1, 3)).save(tmp_path / name)
    missing = FILES_PER_TASK + 5
    (tmp_path / names[missing]).unlink()
    readers = []

    def read_header(path: Path) -> ImageHeader:
        readers.append(threading.current_thread())
        return original(path)

    original = image_files.read_header
    monkeypatch.setattr(image_files, "read_header", read_header)
    monkeypatch.setattr(image_files, "_waits", itertools.count(step=waits).__next__)
    counts: list[int] = []
    found = check_files(tmp_path, names, "open", counts.append)

    assert found.errors == {missing: "no such image file"}
    assert found.headers[:, 1].tolist() == [0 if number == missing else number + 1 for number in range(len(names))]
    assert counts == list(range(1, len(names) + 1))
    here = readers.count(threading.current_thread())
    assert here == (FILES_PER_TASK if waits else len(names))


def test_a_jpeg_with_something_odd_is_read_at_every_size_or_at_none(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.effect_noise((400, 300), 50).convert("RGB").save(whole, "JPEG", quality=90)
    content, odd, cut = whole.getvalue(), tmp_path / "odd.jpg", tmp_path / "cut.jpg"
    odd.write_bytes(content[:-2] + b"\0\1\2\3" + content[-2:])
    cut.write_bytes(content[: len(content) // 2])
    assert read_image(odd).shape == (3, 300, 400)
    assert read_image(odd, at_least=(75, 100)).shape == (3, 75, 100)
    for at_least in (None, (75, 100)):
        with pytest.raises(ImageFileError, match=r"cut\.jpg"):
            read_image(cut, at_least)


def test_programs_may_lift_pillows_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg")
    assert read_header(tmp_path / "a.jpg").size == (30, 40)


def test_pixels_of_unknown_range_are_noticed_from_the_header(tmp_path: Path) -> None:
    Image.new("F", (40, 30)).save(tmp_path / "a.tif")
    with pytest.raises(ImageFileError, match="floating-point numbers of unknown range"):
        read_header(tmp_path / "a.tif")


def test_waiting_is_noticed() -> None:
    before = image_files._waits()
    for _ in range(20):
        threading.Event().wait(0.001)
    assert image_files._waits() - before >= 20


MODES = {"RGB": 3, "L": 1, "CMYK": 4}


def jpeg(mode: str, **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, MODES[mode]), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise.squeeze(), mode).save(file, "JPEG", **options)
    return file.getvalue()


JPEGS = [jpeg(mode, progressive=progressive) for mode in MODES for progressive in (False, True)]


def pillow_size(content: bytes) -> tuple[int, int] | None:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.height, image.width
    except Exception:  # on damaged bytes, Pillow's plugins may raise anything
        return None


@given(
    content=st.sampled_from(JPEGS),
    changes=st.lists(st.tuples(st.integers(2, 699), st.integers(0, 255)), max_size=3),
    length=st.integers(2, 5000),
)
def test_the_quick_size_of_a_damaged_jpeg_is_none_or_pillows(
    content: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    damaged = bytearray(content[:length])
    for place, value in changes:
        damaged[place % len(damaged)] = value
    assert _size_of_plain_jpeg(bytes(damaged)) in (None, pillow_size(bytes(damaged)))


def test_jpegs_without_exif_have_a_quick_size_and_no_others() -> None:
    assert [_size_of_plain_jpeg(content) for content in JPEGS] == 4 * [(40, 56)] + 2 * [None]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    assert _size_of_plain_jpeg(jpeg("RGB", exif=exif)) is None
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'
    assert _size_of_plain_jpeg(jpeg("RGB", xmp=xmp)) is None
