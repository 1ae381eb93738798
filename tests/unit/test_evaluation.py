"""Evaluation: exact shards, compact detections, and the metrics of pycocotools."""

import contextlib
import io
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.cocoeval import COCOeval
from rich.console import Console
from torch import Tensor, nn

from horovod_megdet.config import DataConfig
from horovod_megdet.data.annotations import Annotations
from horovod_megdet.data.coco import CocoDataset, load_dataset
from horovod_megdet.data.loader import Batch, build_eval_loader
from horovod_megdet.data.synthetic import ensure_synthetic
from horovod_megdet.errors import UserError
from horovod_megdet.evaluation.backends import BACKENDS, Backend, coco_metrics
from horovod_megdet.evaluation.coco import Evaluation, evaluate, predict_shard
from horovod_megdet.evaluation.detections import Detections, in_original_pixels
from horovod_megdet.evaluation.metrics import METRICS
from horovod_megdet.evaluation.table import render
from horovod_megdet.files import atomic_write

CPU = torch.device("cpu")
BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"
CATEGORY_IDS = [2, 3, 7]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    paths = ensure_synthetic(tmp_path_factory.mktemp("data") / "synthetic", train_images=1, val_images=12)
    return load_dataset(paths["val_annotations"], paths["val_images"], training=False)


def ground_truth(boxes_of_images: dict[int, list[tuple[int, list[float]]]], **others: Any) -> Annotations:
    """Annotations with (category id, x y width height) boxes for each image id."""
    entries = [entry for boxes in boxes_of_images.values() for entry in boxes]
    boxes = np.array([box for _, box in entries], np.float64).reshape(-1, 4)
    given = {
        "category_ids": CATEGORY_IDS,
        "class_names": [f"class {category}" for category in CATEGORY_IDS],
        "image_ids": np.array(list(boxes_of_images), np.int64),
        "file_names": np.array([f"{image}.jpg" for image in boxes_of_images], np.str_),
        "sizes": np.full((len(boxes_of_images), 2), 200, np.int32),
        "annotated": np.array([bool(boxes) for boxes in boxes_of_images.values()], bool),
        "first_box": np.cumsum([0, *(len(boxes) for boxes in boxes_of_images.values())]),
        "boxes": boxes,
        "labels": np.array([CATEGORY_IDS.index(category) + 1 for category, _ in entries], np.int64),
        "areas": boxes[:, 2] * boxes[:, 3],
        "crowd": np.zeros(len(boxes), bool),
        "problems": [],
    }
    return Annotations(**(given | others))  # type: ignore[arg-type]


