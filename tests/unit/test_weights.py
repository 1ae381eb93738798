"""Starting weights: ImageNet, torchvision's detection files, checkpoints of ours; and everything that can be wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import resnet18, resnet34

from horovod_megdet.config import BatchNormConfig, ModelConfig
from horovod_megdet.errors import UserError
from horovod_megdet.models.detector import Detector, build_detector
from horovod_megdet.models.weights import load_checkpoint, load_weights

RESNET18 = "resnet18-f37072fd.pth"


def configure(weights: str | Path = "none", **changes: Any) -> ModelConfig:
    small = {"backbone": "resnet18", "fpn_channels": 16, "box_head_channels": 32, "weights": str(weights)}
    return ModelConfig(**small | changes)


def build(model: ModelConfig, classes: int = 2) -> Detector:
    return build_detector(model, BatchNormConfig(), classes)


def load(model: ModelConfig, classes: int = 2) -> tuple[Detector, list[str]]:
    detector = build(model, classes)
    return detector, load_weights(detector, model)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of its own."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def classifier() -> dict[str, Tensor]:
    """A ResNet-18 with statistics that matter."""
    torch.manual_seed(0)
    network = resnet18()
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if "running_mean" in name or name.endswith("bias"):
                value.normal_(std=0.1)
            elif "running_var" in name or (value.dim() == 1 and "weight" in name):
                value.uniform_(0.5, 1.5)
    return network.state_dict()


def test_none_changes_nothing() -> None:
    assert load(configure())[1] == []


@pytest.mark.parametrize("norm", ["cgbn", "local", "frozen"])
def test_imagenet_weights_come_from_the_hub_cache(hub: Path, classifier: dict[str, Tensor], norm: str) -> None:
    torch.save(classifier, hub / RESNET18)
    detector, notices = load(configure("imagenet", backbone_norm=norm))
    assert notices == []
    own = detector.backbone.body.state_dict()
    loaded = [name for name in classifier if not name.startswith("fc.") and name in own]
    assert len(loaded) >= 100
    assert all(torch.equal(own[name], classifier[name]) for name in loaded)


def test_imagenet_norms_are_folded_into_a_backbone_without(hub: Path, classifier: dict[str, Tensor]) -> None:
    torch.save(classifier, hub / RESNET18)
    with_norms, folded = (load(configure("imagenet", backbone_norm=norm))[0].eval() for norm in ("frozen", "none"))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, levels = with_norms.backbone.body(x), folded.backbone.body(x)
    for name, level in levels.items():
        torch.testing.assert_close(level, expected[name], rtol=1e-4, atol=1e-4)


def test_a_missing_imagenet_file_says_where_to_put_which(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any, **options: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError) as caught:
        load(configure("imagenet"))
    message = str(caught.value)
    assert f"https://download.pytorch.org/models/{RESNET18}" in message
    assert str(hub / RESNET18) in message
    assert "\n" not in message


def test_a_classification_file_by_its_path(tmp_path: Path, classifier: dict[str, Tensor]) -> None:
    torch.save(classifier, tmp_path / "mine.pth")
    detector, notices = load(configure(tmp_path / "mine.pth"))
    assert notices == []
    assert torch.equal(detector.backbone.body.conv1.weight, classifier["conv1.weight"])


def test_a_checkpoint_of_ours_with_other_classes_keeps_its_heads_out(tmp_path: Path) -> None:
    saved = build(configure())
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    save_file(saved.state_dict(), folder / "model.safetensors")
    for path in (folder, folder / "model.safetensors"):
        detector, notices = load(configure(path), classes=5)
        (notice,) = notices
        assert "roi_heads.box_predictor.bbox_pred.bias" in notice
        assert "have another shape and keep their initial values" in notice
        assert detector.roi_heads.box_predictor.cls_score.weight.shape == (6, 32)
        assert torch.equal(detector.roi_heads.box_head.fc7.weight, saved.roi_heads.box_head.fc7.weight)
    assert load(configure(folder))[1] == []


def test_a_detection_file_with_the_old_names(tmp_path: Path) -> None:
    saved = build(configure(backbone_norm="frozen", fpn_norm="none"), classes=90)
    old = {}
    for name, value in saved.state_dict().items():
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        old[name.replace("0.0.", "0.") if ".fpn." in name else name] = value
    old = {
        name.replace("blocks.1.0.", "blocks.1.")
        .replace("blocks.2.0.", "blocks.2.")
        .replace("blocks.3.0.", "blocks.3."): v
        for name, v in old.items()
    }
    assert "backbone.fpn.inner_blocks.3.weight" in old
    assert "rpn.head.conv.bias" in old
    torch.save({"model": old}, tmp_path / "coco.pth")
    detector, notices = load(configure(tmp_path / "coco.pth", backbone_norm="frozen", fpn_norm="none"))
    assert len(notices) == 1
    for name in ("rpn.head.conv.0.0.weight", "backbone.fpn.layer_blocks.2.0.bias", "roi_heads.box_head.fc6.weight"):
        assert torch.equal(detector.state_dict()[name], saved.state_dict()[name])


def test_a_detection_file_with_other_norms_and_another_head_is_a_start(tmp_path: Path) -> None:
    saved = build(configure(backbone_norm="frozen", fpn_norm="none"))
    torch.save(saved.state_dict(), tmp_path / "coco.pth")
    detector, notices = load(configure(tmp_path / "coco.pth", fpn_norm="cgbn", box_head_norm="cgbn"))
    assert len(notices) == 2
    assert "are missing and keep their initial values" in notices[0]
    assert "are not in this detector and are ignored" in notices[1]
    name = "backbone.fpn.inner_blocks.0.0.weight"
    assert torch.equal(detector.state_dict()[name], saved.state_dict()[name])


def test_another_network_is_an_error(tmp_path: Path) -> None:
    torch.save(resnet34().state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(UserError, match=r"resnet34.pth: does not fit this detector: .*layer1.2.conv1.weight.*backbone"):
        load(configure(tmp_path / "resnet34.pth"))
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(UserError, match=r"are missing .*compare model.backbone"):
        load(configure(tmp_path / "resnet18.pth", backbone="resnet34"))
    torch.save(build(configure()).state_dict(), tmp_path / "detector.pth")
    with pytest.raises(UserError, match=r"another shape .*fpn_channels"):
        load(configure(tmp_path / "detector.pth", fpn_channels=24))


def test_files_that_are_no_weights(tmp_path: Path, classifier: dict[str, Tensor]) -> None:
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    (tmp_path / "empty.pth").touch()
    torch.save(classifier, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:100_000])
    torch.save({"model": Path("code that runs when unpickled")}, tmp_path / "object.pth")
    for name in ("text.pth", "text.safetensors", "empty.pth", "cut.pth", "object.pth"):
        with pytest.raises(UserError, match=f"{name}: cannot be read as weights") as caught:
            load(configure(tmp_path / name))
        assert "\n" not in str(caught.value)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="not a state dict"):
        load(configure(tmp_path / "list.pth"))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"no conv1\.weight"):
        load(configure(tmp_path / "other.pth"))
    for missing in (tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(UserError, match="no such weights file"):
            load(configure(missing))


@pytest.mark.parametrize("stages", [0, 5])
def test_a_checkpoint_is_loaded_whatever_was_frozen(tmp_path: Path, stages: int) -> None:
    saved = build(configure("imagenet", trainable_stages=3))
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    detector = build(configure("imagenet", trainable_stages=stages))
    load_checkpoint(detector, tmp_path)
    own = detector.state_dict()
    assert all(name.endswith("num_batches_tracked") for name in own.keys() ^ saved.state_dict().keys())
    assert all(torch.equal(own[name], value) for name, value in saved.state_dict().items() if name in own)


def test_a_checkpoint_of_another_detector_is_an_error(tmp_path: Path) -> None:
    save_file(build(configure()).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"another detector \(roi_heads.box_predictor.* differ\)"):
        load_checkpoint(build(configure(), classes=7), tmp_path)
    with pytest.raises(UserError, match="another detector"):
        load_checkpoint(build(configure(fpn_norm="none")), tmp_path)
