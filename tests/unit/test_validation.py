"""The validation loss, and what is made of evaluations: the best one, and the end of patience."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from horovod_megdet.config import Config
from horovod_megdet.data.coco import CocoDataset, load_dataset
from horovod_megdet.data.loader import build_eval_loader
from horovod_megdet.data.synthetic import ensure_synthetic
from horovod_megdet.engine.checkpoint import Position
from horovod_megdet.engine.validation import check_best_metric, note_evaluation
from horovod_megdet.errors import UserError
from horovod_megdet.evaluation.coco import Evaluation
from horovod_megdet.evaluation.loss import validation_losses
from horovod_megdet.evaluation.metrics import METRICS
from horovod_megdet.evaluation.table import loss_in_words
from horovod_megdet.models.detector import COUNT_OF_LOSS, Detector, build_detector

CPU = torch.device("cpu")
TINY = yaml.safe_load((Path(__file__).parents[1] / "parallel" / "tiny.yaml").read_text())


def config(**sections: dict[str, Any]) -> Config:
    return Config.model_validate({name: TINY.get(name, {}) | sections.get(name, {}) for name in {*TINY, *sections}})


# The validation loss


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return ensure_synthetic(tmp_path_factory.mktemp("data") / "synthetic", train_images=1, val_images=6)


@pytest.fixture(scope="module")
def dataset(paths: dict[str, str]) -> CocoDataset:
    return load_dataset(paths["val_annotations"], paths["val_images"], training=False)


@pytest.fixture
def detector() -> Detector:
    torch.manual_seed(0)
    # All RoIs are sampled, so that their number differs from image to image.
    model = config(model={"rois_per_image": 512}).model
    detector = build_detector(model, config().batch_norm, 6)
    for name, buffer in detector.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1)
    return detector


def losses_of(detector: Detector, dataset: CocoDataset, images: Any = None) -> dict[str, float]:
    loader = images or build_eval_loader(dataset, config().data, rank=0, ranks=1)
    return validation_losses(detector, dataset, loader, CPU)


def test_it_is_the_loss_of_all_images_as_one_mini_batch(detector: Detector, dataset: CocoDataset) -> None:
    # Images of one size, since a batch is padded to the largest, in double precision.
    reference = copy.deepcopy(detector).double()
    batches = list(build_eval_loader(dataset, config().data, rank=0, ranks=1))
    for batch in batches:
        batch.images = [torch.nn.functional.pad(batch.images[0], (0, 96, 0, 96))[:, :96, :96].double() / 255]
        target = batch.targets[0]
        target["boxes"] = target["boxes"].double()
    expected = reference.eval().evaluation_losses(
        [batch.images[0] for batch in batches], [batch.targets[0] for batch in batches]
    )
    found = losses_of(reference, dataset, batches)
    assert found == pytest.approx({name: value.item() for name, value in expected.values.items()}, rel=1e-9)
    for batch in batches:
        batch.images = [image.float() for image in batch.images]
        batch.targets[0]["boxes"] = batch.targets[0]["boxes"].float()
    assert losses_of(detector, dataset, batches) == pytest.approx(found, rel=1e-4)


def test_it_is_no_mean_of_means(detector: Detector, dataset: CocoDataset) -> None:
    alone = [
        losses_of(detector, Alone(dataset), [batch])
        for batch in build_eval_loader(dataset, config().data, rank=0, ranks=1)
    ]
    mean = math.fsum(losses["loss_classifier"] for losses in alone) / len(alone)
    assert losses_of(detector, dataset)["loss_classifier"] != pytest.approx(mean, rel=1e-6)


class Alone(CocoDataset):
    """A data set of which one image is evaluated."""

    def __init__(self, dataset: CocoDataset) -> None:
        vars(self).update(vars(dataset))

    def __len__(self) -> int:
        return 1


def test_evaluations_of_the_same_weights_are_equal_and_leave_the_detector_as_it_was(
    detector: Detector, dataset: CocoDataset
) -> None:
    detector.train()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    torch.manual_seed(1)
    first = losses_of(detector, dataset)
    torch.manual_seed(2)
    assert losses_of(detector, dataset) == first
    assert all(module.training for module in detector.modules())
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


def test_statistics_are_the_running_ones(detector: Detector, dataset: CocoDataset) -> None:
    first = losses_of(detector, dataset)
    for name, buffer in detector.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(2)
    assert losses_of(detector, dataset) != first


def test_crowd_regions_are_no_objects(detector: Detector, paths: dict[str, str], tmp_path: Path) -> None:
    content = json.loads(Path(paths["val_annotations"]).read_text())
    image = content["annotations"][0]["image_id"]
    plain, crowded = tmp_path / "plain.json", tmp_path / "crowded.json"
    content["annotations"] = [
        entry for entry in content["annotations"] if entry["id"] != content["annotations"][0]["id"]
    ]
    plain.write_text(json.dumps(content))
    region = {"id": 10**6, "image_id": image, "category_id": content["categories"][0]["id"], "iscrowd": 1}
    content["annotations"].append(region | {"bbox": [10, 10, 60, 60], "area": 3600})
    crowded.write_text(json.dumps(content))
    sets = [load_dataset(path, paths["val_images"], training=False) for path in (plain, crowded)]
    assert sum(int(sets[1].crowd(index).sum()) for index in range(len(sets[1]))) == 1
    assert losses_of(detector, sets[1]) == losses_of(detector, sets[0])


def test_losses_are_in_the_row_and_in_words() -> None:
    losses = dict(zip(COUNT_OF_LOSS, (0.5, 0.25, 0.125, 0.0625), strict=True))
    row = Evaluation(dict.fromkeys(METRICS, 0.5), {}, 1, [], None, losses).row()
    assert row["loss"] == 0.9375
    assert row["loss_box_reg"] == 0.0625
    assert loss_in_words(row) == "loss 0.938 (objectness 0.500 rpn_box_reg 0.250 classifier 0.125 box_reg 0.062)"
    diverged = Evaluation({}, {}, 1, [], None, losses | {"loss_box_reg": math.inf}).row()
    assert json.loads(json.dumps(diverged, allow_nan=False))["loss"] is None
    assert "loss nan" in loss_in_words(diverged)
    assert "loss" not in Evaluation({}, {}, 1, [], None).row()


# The best evaluation


def evaluation(ap: float = 0.5, loss: float = 1.0, cat: float = 0.5) -> Evaluation:
    metrics = dict.fromkeys(METRICS, 0.25) | {"AP": ap}
    losses = dict(zip(COUNT_OF_LOSS, (loss, 0.0, 0.0, 0.0), strict=True))
    return Evaluation(metrics, {"cat": cat, "dog": 0.1}, 1, [1, 2], None, losses)


def follow(metric: str, evaluations: list[Evaluation]) -> tuple[list[bool], Position]:
    position = Position(best_metric=metric)
    better = []
    for position.step, one in enumerate(evaluations, start=1):
        better.append(note_evaluation(position, one))
    return better, position


NAN = math.nan


@pytest.mark.parametrize(
    ("metric", "evaluations", "better", "best", "since"),
    [
        ("AP", [evaluation(ap=ap) for ap in (0.1, 0.3, 0.3, 0.2)], [True, True, False, False], 0.3, 2),
        ("AP", [evaluation(ap=ap) for ap in (0.0, 0.0, 0.1)], [True, False, True], 0.1, 0),
        ("AP", [evaluation(ap=ap) for ap in (NAN, 0.1, NAN)], [True, True, False], 0.1, 1),
        ("loss", [evaluation(loss=loss) for loss in (3, 2, 2.5, math.inf, NAN)], [1, 1, 0, 0, 0], 2, 3),
        ("loss_objectness", [evaluation(loss=loss) for loss in (2, 3, 1)], [1, 0, 1], 1, 0),
        ("AP of cat", [evaluation(cat=ap) for ap in (0.2, 0.1, 0.3)], [1, 0, 1], 0.3, 0),
    ],
)
def test_the_best_evaluation_is_that_of_the_chosen_metric(
    metric: str, evaluations: list[Evaluation], better: list[bool], best: float, since: int
) -> None:
    found, position = follow(metric, evaluations)
    assert found == better
    assert position.best_value == best
    assert position.evaluations_since_best == since
    assert position.best_checkpoint == f"step_{max(step for step, good in enumerate(better, 1) if good):08d}"


def test_by_another_metric_the_best_is_looked_for_anew() -> None:
    _, position = follow("AP", [evaluation(ap=0.9), evaluation(ap=0.1)])
    position.forget_best("loss")
    assert position == Position(2, 0, "loss")
    assert note_evaluation(position, evaluation(loss=7.0))


@pytest.mark.parametrize("name", ["AP", "AR_small", "AP of red cell", "loss", "loss_classifier"])
def test_names_of_metrics(name: str) -> None:
    check_best_metric(config(output={"best_metric": name}, evaluation={"loss": True}), ["red cell"])
    assert (
        name
        in Evaluation(
            dict.fromkeys(METRICS, 0.0), {"red cell": 0.0}, 1, [1], None, dict.fromkeys(COUNT_OF_LOSS, 0.0)
        ).values
    )


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("AP_50", "no evaluation has 'AP_50'; did you mean 'AP50'?"),
        ("AP of red cells", "no evaluation has 'AP of red cells'; did you mean 'AP of red cell'?"),
        ("val_loss", "no evaluation has 'val_loss'; did you mean 'loss'?"),
        (
            "???",
            "no evaluation has '???'; there are AP, AP50, AP75, AP_small, AP_medium, AP_large and 7 more, and the "
            "losses loss, loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg.",
        ),
        ("loss", "loss is a validation loss: set evaluation.loss to true, too."),
    ],
)
def test_a_wrong_name_is_a_sentence(name: str, end: str) -> None:
    with pytest.raises(UserError) as caught:
        check_best_metric(config(output={"best_metric": name}), ["red cell"])
    assert str(caught.value) == f"output.best_metric: {end}"
