"""Detections of a checkpoint in any images."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from pycocotools.coco import COCO

from horovod_megdet import cli
from horovod_megdet.config import Config
from horovod_megdet.data.coco import load_dataset
from horovod_megdet.data.loader import build_eval_loader
from horovod_megdet.data.synthetic import ensure_synthetic
from horovod_megdet.engine import checkpoint
from horovod_megdet.engine.checkpoint import Position, RunDescription, TrainingState
from horovod_megdet.errors import EXIT_USER_ERROR, UserError
from horovod_megdet.evaluation.coco import predict_shard
from horovod_megdet.models.detector import build_detector
from horovod_megdet.predict import predict_images

TINY = Path(__file__).resolve().parent.parent / "parallel" / "tiny.yaml"
NAMES, CATEGORY_IDS = ["red", "green", "blue", "gray", "pink", "teal"], [1, 2, 3, 5, 8, 13]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint of a detector with random weights."""
    config = Config.model_validate(yaml.safe_load(TINY.read_text()))
    torch.manual_seed(0)
    detector = build_detector(config.model, config.batch_norm, len(NAMES))
    # Scores from high to very low, where random weights alone make all of them alike.
    detector.roi_heads.box_predictor.cls_score.bias.data = torch.linspace(2, -4, len(NAMES) + 1)
    run = RunDescription(config.model_dump(mode="json"), NAMES, CATEGORY_IDS, "fingerprint", {})
    state = TrainingState(optimizer={}, scaler={}, position=Position(step=7), random=[])
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder, detector.state_dict(), state, run, epoch=1.0)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with synthetic images."""
    root = tmp_path_factory.mktemp("data") / "synthetic"
    return Path(ensure_synthetic(root, train_images=1, val_images=4)["val_images"])


def content(output: Path) -> dict[str, list[dict[str, object]]]:
    return json.loads((output / "detections.json").read_text())


def test_detections_are_those_of_an_evaluation(run_dir: Path, images: Path, tmp_path: Path) -> None:
    path = predict_images(run_dir, [images], tmp_path / "new" / "out", 0.05, "cpu")
    assert path == tmp_path / "new" / "out" / "detections.json"
    found = COCO(str(path))
    saved = checkpoint.read(run_dir)
    config = saved.config
    detector = build_detector(config.model, config.batch_norm, len(NAMES))
    detector.load_state_dict(saved.weights())
    dataset = load_dataset(images.parent.parent / "annotations" / "val.json", images, training=False)
    loader = build_eval_loader(dataset, config.data, rank=0, ranks=1)
    expected = predict_shard(detector, loader, CPU).to_coco(CATEGORY_IDS)
    assert len(expected) > 20
    names = {image_id: dataset.file_name(index) for index, image_id in enumerate(dataset.image_ids.tolist())}
    key = ("category_id", "bbox", "score")
    by_image = {
        name: [[entry[part] for part in key] for entry in expected if names[entry["image_id"]] == name]
        for name in names.values()
    }
    for image in found.dataset["images"]:
        entries = [[entry[part] for part in key] for entry in found.imgToAnns[image["id"]]]
        assert entries == by_image[Path(image["file_name"]).name]


def test_every_image_gets_a_picture_and_an_entry(run_dir: Path, images: Path, tmp_path: Path) -> None:
    predict_images(run_dir, [images], tmp_path, 0.05, CPU)
    files = sorted(images.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"detections.json", *(f"{path.stem}.png" for path in files)}
    written = content(tmp_path)
    assert [entry["file_name"] for entry in written["images"]] == [str(path) for path in files]
    assert written["categories"] == [{"id": i, "name": n} for i, n in zip(CATEGORY_IDS, NAMES, strict=True)]
    for entry in written["images"]:
        with Image.open(str(entry["file_name"])) as image:
            assert (entry["width"], entry["height"]) == image.size


def test_the_lowest_score_applies_to_file_and_pictures(run_dir: Path, images: Path, tmp_path: Path) -> None:
    image = sorted(images.iterdir())[0]
    predict_images(run_dir, [image], tmp_path / "all", 0.0, CPU)
    scores = sorted(float(str(entry["score"])) for entry in content(tmp_path / "all")["annotations"])
    assert scores[0] < 0.05, "a score below the configuration's threshold is possible"
    middle = scores[len(scores) // 2]
    predict_images(run_dir, [image], tmp_path / "some", middle, CPU)
    kept = [float(str(entry["score"])) for entry in content(tmp_path / "some")["annotations"]]
    assert 0 < len(kept) < len(scores)
    assert min(kept) >= middle - 1e-6
    predict_images(run_dir, [image], tmp_path / "none", 1.0, CPU)
    assert content(tmp_path / "none")["annotations"] == []
    pictures = [(tmp_path / name / f"{image.stem}.png").read_bytes() for name in ("all", "some", "none")]
    assert len(set(pictures)) == 3


def test_one_bad_image_does_not_stop_the_others(run_dir: Path, images: Path, tmp_path: Path) -> None:
    good = sorted(images.iterdir())[:2]
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(good[0].read_bytes()[:200])
    (tmp_path / "empty").mkdir()
    given = [good[0], bad, tmp_path / "missing.png", tmp_path / "empty", good[1]]
    with pytest.raises(UserError) as caught:
        predict_images(run_dir, given, tmp_path / "out", 0.05, CPU)
    assert caught.value.exit_code == EXIT_USER_ERROR
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    for name in ("bad.jpg", "missing.png", "empty"):
        assert sum(f"{tmp_path / name}: " in line for line in lines) == 1
    assert [entry["file_name"] for entry in content(tmp_path / "out")["images"]] == [str(path) for path in good]
    assert all((tmp_path / "out" / f"{path.stem}.png").exists() for path in good)


def test_images_with_equal_names_get_separate_pictures(run_dir: Path, images: Path, tmp_path: Path) -> None:
    first, second = sorted(images.iterdir())[:2]
    for number, (folder, source) in enumerate([("a", first), ("b", second), ("c", second)]):
        (tmp_path / folder).mkdir()
        suffix = ".jpeg" if number else ".jpg"
        (tmp_path / folder / f"x{suffix}").write_bytes(source.read_bytes())
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    predict_images(run_dir, [tmp_path / folder for folder in "abc"], tmp_path / "out", 0.05, CPU)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["x.png", "x_2.png", "x_3.png"]
    assert [entry["id"] for entry in content(tmp_path / "out")["images"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("score", "device", "sentence"),
    [
        (1.5, "cpu", "between 0 and 1, not 1.5"),
        (float("nan"), "cpu", "between 0 and 1, not nan"),
        (0.5, "gpu", "The device 'gpu' cannot be used: "),
    ],
)
def test_mistakes_are_reported_before_anything_is_written(
    run_dir: Path, images: Path, tmp_path: Path, score: float, device: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        predict_images(run_dir, [images], tmp_path / "out", score, device)
    assert not (tmp_path / "out").exists()


def test_no_picture_replaces_an_image(run_dir: Path, images: Path, tmp_path: Path) -> None:
    photo = sorted(images.iterdir())[0]
    copy = tmp_path / f"{photo.stem}.png"
    Image.open(photo).save(copy)
    before = copy.read_bytes()
    for given in ([copy], [tmp_path], [photo, copy]):
        with pytest.raises(UserError, match=r"would be replaced .* Give --output another folder"):
            predict_images(run_dir, given, tmp_path / "." / "sub" / "..", 0.5, "cpu")
    assert copy.read_bytes() == before
    assert list(tmp_path.iterdir()) == [copy]


def test_the_lowest_score_is_that_of_the_option_or_of_a_setting(
    run_dir: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lowest(*arguments: str) -> float:
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        command = ["megdet", "predict", str(run_dir), str(images), "--output", str(output), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        assert cli.main() == 0
        return min((float(str(entry["score"])) for entry in content(output)["annotations"]), default=1.0)

    assert lowest() >= 0.5
    assert 0.1 <= lowest("--score", "0.1") < 0.5
    assert 0.1 <= lowest("--set", "model.score_threshold=0.1") < 0.5
    both = ["--score", "0.1", "--set", "model.score_threshold=0.2"]
    monkeypatch.setattr(sys, "argv", ["megdet", "predict", str(run_dir), str(images), *both])
    assert cli.main() == EXIT_USER_ERROR
    assert "Give the lowest score once" in capsys.readouterr().err


def test_a_folder_without_a_checkpoint_is_a_user_error(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: there is no such checkpoint"):
        predict_images(tmp_path / "nothing", [images], tmp_path / "out", 0.5, CPU)
