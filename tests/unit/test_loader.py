"""Batches: equal for any number of workers and ranks; damaged files; signals to workers."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import psutil
import pytest
import torch
from PIL import ExifTags, Image

from horovod_megdet.config import DataConfig
from horovod_megdet.data.coco import CocoDataset, load_dataset
from horovod_megdet.data.images import ImageFileError
from horovod_megdet.data.loader import (
    Batch,
    ViewsReader,
    build_eval_loader,
    build_train_loader,
    image_seed,
)
from horovod_megdet.data.sampler import PlannedImage
from horovod_megdet.data.synthetic import ensure_synthetic
from horovod_megdet.data.workers import WORKER_SIGNALS


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return ensure_synthetic(tmp_path_factory.mktemp("data") / "synthetic", 24, 7)


@pytest.fixture
def train_set(paths: dict[str, str]) -> CocoDataset:
    return load_dataset(paths["train_annotations"], paths["train_images"], training=True)


@pytest.fixture
def val_set(paths: dict[str, str]) -> CocoDataset:
    return load_dataset(paths["val_annotations"], paths["val_images"], training=False)


def config(**values: Any) -> DataConfig:
    sizes = {"shorter_side_train": (64, 80), "longer_side_train": 200, "shorter_side_test": 96, "longer_side_test": 200}
    return DataConfig.model_validate({"workers": 0, "images_per_rank": 3, **sizes, **values})


def train_batches(dataset: CocoDataset, data: DataConfig, **values: Any) -> list[Batch]:
    position = {"seed": 5, "rank": 0, "ranks": 1, "start": 0, "stop": 48, **values}
    return list(build_train_loader(dataset, data, **position))


def flat(batches: list[Batch]) -> list[tuple[Any, ...]]:
    """The content of some batches, a tuple for each image, comparable with ==."""
    return [
        (
            image.shape,
            image.numpy().tobytes(),
            target["boxes"].tolist(),
            target["labels"].tolist(),
            target["image_id"],
            target["index"],
            target["original_size"],
            target["seed"],
        )
        for batch in batches
        for image, target in zip(batch.images, batch.targets, strict=True)
    ]


def test_batches_hold_what_they_document(train_set: CocoDataset) -> None:
    batches = train_batches(train_set, config())
    assert len(batches) == 16
    for batch in batches:
        assert batch.error is None
        assert len(batch) == 3
        for image, target in zip(batch.images, batch.targets, strict=True):
            index = target["index"]
            assert image.dtype == torch.uint8
            assert min(image.shape[1:]) in (64, 80)
            assert target["image_id"] == train_set.image_ids[index]
            assert target["original_size"] == tuple(train_set.sizes[index])
            assert target["labels"].tolist() == train_set.read(index)[2].tolist()
            height, width = image.shape[1:]
            assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
            assert (target["boxes"] >= 0).all()
            assert (target["boxes"] <= torch.tensor([width, height, width, height])).all()


def test_ranks_and_workers_do_not_change_an_image(train_set: CocoDataset) -> None:
    state = torch.get_rng_state()
    alone = flat(train_batches(train_set, config()))
    shares = [flat(train_batches(train_set, config(workers=2), rank=rank, ranks=2)) for rank in (0, 1)]
    together = [shares[place // 3 % 2][place // 6 * 3 + place % 3] for place in range(48)]
    assert together == alone
    assert torch.equal(torch.get_rng_state(), state), "the global generator is untouched"


def test_starting_in_the_middle_continues_at_the_same_image(train_set: CocoDataset) -> None:
    whole = flat(train_batches(train_set, config(), stop=60))
    assert flat(train_batches(train_set, config(), start=36, stop=60)) == whole[36:]


def test_augmentation_differs_between_epochs_and_seeds() -> None:
    places = [PlannedImage(epoch, index, repeat) for epoch in range(5) for index in range(5) for repeat in range(3)]
    seeds = {image_seed(seed, place) for seed in range(5) for place in places}
    assert len(seeds) == 375
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (2, 1), (9, 0)])
def test_evaluation_sees_every_image_once(val_set: CocoDataset, ranks: int, workers: int) -> None:
    seen: list[int] = []
    for rank in range(ranks):
        loader = build_eval_loader(val_set, config(workers=workers), rank=rank, ranks=ranks)
        for _ in range(2):  # a loader can be iterated again
            batches = list(loader)
            assert all(len(batch) == 1 for batch in batches)
        seen += [batch.targets[0]["image_id"] for batch in batches]
    assert sorted(seen) == sorted(val_set.image_ids.tolist())


def test_a_batch_survives_pickling(train_set: CocoDataset) -> None:
    batches = train_batches(train_set, config(photometric=True))[:2]
    assert flat(pickle.loads(pickle.dumps(batches))) == flat(batches)
    batches[0].error = "a.jpg: gone"
    assert pickle.loads(pickle.dumps(batches[0])).error == "a.jpg: gone"
    moved = batches[0].to(torch.device("cpu"))
    assert flat([moved]) == flat(batches[:1])


def test_batches_from_workers_need_no_shared_memory_and_leave_nothing(train_set: CocoDataset) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:batch")

    loader = build_train_loader(train_set, config(workers=1), seed=5, rank=0, ranks=1, start=0, stop=48)
    descriptors = []
    for number, batch in enumerate(loader):
        assert mapped() == 1 + (number > 0)  # this one, and the last one until now
        previous = batch
        descriptors.append(len(list(Path("/proc/self/fd").iterdir())))
    assert max(descriptors[2:]) == descriptors[2]
    del batch, previous
    assert mapped() == 0


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_file_that_became_unreadable_is_named_and_left_out(tmp_path: Path, workers: int, damage: str) -> None:
    paths = ensure_synthetic(tmp_path / "synthetic", 6, 1)
    dataset = load_dataset(paths["train_annotations"], paths["train_images"], training=True, keep_empty=True)
    bad = dataset.path(2)
    if damage == "missing":
        bad.unlink()
    else:
        bad.write_bytes(bad.read_bytes()[:1000])
    for images_per_rank in (1, 3):
        batches = train_batches(dataset, config(workers=workers, images_per_rank=images_per_rank), stop=6)
        (spoiled,) = [batch for batch in batches if batch.error is not None]
        assert str(bad) in str(spoiled.error)
        assert [len(batch) for batch in batches if batch is not spoiled] == [images_per_rank] * (len(batches) - 1)
        if images_per_rank == 1:
            assert spoiled.targets[0]["image_id"] == -1, "a black image, so that there is a forward pass"
            assert not spoiled.images[0].any()
            assert spoiled.targets[0]["boxes"].shape == (0, 4)
        else:
            assert len(spoiled) == 2
        assert 2 not in [target["index"] for batch in batches for target in batch.targets]


def test_an_image_of_another_size_than_at_the_start_is_named(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (100, 60)).save(path, exif=exif)
    entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 30, 15, 30]}
    images = [{"id": 1, "file_name": "photo.jpg", "width": 100, "height": 60}]  # as stored, and not as displayed
    listed = {"images": images, "annotations": [entry], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "a.json").write_text(json.dumps(listed))
    checked = load_dataset(tmp_path / "a.json", tmp_path, training=True, check_images="open")
    assert checked.read(0)[0].shape == (3, 100, 60)
    trusted = load_dataset(tmp_path / "a.json", tmp_path, training=True, check_images="trust")
    with pytest.raises(ImageFileError, match=r"photo.jpg: the image has 60 x 100 pixels, and not 100 x 60"):
        trusted.read(0)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_any_view_is_an_error_of_the_image(failing: int) -> None:
    readers = [MagicMock() for _ in range(2)]
    for number, reader in enumerate(readers):
        reader.__getitem__.return_value = Batch([], error="cannot be read" if number == failing else None)
    assert ViewsReader(readers)[[]].error == "cannot be read"


def test_large_photos_are_decoded_at_a_fraction_of_their_size_and_look_the_same(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    small.resize((1200, 800), Image.Resampling.BICUBIC).save(tmp_path / "photo.jpg", quality=95)
    content = {
        "images": [{"id": 1, "file_name": "photo.jpg", "width": 1200, "height": 800}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [120, 80, 600, 400], "iscrowd": 0}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "a.json").write_text(str(content).replace("'", '"'))
    dataset = load_dataset(tmp_path / "a.json", tmp_path, training=True)
    batch = train_batches(dataset, config(shorter_side_train=(100,), horizontal_flip=0.0), stop=1)[0]
    assert dataset.read(0, at_least=(100, 150))[0].shape == (3, 100, 150)
    assert batch.images[0].shape == (3, 100, 150)
    assert batch.targets[0]["original_size"] == (800, 1200)
    assert batch.targets[0]["boxes"].tolist() == [[15, 10, 90, 60]]
    full = torch.nn.functional.interpolate(dataset.read(0)[0][None].float(), (100, 150), mode="area")[0]
    assert (batch.images[0].float() - full).abs().mean() < 2


PROGRAM = """
    import signal, sys, time
    from horovod_megdet.config import DataConfig
    from horovod_megdet.data.coco import load_dataset
    from horovod_megdet.data.loader import build_train_loader

    if __name__ == "__main__":
        received = []
        for number in (signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, lambda number, _: received.append(signal.Signals(number).name))
        dataset = load_dataset(sys.argv[1], sys.argv[2], training=True)
        data = DataConfig(workers=2, images_per_rank=2, shorter_side_train=(32,), longer_side_train=64)
        loader = build_train_loader(dataset, data, seed=0, rank=0, ranks=1, start=0, stop=100_000)
        batches = iter(loader)
        next(batches)
        print("ready", flush=True)
        signal.alarm(600)
        while not received:  # in short sleeps: a signal that comes just before a long wait does not end it
            time.sleep(0.01)
        print("main got", *received, flush=True)
        for _ in range(50):
            next(batches)
        print("read 50 batches", flush=True)
