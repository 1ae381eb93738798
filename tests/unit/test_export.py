"""Exported detectors detect what ``megdet predict`` detects."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.transforms.v2 import functional as F

import horovod_megdet as megdet
from horovod_megdet import cli
from horovod_megdet.config import Config, ModelConfig
from horovod_megdet.data.synthetic import ensure_synthetic
from horovod_megdet.engine import checkpoint
from horovod_megdet.engine.checkpoint import Position, RunDescription, TrainingState
from horovod_megdet.errors import UserError
from horovod_megdet.evaluation.detections import in_original_pixels
from horovod_megdet.export import METADATA_FILE, export_detector
from horovod_megdet.inference import ImageDetections, TrainedDetector
from horovod_megdet.models.any_image import AnyImage
from horovod_megdet.models.detector import build_detector
from horovod_megdet.predict import predict_images

PROJECT = Path(__file__).resolve().parents[2]
TINY = PROJECT / "tests" / "parallel" / "tiny.yaml"
NAMES, CATEGORY_IDS = ["Größe", "green", "blue", "gray", "pink", "teal"], [1, 2, 3, 5, 8, 13]
IMAGES = 50

NORMS = {
    "cgbn": {"backbone_norm": "cgbn", "fpn_norm": "cgbn", "box_head_norm": "none"},
    "frozen": {"backbone_norm": "frozen", "fpn_norm": "none", "box_head_norm": "cgbn"},
    "none": {"backbone_norm": "none", "fpn_norm": "local", "box_head_norm": "frozen"},
}

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Boxes, scores, labels."""


@torch.no_grad()
def make_decisive(detector: nn.Module) -> None:
    """Gives random weights the norms' statistics of a training, and detections of all scores, sizes and places."""
    generator = torch.Generator().manual_seed(0)
    for name, value in detector.state_dict().items():
        norm = name.rpartition(".")[0]
        if f"{norm}.running_var" not in detector.state_dict() or "num_batches" in name:
            continue
        value.copy_(0.7 + 0.6 * torch.rand(value.shape, generator=generator))
        if name.endswith(("bias", "running_mean")):
            value.sub_(1).mul_(0.3)
    predictor = detector.roi_heads.box_predictor
    standardize(detector.rpn.head.cls_logits, 3)
    standardize(detector.rpn.head.bbox_pred, 0.3)
    standardize(predictor.cls_score, 2)
    standardize(predictor.bbox_pred, 1)
    detector.eval().predict([torch.rand(3, 128, 160, generator=generator)])
    predictor.cls_score.bias[0] += 3  # the background


def standardize(layer: nn.Module, std: float) -> None:
    """In the first forward pass, makes each channel of the output have mean 0 and this standard deviation."""

    def change(layer: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        handle.remove()
        values = output.transpose(0, 1).flatten(1)
        factor = std / values.std(dim=1)
        layer.bias.sub_(values.mean(dim=1)).mul_(factor)
        layer.weight.mul_(factor.view(-1, *[1] * (layer.weight.dim() - 1)))
        changed: torch.Tensor = layer(*inputs)  # type: ignore[misc]
        return changed

    handle = layer.register_forward_hook(change)


def save_run(folder: Path, model: dict[str, Any], **sections: dict[str, Any]) -> Path:
    """A run directory with one checkpoint of a decisive detector."""
    values = yaml.safe_load(TINY.read_text())
    values["model"] |= model
    config = Config.model_validate(values | sections)
    torch.manual_seed(0)
    detector = build_detector(config.model, config.batch_norm, len(NAMES))
    make_decisive(detector)
    run = RunDescription(config.model_dump(mode="json"), NAMES, CATEGORY_IDS, "fingerprint", {})
    state = TrainingState(optimizer={}, scaler={}, position=Position(step=7, images_seen=56), random=[])
    checkpoint.save(folder, detector.state_dict(), state, run, epoch=1.0)
    return folder


@pytest.fixture(scope="module", params=NORMS)
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = NORMS[request.param] | {"proposals_test": 64, "rpn_candidates_test": 100}
    return save_run(tmp_path_factory.mktemp(request.param), model, batch_norm={"eps": 1e-3})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photos of 50 sizes between 20 and 1,200 pixels: JPEG and PNG, gray, turned by EXIF."""
    folder = tmp_path_factory.mktemp("images")
    drawn = sorted(Path(ensure_synthetic(folder / "drawn", train_images=1, val_images=10)["val_images"]).iterdir())
    random = np.random.default_rng(0)
    paths = []
    for number in range(IMAGES):
        size = np.exp(random.uniform(np.log(20), np.log(1200), 2)).round().astype(int)
        size = size.clip(max(size) // 4).tolist()
        image = Image.open(drawn[number % len(drawn)]).resize(size, Image.Resampling.BICUBIC)
        if number % 10 == 9:
            image = image.convert("L")
        exif = Image.Exif()
        exif[0x0112] = random.integers(1, 9).item()
        paths.append(folder / f"{number}.{'png' if number % 3 == 0 else 'jpg'}")
        image.save(paths[-1], exif=exif)
    return paths


@pytest.fixture(scope="module")
def expected(run_dir: Path, images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Arrays]:
    """What ``megdet predict`` writes."""
    threshold = checkpoint.read(run_dir).config.model.score_threshold
    path = predict_images(run_dir, images, tmp_path_factory.mktemp("predicted"), threshold, "cpu")
    written = json.loads(path.read_text())
    found = []
    for image in written["images"]:
        entries = [entry for entry in written["annotations"] if entry["image_id"] == image["id"]]
        boxes = np.array([entry["bbox"] for entry in entries]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [CATEGORY_IDS.index(entry["category_id"]) + 1 for entry in entries]
        found.append((boxes, np.array([entry["score"] for entry in entries]), np.array(labels)))
    return found


@pytest.fixture(scope="module")
def program(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the program of docs/export.md defines."""
    pytest.importorskip("onnx", reason="the extra `export` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    path = tmp_path_factory.mktemp("onnx") / "detector.onnx"
    export_detector(run_dir, path, "onnx")
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["detect.py", str(path)])
        exec(code_block("onnxruntime"), names)
    return names


def code_block(word: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / "export.md").read_text(), re.DOTALL)
    return next(block for block in blocks if word in block)