def detections_of(images: dict[int, list[tuple[list[float], float, int]]]) -> Detections:
    """Detections given as (x1 y1 x2 y2, score, label) for each image id."""

    def arrays(entries: list[tuple[list[float], float, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        boxes = np.array([box for box, _, _ in entries], np.float32).reshape(-1, 4)
        return boxes, np.array([e[1] for e in entries], np.float32), np.array([e[2] for e in entries], np.int32)

    return Detections.of_images((image, arrays(entries)) for image, entries in images.items())


def random_case(seed: int) -> tuple[Annotations, Detections]:
    """Ten images with random boxes, and detections near them, some of a wrong class."""
    random = np.random.default_rng(seed)
    truth: dict[int, list[tuple[int, list[float]]]] = {}
    found: dict[int, list[tuple[list[float], float, int]]] = {}
    for image in random.permutation(100)[:10].tolist():
        corner, side = random.uniform(0, 100, (6, 2)), random.uniform(5, 100, (6, 2))
        categories = random.choice(CATEGORY_IDS, 6).tolist()
        truth[image] = list(zip(categories, np.concatenate([corner, side], 1).tolist(), strict=True))
        shifted = np.concatenate([corner, corner + side], 1) + random.normal(0, 4, (6, 4))
        labels = [
            CATEGORY_IDS.index(category) + 1 if random.random() < 0.8 else 1 + int(random.integers(3))
            for category in categories
        ]
        found[image] = list(zip(shifted.tolist(), random.uniform(0, 1, 6).tolist(), labels, strict=True))[1:]
    return ground_truth(truth), detections_of(found)


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_those_of_pycocotools_for_the_file_it_writes(seed: int, backend: Backend, tmp_path: Path) -> None:
    truth, detections = random_case(seed)
    evaluation = Evaluation({}, {}, 10, CATEGORY_IDS, detections)
    evaluation.write_detections(tmp_path / "new" / "detections.json")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = truth.to_coco()
        oracle = COCOeval(coco, coco.loadRes(str(tmp_path / "new" / "detections.json")), "bbox")
        oracle.evaluate()
        oracle.accumulate()
        oracle.summarize()
    metrics, class_aps = coco_metrics(truth, detections, backend)
    assert list(metrics) == list(METRICS)
    assert repr(list(metrics.values())) == repr([math.nan if v == -1 else float(v) for v in oracle.stats]), "every bit"
    assert 0.1 < metrics["AP"] < 0.9
    assert np.mean(class_aps) == pytest.approx(metrics["AP"])


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
def test_metrics_are_quiet(backend: Backend, capfd: pytest.CaptureFixture[str]) -> None:
    coco_metrics(*random_case(0), backend)
    assert capfd.readouterr() == ("", "")


SIDES = st.sampled_from([0.5, 8.0, 31.9, 32.0, 32.1, 64.0, 95.9, 96.0, 96.1, 150.0])
"""Of boxes; squares of 32 and 96 are on the edges of COCO's area ranges."""
CORNERS = st.integers(0, 12).map(lambda number: 8.0 * number)
SCORES = st.integers(1, 6).map(lambda number: number / 8)
"""Few, so that many are equal."""
IMAGE_IDS = st.one_of(st.integers(-(2**62), 2**62), st.integers(0, 9))
AREAS = st.sampled_from([0.0, 900.0, 32.0**2, 96.0**2, 96.0**2 + 0.5])


@st.composite
def any_case(draw: st.DrawFn) -> tuple[Annotations, Detections]:
    """Images with gaps between their ids, some of them empty; crowds; ties; boxes on the edges of area ranges."""
    images = draw(st.lists(IMAGE_IDS, min_size=1, max_size=6, unique=True))
    truth: dict[int, list[tuple[int, list[float]]]] = {}
    found: dict[int, list[tuple[list[float], float, int]]] = {}
    for image in images:
        boxes = draw(st.lists(st.tuples(CORNERS, CORNERS, SIDES, SIDES), max_size=6))
        truth[image] = [(draw(st.sampled_from(CATEGORY_IDS[:2])), list(box)) for box in boxes]
        near = [box for box in boxes if draw(st.booleans())] + draw(
            st.lists(st.tuples(CORNERS, CORNERS, SIDES, SIDES), max_size=4)
        )
        entries = [([x, y, x + w, y + h], draw(SCORES), draw(st.integers(1, 3))) for x, y, w, h in near]
        found[image] = sorted(entries, key=lambda entry: -entry[1])
    number = sum(len(boxes) for boxes in truth.values())
    crowd = np.array(draw(st.lists(st.booleans(), min_size=number, max_size=number)), bool)
    areas = np.array(draw(st.lists(AREAS, min_size=number, max_size=number)), np.float64)
    return ground_truth(truth, crowd=crowd, areas=areas), detections_of(found)


@settings(deadline=None, max_examples=150)
@given(any_case())
def test_hotcoco_gives_the_bits_of_pycocotools(case: tuple[Annotations, Detections]) -> None:
    reference, other = (backend(*case) for backend in (BACKENDS["pycocotools"], BACKENDS["hotcoco"]))
    np.testing.assert_array_equal(other.precision, reference.precision)
    np.testing.assert_array_equal(other.recall, reference.recall)
    assert repr(coco_metrics(*case, "hotcoco")) == repr(coco_metrics(*case, "pycocotools"))


def test_many_detections_in_one_image() -> None:
    """More than the 100 that COCO looks at, many with equal scores."""
    random = np.random.default_rng(0)
    corners = random.uniform(0, 150, (400, 2)).round(1)
    boxes = np.concatenate([corners, corners + random.uniform(5, 50, (400, 2)).round(1)], 1).tolist()
    truth = ground_truth({5: [(2, [x1, y1, x2 - x1, y2 - y1]) for x1, y1, x2, y2 in boxes[:60]], 3: []})
    found = detections_of({5: [(box, 1 - number // 40 / 10, 1) for number, box in enumerate(boxes)], 3: []})
    assert repr(coco_metrics(truth, found, "hotcoco")) == repr(coco_metrics(truth, found, "pycocotools"))
    assert coco_metrics(truth, found)[0]["AP"] > 0.1


@pytest.mark.skipif(not BCCD.is_dir(), reason=f"needs the real data set at {BCCD}")
def test_backends_agree_on_real_data(tmp_path: Path) -> None:
    dataset = load_dataset(
        BCCD / "annotations" / "instances_val.json", BCCD / "images", training=False, bad="skip", cache_dir=tmp_path
    )
    oracle = Oracle()
    detections = predict_shard(oracle, oracle.watch(eval_loader(dataset)), CPU)
    assert repr(coco_metrics(dataset.ground_truth, detections, "hotcoco")) == repr(
        coco_metrics(dataset.ground_truth, detections, "pycocotools")
    )


def test_without_hotcoco_pycocotools_computes_the_metrics(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    case = random_case(0)
    expected = coco_metrics(*case, "hotcoco")
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    assert repr(coco_metrics(*case, "hotcoco")) == repr(expected)
    assert "hotcoco cannot be imported" in capfd.readouterr().err


def test_no_detections_at_all_are_zero_everywhere() -> None:
    truth, _ = random_case(0)
    metrics, class_aps = coco_metrics(truth, detections_of({image: [] for image in truth.image_ids.tolist()}))
    assert set(metrics.values()) <= {0.0} | {value for value in metrics.values() if math.isnan(value)}
    assert metrics["AP"] == metrics["AR_100"] == 0.0
    assert class_aps == [0.0, 0.0, 0.0]


def test_a_class_without_ground_truth_is_undefined_and_left_out_of_the_mean() -> None:
    truth = ground_truth({1: [(2, [10, 10, 50, 50])], 2: [(7, [20, 20, 60, 60])]})
    detections = detections_of({1: [([10, 10, 60, 60], 0.9, 1), ([0, 0, 9, 9], 0.8, 2)], 2: []})
    metrics, class_aps = coco_metrics(truth, detections)
    assert class_aps == pytest.approx([1.0, math.nan, 0.0], nan_ok=True)
    assert metrics["AP"] == pytest.approx(0.5)
    assert math.isnan(metrics["AP_small"])
    row = Evaluation(metrics, dict(zip("abc", class_aps, strict=True)), 2, CATEGORY_IDS, None).row()
    assert row["AP_small"] is None
    assert row["per_class"] == {"a": pytest.approx(1.0), "b": None, "c": 0.0}
    json.dumps(row, allow_nan=False)


def test_a_data_set_without_any_ground_truth_is_undefined_everywhere() -> None:
    metrics, class_aps = coco_metrics(ground_truth({1: [], 2: []}), detections_of({1: [([0, 0, 5, 5], 0.5, 1)], 2: []}))
    assert all(math.isnan(value) for value in [*metrics.values(), *class_aps])


# Detections


@st.composite
def shards(draw: st.DrawFn) -> tuple[dict[int, list[tuple[list[float], float, int]]], list[list[int]]]:
    """Detections of some images, and a division of the images among ranks of which some may have none."""
    ids = draw(st.lists(st.integers(0, 2**40), unique=True, max_size=8))
    entry = st.tuples(
        st.lists(st.floats(0, 100, width=32), min_size=4, max_size=4), st.floats(0, 1, width=32), st.integers(1, 3)
    )
    images = {image: draw(st.lists(entry, max_size=4)) for image in ids}
    ranks = draw(st.integers(1, 5))
    owners = [draw(st.integers(0, ranks - 1)) for _ in ids]
    return images, [[image for image, owner in zip(ids, owners, strict=True) if owner == rank] for rank in range(ranks)]


def assert_same(first: Detections, second: Detections) -> None:
    for name, array in vars(first).items():
        assert array.dtype == vars(second)[name].dtype
        np.testing.assert_array_equal(array, vars(second)[name])


@settings(deadline=None)
@given(shards())
def test_merged_shards_do_not_depend_on_which_rank_predicted_which_image(case: Any) -> None:
    images, ranks = case
    alone = detections_of(images)
    shards = [detections_of({image: images[image] for image in shard}).rows() for shard in ranks]
    merged = Detections.from_rows(*(np.concatenate(tables) for tables in zip(*shards, strict=True)))
    assert_same(merged, alone)
    assert [image for image, _ in merged.per_image()] == sorted(images)
    for image, (boxes, scores, labels) in merged.per_image():
        assert len(boxes) == len(scores) == len(labels) == len(images[image])
        assert labels.tolist() == [label for _, _, label in images[image]]


def test_detections_above_a_score_are_kept_and_so_are_images_without_any() -> None:
    box = [0.0, 0.0, 1.0, 1.0]
    kept = detections_of({3: [(box, 0.9, 1), (box, 0.5, 2), (box, 0.4, 3)], 1: [(box, 0.1, 1)], 2: []}).above(0.5)
    assert kept.image_ids.tolist() == [1, 2, 3]
    assert kept.counts.tolist() == [0, 0, 2]
    assert kept.labels.tolist() == [1, 2]


def test_a_detection_costs_24_bytes_on_its_way_to_rank_0() -> None:
    random = np.random.default_rng(0)
    images = 50
    detections = Detections.of_images(
        (image, (random.random((100, 4), np.float32), random.random(100, np.float32), np.ones(100, np.int32)))
        for image in range(images)
    )
    assert sum(rows.nbytes for rows in detections.rows()) == 24 * 100 * images + 16 * images


def test_results_have_the_category_ids_of_the_json_and_corners_become_sizes() -> None:
    detections = detections_of({9: [([10, 20, 40.5, 60], 0.75, 3), ([0, 0, 1, 1], 0.25, 1)]})
    assert detections.to_coco(CATEGORY_IDS) == [
        {"image_id": 9, "category_id": 7, "bbox": [10.0, 20.0, 30.5, 40.0], "score": 0.75},
        {"image_id": 9, "category_id": 2, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.25},
    ]


def test_boxes_are_scaled_back_each_side_by_its_own_ratio_and_sorted_by_score() -> None:
    prediction = {
        "boxes": torch.tensor([[10.0, 20.0, 30.0, 40.0], [0.0, 0.0, 100.0, 50.0]], dtype=torch.float64),
        "scores": torch.tensor([0.2, 0.8], dtype=torch.bfloat16),
        "labels": torch.tensor([2, 1]),
    }
    boxes, scores, labels = in_original_pixels(prediction, (50, 100), (100, 300))
    np.testing.assert_allclose(boxes, [[0, 0, 300, 100], [30, 40, 90, 80]])
    assert (boxes.dtype, scores.dtype, labels.dtype) == (np.float32, np.float32, np.int32)
    assert labels.tolist() == [1, 2]


# The whole evaluation on one rank


class Oracle(nn.Module):
    """A detector that knows the boxes of the last batch that :meth:`watch` yielded."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[dict[str, Any]] = []

    def watch(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        for batch in loader:
            self.targets = batch.targets
            yield batch

    def predict(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert all(image.dtype == torch.uint8 for image in images)
        return [
            {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(len(target["labels"]))}
            for target in self.targets
        ]


def eval_loader(dataset: CocoDataset, shorter_side: int = 256) -> Iterable[Batch]:
    return build_eval_loader(dataset, DataConfig(workers=0, shorter_side_test=shorter_side), rank=0, ranks=1)


def test_a_perfect_detector_is_perfect_whatever_the_images_are_resized_to(dataset: CocoDataset) -> None:
    for shorter_side in (90, 256):
        oracle = Oracle()
        evaluation = evaluate(oracle, dataset, oracle.watch(eval_loader(dataset, shorter_side)), CPU)
        assert evaluation.metrics["AP"] == pytest.approx(1.0)
        assert evaluation.images == len(dataset)
        assert list(evaluation.per_class) == dataset.class_names
        assert evaluation.detections is not None
        assert evaluation.detections.image_ids.tolist() == sorted(dataset.image_ids.tolist())


def test_the_detector_is_left_in_the_mode_it_was_in(dataset: CocoDataset) -> None:
    for mode in (True, False):
        oracle = Oracle().train(mode)
        predict_shard(oracle, oracle.watch(eval_loader(dataset)), CPU)
        assert oracle.training == mode


def test_an_unreadable_image_is_an_error_and_the_detector_keeps_its_mode() -> None:
    oracle = Oracle().train()
    with pytest.raises(UserError, match=r"img_7\.jpg: not an image"):
        predict_shard(oracle, [Batch([], error="img_7.jpg: not an image.")], CPU)
    assert oracle.training


def test_the_forward_passes_run_under_autocast(dataset: CocoDataset) -> None:
    entered = []

    @contextlib.contextmanager
    def autocast() -> Iterator[None]:
        entered.append(True)
        yield

    oracle = Oracle()
    predict_shard(oracle, oracle.watch(eval_loader(dataset)), CPU, autocast)
    assert len(entered) == len(dataset)


@pytest.mark.parametrize("change", ["missing", "twice"])
def test_shards_that_are_not_exactly_the_data_set_are_a_bug(dataset: CocoDataset, change: str) -> None:
    batches = list(eval_loader(dataset))
    oracle = Oracle()
    wrong = batches[1:] if change == "missing" else [*batches, batches[0]]
    with pytest.raises(AssertionError, match="not exactly the data set"):
        evaluate(oracle, dataset, oracle.watch(wrong), CPU)


def test_classes_with_equal_names_keep_separate_entries(dataset: CocoDataset, tmp_path: Path) -> None:
    assert dataset.annotations is not None
    content = json.loads(dataset.annotations.read_text())
    for category in content["categories"][:2]:
        category["name"] = "thing"
    (tmp_path / "renamed.json").write_text(json.dumps(content))
    renamed = load_dataset(tmp_path / "renamed.json", dataset.image_folder, training=False)
    oracle = Oracle()
    per_class = evaluate(oracle, renamed, oracle.watch(eval_loader(renamed)), CPU).per_class
    assert list(per_class)[:2] == [f"thing ({category})" for category in renamed.category_ids[:2]]
    assert len(per_class) == len(renamed.category_ids)


def test_the_table_shows_percent_every_class_and_a_dash_for_undefined() -> None:
    metrics = dict.fromkeys(METRICS, 0.25) | {"AP": 0.4321, "AP_small": math.nan}
    table = render(Evaluation(metrics, {"red cell": 0.5, "rare": math.nan}, 87, [1, 2], None))
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table)
    text = console.export_text()
    assert "87 images" in text
    for words in (["AP", "43.2"], ["AP_small", "–"], ["AP of", "red cell", "50.0"], ["AP of", "rare", "–"]):
        assert any(all(word in line for word in words) for line in text.splitlines()), words


# Files


def test_a_write_that_fails_halfway_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "detections.json"
    with atomic_write(path) as file:
        file.write(b"old")
    with contextlib.suppress(RuntimeError), atomic_write(path) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_created_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x\.json: cannot be written: "), atomic_write(tmp_path / "file/x.json"):
        pass