"""


@pytest.fixture
def program(tmp_path: Path, paths: dict[str, str]) -> Any:
    """A process group that loads with two workers and waits after the first batch."""
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))
    process = subprocess.Popen(
        [sys.executable, str(script), paths["train_annotations"], paths["train_images"]],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_signals_to_all_processes_leave_workers_alive(program: subprocess.Popen[str], number: signal.Signals) -> None:
    os.killpg(program.pid, number)
    assert program.stdout is not None
    assert program.stdout.readline() == f"main got {number.name}\n"
    assert program.stdout.readline() == "read 50 batches\n"


@pytest.mark.slow
def test_signals_cannot_reach_a_worker_that_starts(program: subprocess.Popen[str]) -> None:
    """Until it ignores them: the fork server, which it inherits that from, has them blocked."""
    servers = [p for p in psutil.Process(program.pid).children() if "forkserver" in " ".join(p.cmdline())]
    assert len(servers) == 1
    blocked = re.search(r"^SigBlk:\s+(\w+)$", Path(f"/proc/{servers[0].pid}/status").read_text(), re.MULTILINE)
    assert blocked
    mask = int(blocked[1], 16)
    assert all(mask >> (number - 1) & 1 for number in WORKER_SIGNALS)


@pytest.mark.slow
def test_workers_end_with_a_killed_main_process(program: subprocess.Popen[str]) -> None:
    workers = psutil.Process(program.pid).children(recursive=True)
    assert len(workers) >= 3, "the fork server and two workers"
    program.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []


@pytest.mark.slow
def test_workers_load_neither_horovod_nor_mpi(program: subprocess.Popen[str]) -> None:
    for process in psutil.Process(program.pid).children(recursive=True):
        libraries = [mapping.path for mapping in process.memory_maps()]
        assert not [
            path for path in libraries if "horovod" in Path(path).parts or "mpi4py" in path or "libmpi." in path
        ]