def assert_alike(found: list[Arrays], expected: list[Arrays], detector: TrainedDetector, images: list[Any]) -> None:
    """Pairs within 0.02 pixels and 1e-4 of score; at most 1 % without a partner, each of them near a threshold."""
    alone = 0
    for ours, theirs, image in zip(found, expected, images, strict=True):
        partners = near(ours, theirs)
        new, lost = ~partners.any(axis=1), ~partners.any(axis=0)
        if new.any() or lost.any():
            others = list(variants(detector, image))
            assert np.any([near(ours, other).any(axis=1) for other in others], axis=0)[new].all()
            assert np.any([~near(other, theirs).any(axis=0) for other in others], axis=0)[lost].all()
        alone += new.sum() + lost.sum()
    total = sum(len(scores) for _, scores, _ in expected)
    assert total >= len(expected)
    assert alone <= 0.01 * 2 * total


def near(a: Arrays, b: Arrays) -> np.ndarray:
    """(of a, of b) bool: whether two detections are the same."""
    distance = np.abs(a[0][:, None] - b[0][None]).max(axis=2)
    difference = np.abs(a[1][:, None] - b[1][None])
    return (distance <= 0.02) & (difference <= 1e-4) & (a[2][:, None] == b[2][None])


def variants(detector: TrainedDetector, image: Any) -> Iterator[Arrays]:
    """The detections with each threshold a little lower and higher."""
    rpn, heads = detector.detector.rpn, detector.detector.roi_heads
    thresholds: list[tuple[dict[str, Any], str, float]] = [
        (vars(rpn), "nms_thresh", 1e-4),
        (vars(heads), "nms_thresh", 1e-4),
        (vars(heads), "score_thresh", 1e-4),
        (vars(heads), "detections_per_img", 1),
        (rpn._pre_nms_top_n, "testing", 1),
        (rpn._post_nms_top_n, "testing", 1),
    ]
    for place, key, step in thresholds:
        value = place[key]
        for place[key] in (value - step, value + step):
            yield as_arrays(detector.detect([image])[0])
        place[key] = value


def test_the_documented_program_detects_what_predict_does(
    run_dir: Path, program: dict[str, Any], images: list[Path], expected: list[Arrays]
) -> None:
    found = [tuple(program["detect"](path)) for path in images]
    assert_alike(found, expected, megdet.load(run_dir), images)


def test_onnx_says_what_the_classes_are_and_what_it_wants(program: dict[str, Any]) -> None:
    about = program["about"]
    assert json.loads(about["class_names"]) == NAMES
    assert json.loads(about["category_ids"]) == CATEGORY_IDS
    assert (about["shorter_side"], about["longer_side"], about["images_seen"]) == ("64", "112", "56")
    assert list(json.loads(about["inputs"])) == [entry.name for entry in program["session"].get_inputs()]
    assert list(json.loads(about["outputs"])) == [entry.name for entry in program["session"].get_outputs()]


def as_arrays(found: ImageDetections) -> Arrays:
    return found.boxes, found.scores, found.labels


