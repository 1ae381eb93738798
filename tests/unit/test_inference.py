"""Detections from Python."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import horovod_megdet as megdet
from horovod_megdet.config import Config
from horovod_megdet.data.images import read_image
from horovod_megdet.data.synthetic import ensure_synthetic
from horovod_megdet.engine import checkpoint
from horovod_megdet.engine.checkpoint import Position, RunDescription, TrainingState
from horovod_megdet.errors import UserError
from horovod_megdet.models.detector import build_detector

PROJECT = Path(__file__).resolve().parents[2]
NAMES, CATEGORY_IDS = ["red", "green", "blue"], [2, 3, 5]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint of a detector with random weights."""
    config = Config.model_validate(yaml.safe_load((PROJECT / "tests" / "parallel" / "tiny.yaml").read_text()))
    torch.manual_seed(0)
    detector = build_detector(config.model, config.batch_norm, len(NAMES))
    detector.roi_heads.box_predictor.cls_score.bias.data = torch.tensor([0.0, 1.5, 0.0, -2.0])
    run = RunDescription(config.model_dump(mode="json"), NAMES, CATEGORY_IDS, "fingerprint", {})
    state = TrainingState(optimizer={}, scaler={}, position=Position(step=7), random=[])
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder, detector.state_dict(), state, run, epoch=1.0)
    return folder


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six images of two shapes and several sizes, without loss."""
    folder = tmp_path_factory.mktemp("images")
    drawn = sorted(Path(ensure_synthetic(folder / "drawn", train_images=1, val_images=6)["val_images"]).iterdir())
    sizes = [(90, 64), (64, 90), (180, 128), (64, 90), (90, 64), (64, 91)]
    for number, (path, size) in enumerate(zip(drawn, sizes, strict=True)):
        Image.open(path).resize(size).save(folder / f"{number}.png")
    return sorted(folder.glob("*.png"))


def assert_same(found: megdet.ImageDetections, expected: megdet.ImageDetections) -> None:
    """Up to the rounding of convolutions, which may differ by the size of the batch."""
    assert found.size == expected.size
    assert len(found) == len(expected) > 0
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-2)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    np.testing.assert_array_equal(found.labels, expected.labels)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_images_run_in_batches_and_come_back_in_their_order(run_dir: Path, paths: list[Path], batch_size: int) -> None:
    detector = megdet.load(run_dir)
    batches: list[int] = []
    detector.detector.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    found = detector.detect(paths, batch_size)
    assert [one.source for one in found] == paths
    # Four are 90 x 64 or 64 x 90 after resizing, two of each in the beginning; 64 x 91 has the same padding.
    assert sorted(batches) == {1: [1] * 6, 2: [1, 1, 2, 2], 4: [3, 3]}[batch_size]
    for path, one in zip(paths, found, strict=True):
        assert_same(one, megdet.load(run_dir).detect([path])[0])


def test_an_image_is_a_path_a_pillow_image_an_array_or_a_tensor(run_dir: Path, paths: list[Path]) -> None:
    tensor = read_image(paths[0])
    array = np.asarray(Image.open(paths[0]))
    given: list[Any] = [paths[0], str(paths[0]), Image.open(paths[0]), array, tensor, tensor / 255, tensor[None][0]]
    found = megdet.load(run_dir).detect(given)
    picture = found[0].draw()
    for one in found:
        if one.source is given[5]:  # resizing rounds 8-bit pixels only
            assert_same(one, megdet.load(run_dir).detect([tensor / 255])[0])
        else:
            assert_same(one, found[0])
        assert one.size == found[0].size
        if len(one) == len(found[0]):
            assert one.draw().size == picture.size
    batch = megdet.load(run_dir).detect(np.stack([array, array]))
    assert_same(batch[1], found[0])


def truncated_photo() -> Image.Image:
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "JPEG")
    return Image.open(io.BytesIO(whole.getvalue()[:-900]))


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (np.zeros((8, 8), np.uint8), r"Image 1 .* ndarray of uint8 \(8, 8\); wanted are a path"),
        (np.zeros((8, 8, 3), np.float32), r"ndarray of float32 \(8, 8, 3\)"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"Tensor of torch.uint8 \(8, 8, 3\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r"Tensor of torch.int64"),
        (torch.zeros(3, 0, 8), r"Tensor of torch.float32 \(3, 0, 8\)"),
        (None, r"it is a NoneType"),
        (Image.new("F", (8, 8)), r"floating-point numbers of unknown range"),
        (truncated_photo(), r"Image 1 .* image file is truncated"),
        ("missing.png", r"missing.png: no such image file"),
    ],
)
def test_what_is_no_image_is_a_user_error(run_dir: Path, image: Any, sentence: str) -> None:
    good = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(UserError, match=sentence):
        megdet.load(run_dir).detect([good, image])


def test_a_single_image_in_place_of_a_list_is_a_user_error(run_dir: Path, paths: list[Path]) -> None:
    for image in (str(paths[0]), paths[0], Image.open(paths[0])):
        with pytest.raises(UserError, match=r"detect\(\[image\]\)"):
            megdet.load(run_dir).detect(image)  # type: ignore[arg-type]


def test_detections_become_cocos_results_and_a_picture(run_dir: Path, paths: list[Path]) -> None:
    [found] = megdet.load(run_dir).detect(paths[:1])
    results = found.to_coco(image_id=42)
    assert len(results) == len(found)
    for result, box, score, label in zip(results, found.boxes, found.scores, found.labels, strict=True):
        assert result["image_id"] == 42
        assert result["category_id"] == CATEGORY_IDS[label - 1]
        assert result["bbox"] == pytest.approx([box[0], box[1], box[2] - box[0], box[3] - box[1]], abs=1e-3)
        assert result["score"] == pytest.approx(score, abs=1e-6)
    assert found.names == [NAMES[label - 1] for label in found.labels]
    middle = float(np.median(found.scores))
    some = found.above(middle)
    assert 0 < len(some) < len(found)
    assert some.scores.min() >= middle
    assert some.draw().tobytes() != found.draw().tobytes() != found.above(1.0).draw().tobytes()


def test_a_score_threshold_replaces_that_of_the_configuration(run_dir: Path, paths: list[Path]) -> None:
    lowest = megdet.load(run_dir).config.model.score_threshold
    [all_] = megdet.load(run_dir, score_threshold=0).detect(paths[:1])
    [default] = megdet.load(run_dir).detect(paths[:1])
    assert all_.scores.min() < lowest <= default.scores.min()
    with pytest.raises(UserError, match="between 0 and 1"):
        megdet.load(run_dir, score_threshold=2)


def test_importing_is_quick_and_nothing_is_printed(run_dir: Path, paths: list[Path]) -> None:
    program = (
        "import sys, horovod_megdet as megdet\n"
        "assert not {'torch', 'horovod', 'numpy', 'mpi4py'} & sys.modules.keys()\n"
        f"megdet.load({str(run_dir)!r}).detect([{str(paths[0])!r}])[0].draw()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_example_runs(run_dir: Path, paths: list[Path], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROJECT / "examples" / "detect.py"), str(run_dir), *map(str, paths[:2])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {entry["image_id"] for entry in json.loads((tmp_path / "results.json").read_text())} == {1, 2}
    assert {path.name for path in tmp_path.glob("*.png")} == {"detected_1.png", "detected_2.png"}


def test_settings_replace_values_of_the_checkpoint(run_dir: Path, paths: list[Path]) -> None:
    plain = megdet.load(run_dir).detect(paths[:1])[0]
    detector = megdet.load(
        run_dir, score_threshold=0.2, settings=["evaluation.flip=true", "evaluation.scales=[48, 64]"]
    )
    found = detector.detect(paths[:1])[0]
    assert found.scores.min() > 0.2
    assert found.boxes.tolist() != plain.boxes.tolist()
    with pytest.raises(UserError, match=r"unknown key `evaluation.flop`; did you mean `evaluation.flip`\?"):
        megdet.load(run_dir, settings=["evaluation.flop=true"])
    with pytest.raises(UserError, match="belongs to another detector"):
        megdet.load(run_dir, settings=["model.fpn_channels=8"])
