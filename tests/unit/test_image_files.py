"""Checking image files: what is found does not depend on how they are read."""

import itertools
import threading
from pathlib import Path

import pytest
from PIL import Image

from horovod_megdet.data import image_files
from horovod_megdet.data.image_files import FILES_PER_TASK, check_files
from horovod_megdet.data.images import ImageHeader


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


def test_waiting_is_noticed() -> None:
    before = image_files._waits()
    for _ in range(20):
        threading.Event().wait(0.001)
    assert image_files._waits() - before >= 20