def test_torchscript_detects_what_predict_does(run_dir: Path, images: list[Path], tmp_path: Path) -> None:
    export_detector(run_dir, tmp_path / "detector.pt", "torchscript")
    names: dict[str, Any] = {}
    exec(code_block("torch.jit.load").replace('"detector.pt"', repr(str(tmp_path / "detector.pt"))), names)
    assert names["class_names"] == NAMES
    assert json.loads(names["files"][METADATA_FILE])["category_ids"] == CATEGORY_IDS
    pixels = [np.array(Image.open(path).convert("RGB")) for path in images[:20]]
    detector = megdet.load(run_dir)
    reference = detector.detect(pixels)
    with torch.inference_mode():
        found = [
            tuple(value.numpy() for value in names["detector"](torch.from_numpy(image), torch.tensor(image.shape[:2])))
            for image in pixels
        ]
    assert_alike(found, [as_arrays(detections) for detections in reference], detector, pixels)


def test_torchvisions_own_detector_loads_the_state_dict_and_detects_the_same(
    images: list[Path], tmp_path: Path
) -> None:
    """MegDet's detector, with Cross-GPU BN in backbone and FPN, is torchvision's ResNet-50 FPN."""
    model = {key: ModelConfig.model_fields[key].default for key in ("fpn_channels", "box_head_channels")}
    model |= {key: ModelConfig.model_fields[key].default for key in ("anchor_sizes", "backbone")}
    model |= {"proposals_test": 50}
    data = {"shorter_side_test": 128, "longer_side_test": 256}
    run_dir = save_run(tmp_path, model, data=data, batch_norm={"eps": 1e-4})
    export_detector(run_dir, tmp_path / "detector.pth", "torchvision")
    saved = checkpoint.read(run_dir)
    config = saved.config.model
    theirs = fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=len(NAMES) + 1,
        min_size=128,
        max_size=256,
        rpn_pre_nms_top_n_test=config.rpn_candidates_test,
        rpn_post_nms_top_n_test=config.proposals_test,
    )
    theirs.load_state_dict(torch.load(tmp_path / "detector.pth"))
    theirs.eval()
    # Of the network's size, because torchvision resizes without antialiasing.
    photos = [F.resize(torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1), [128, 160 + n])
              for n, path in enumerate(images[:5])]  # fmt: skip
    with torch.inference_mode():
        found = [theirs([photo / 255])[0] for photo in photos]
    sizes = [(photo.shape[1], photo.shape[2]) for photo in photos]
    arrays = [in_original_pixels(*pair, pair[1]) for pair in zip(found, sizes, strict=True)]
    detector = megdet.load(run_dir)
    reference = detector.detect(photos)
    assert_alike(arrays, [as_arrays(detections) for detections in reference], detector, photos)


def test_torchvision_has_no_backbone_without_norms(tmp_path: Path) -> None:
    run_dir = save_run(tmp_path, NORMS["none"])
    with pytest.raises(UserError, match=r"model.backbone_norm is none"):
        export_detector(run_dir, tmp_path / "detector.pth", "torchvision")
    assert not (tmp_path / "detector.pth").exists()


def test_the_command_writes_into_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = save_run(tmp_path / "run", NORMS["cgbn"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["megdet", "export", str(run_dir), "--format", "torchvision"])
    assert cli.main() == 0
    assert capsys.readouterr().out == "detector.pth\n"
    export_detector(run_dir, tmp_path / "expected.pth", "torchvision")
    written, expected = (torch.load(tmp_path / name) for name in ("detector.pth", "expected.pth"))
    assert list(written) == list(expected)
    assert all(map(torch.equal, written.values(), expected.values()))


def test_onnx_without_its_package_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = save_run(tmp_path, {})
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"horovod-megdet\[export\]"):
        export_detector(run_dir, tmp_path / "detector.onnx", "onnx")


@pytest.mark.parametrize(("height", "width"), [(64, 64), (30, 41), (203, 97), (640, 481), (1000, 777)])
def test_images_are_resized_as_in_an_evaluation(height: int, width: int) -> None:
    """Pixels differ by at most 1, and hardly any do."""
    seen: list[torch.Tensor] = []

    class Witness(nn.Module):
        def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            seen.extend(images)
            return [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}]

    image = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    AnyImage(Witness(), 64, 112)(image, torch.tensor([height, width]))  # type: ignore[arg-type]
    scale = min(64 / min(height, width), 112 / max(height, width))
    size = [round(height * scale), round(width * scale)]
    difference = (seen[0] * 255 - F.resize(image.permute(2, 0, 1), size, antialias=True)).abs().round()
    assert difference.max() <= 1
    assert difference.mean() < 1e-3
