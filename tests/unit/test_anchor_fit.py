"""megdet anchors: the best IoU of each object is that with the detector's own anchors; what is suggested is better."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_coco import annotation
from torchvision.ops import box_iou

from horovod_megdet.cli import main
from horovod_megdet.config import BatchNormConfig, Config, DataConfig, ModelConfig
from horovod_megdet.data.coco import CocoDataset, load_dataset
from horovod_megdet.models.anchor_fit import ResizedBoxes, best_sizes, resized_boxes
from horovod_megdet.models.detector import build_detector
from horovod_megdet.report.anchors import THIN, fit_anchors

RATIOS = (0.5, 1.0, 2.0)


def random_boxes(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    sides = np.exp(generator.uniform(np.log(3), np.log(min(height, width)), (count, 2)))
    corner = generator.uniform(0, 1, (count, 2)) * ([width, height] - sides)
    return torch.from_numpy(np.concatenate([corner, corner + sides], axis=1))


@pytest.mark.parametrize(("height", "width"), [(96, 128), (100, 223), (250, 65)])
def test_best_iou_is_that_of_the_detectors_anchors(height: int, width: int) -> None:
    sizes = (9, 20, 37, 64, 150)
    model = ModelConfig(backbone="resnet18", weights="none", anchor_sizes=sizes, fpn_channels=8, box_head_channels=8)
    detector = build_detector(model, BatchNormConfig(), num_classes=1).eval()
    with torch.no_grad():
        batch, _ = detector.transform([torch.zeros(3, height, width)])
        levels = list(detector.backbone(batch.tensors).values())
        anchors = torch.cat(detector.rpn._anchors(batch.tensors, levels, torch.float32)).double()
    boxes = random_boxes(400, height, width)
    objects = ResizedBoxes(boxes, torch.tensor([[height, width]]).expand(400, 2), np.ones(400, np.int64))
    expected = box_iou(boxes, anchors).amax(dim=1)
    np.testing.assert_allclose(objects.best_iou(sizes, RATIOS), expected, rtol=1e-9)


def test_class_mean_gives_rare_classes_the_same_weight() -> None:
    objects = ResizedBoxes(torch.zeros(4, 4), torch.zeros(4, 2), np.array([1, 1, 1, 5]))
    assert objects.class_mean(np.array([0.2, 0.2, 0.5, 0.9])) == pytest.approx((0.3 + 0.9) / 2)


def test_best_sizes_are_those_of_the_objects() -> None:
    """Squares of 24, 48 and 96 pixels; nothing else covers them as well as anchors of these sizes."""
    generator = np.random.default_rng(0)
    corners = torch.from_numpy(generator.uniform(0, 100, (300, 2)))
    sides = torch.tensor([24.0, 48.0, 96.0], dtype=torch.float64).repeat(100)[:, None]
    objects = ResizedBoxes(torch.cat([corners, corners + sides], 1), torch.full((300, 2), 256), np.tile([1, 2, 3], 100))
    found = best_sizes(objects, (1.0,))
    assert any(abs(size - 24) <= 1 for size in found), found
    assert all(larger == 2 * smaller for smaller, larger in itertools.pairwise(found))


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    """Ten images of 640 x 480 with objects of some 40 pixels, and a crowd region that is none of them."""
    generator = np.random.default_rng(1)
    images, entries = [], []
    (tmp_path / "images").mkdir()
    for number in range(10):
        Image.new("L", (640, 480)).save(tmp_path / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 640, "height": 480})
        for _ in range(8):
            box = [*generator.uniform(0, 400, 2), *generator.uniform(36, 44, 2)]
            entries.append(annotation(len(entries) + 1, number, box, category=1))
        entries.append(annotation(len(entries) + 1, number, [0, 0, 640, 480], category=1, iscrowd=1))
    content = {"images": images, "annotations": entries, "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    return load_dataset(tmp_path / "train.json", tmp_path / "images", training=True)


def configuration(shorter_side: int, sizes: tuple[int, ...]) -> Config:
    data = DataConfig(shorter_side_train=(shorter_side,), longer_side_train=2 * shorter_side)
    return Config(model=ModelConfig(anchor_sizes=sizes), data=data)


def test_boxes_are_resized_with_their_images(dataset: CocoDataset) -> None:
    objects = resized_boxes(dataset, (240, 120), 1000)
    assert len(objects.boxes) == 160, "crowds are not among them; each size of the images has all"
    assert objects.image_sizes.unique(dim=0).tolist() == [[120, 160], [240, 320]]
    np.testing.assert_allclose(objects.sides()[:80], 2 * objects.sides()[80:])
    assert 18 < objects.sides()[:80].min() < objects.sides()[:80].max() < 22


def test_what_is_suggested_covers_more_objects(dataset: CocoDataset) -> None:
    report = fit_anchors(configuration(480, (128, 256, 512, 1024, 2048)), dataset)
    assert report.configured.recall(0.5) == 0
    assert report.suggested.recall(0.5) > 0.98
    assert report.suggested.shorter_sides == (480,)
    advice = yaml.safe_load(report.advice().partition("\n\n")[2])
    assert advice == {"model": {"anchor_sizes": list(report.suggested.anchor_sizes)}}


def test_small_objects_ask_for_larger_images(dataset: CocoDataset) -> None:
    report = fit_anchors(configuration(80, (8, 16, 32, 64, 128)), dataset)
    assert np.median(report.configured.objects.shorter_sides()) < THIN
    assert report.suggested.shorter_sides == (128,), "40 pixels of 480 are 8 of 96; 5 % are smaller"
    assert (report.suggested.objects.shorter_sides() < THIN).mean() <= 0.05
    advice = yaml.safe_load(report.advice().partition("\n\n")[2])["data"]
    assert advice["shorter_side_train"] == [128]
    assert advice["shorter_side_test"] == 128


def test_good_settings_are_left_as_they_are(dataset: CocoDataset) -> None:
    good = fit_anchors(configuration(480, (128, 256, 512, 1024, 2048)), dataset).suggested.anchor_sizes
    report = fit_anchors(configuration(480, good), dataset)
    assert report.suggested is report.configured
    assert "Other anchor sizes would raise neither" in report.advice()
    assert "anchor_sizes:" not in report.advice()


def test_the_command_prints_and_draws(
    dataset: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [f"data.train_annotations={tmp_path / 'train.json'}", f"data.train_images={tmp_path / 'images'}"]
    overrides = [word for path in paths for word in ("--set", path)]
    plot = tmp_path / "anchors.png"
    monkeypatch.setattr(sys, "argv", ["megdet", "anchors", *overrides, "--plot", str(plot)])
    assert main() == 0
    assert "recall at IoU 0.5 of all objects" in capsys.readouterr().out
    with Image.open(plot) as picture:
        assert picture.size == (1800, 504)
