"""The multi-scale test: views of an image, and how their detections are merged."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from horovod_megdet.config import Config
from horovod_megdet.data.coco import CocoDataset, load_dataset
from horovod_megdet.data.loader import build_eval_loader
from horovod_megdet.data.synthetic import ensure_synthetic
from horovod_megdet.evaluation.coco import predict_shard
from horovod_megdet.evaluation.detections import Arrays, Detections
from horovod_megdet.evaluation.views import Views, soft_nms
from horovod_megdet.inference import TrainedDetector
from horovod_megdet.models.detector import Detector, build_detector

CPU = torch.device("cpu")
TINY = yaml.safe_load((Path(__file__).parents[1] / "parallel" / "tiny.yaml").read_text())


def config(**evaluation: Any) -> Config:
    return Config.model_validate({**TINY, "evaluation": evaluation})


def views(**evaluation: Any) -> Views | None:
    return Views.of(config(**evaluation).evaluation, config().model)


# Merging


def iou(a: np.ndarray, b: np.ndarray) -> float:
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (math.prod(a[2:] - a[:2]) + math.prod(b[2:] - b[:2]) - shared)


def soft_nms_of_one_class(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> dict[int, float]:
    """Figure 2 of Bodla et al. 2017 with the Gaussian of its equation 3, in double precision."""
    left = {number: float(score) for number, score in enumerate(scores)}
    kept: dict[int, float] = {}
    while left:
        best = max(left, key=lambda number: (left[number], -number))
        kept[best] = left.pop(best)
        for number in left:
            left[number] *= math.exp(-(iou(boxes[best], boxes[number]) ** 2) / 0.5)
    return {number: score for number, score in kept.items() if score > threshold}


def nms_of_one_class(boxes: np.ndarray, scores: np.ndarray, overlap: float) -> dict[int, float]:
    kept: dict[int, float] = {}
    for number in sorted(range(len(scores)), key=lambda number: -scores[number]):
        if all(iou(boxes[number], boxes[other]) <= overlap for other in kept):
            kept[number] = float(scores[number])
    return kept


@st.composite
def candidates(draw: st.DrawFn) -> Arrays:
    """Boxes that overlap often, with scores that are all different."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    number = draw(st.integers(0, 40))
    corner, side = random.uniform(0, 30, (number, 2)), random.uniform(10, 40, (number, 2))
    boxes = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
    scores = (random.permutation(number) + random.uniform(0.1, 0.9, number)) / max(1, number)
    return boxes, scores.astype(np.float32), random.integers(1, 4, number).astype(np.int32)


def by_class(found: Arrays, one_class: Any) -> list[tuple[int, float]]:
    """(index, score) of what ``one_class`` keeps of each class, by falling score."""
    boxes, scores, labels = found
    kept = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        of_class = one_class(boxes[members].astype(np.float64), scores[members].astype(np.float64))
        kept += [(int(members[place]), score) for place, score in of_class.items()]
    return sorted(kept, key=lambda entry: -entry[1])


@given(found=candidates(), threshold=st.sampled_from([0.0, 0.05, 0.3]), most=st.sampled_from([1, 5, 100]))
def test_soft_nms_is_that_of_the_paper(found: Arrays, threshold: float, most: int) -> None:
    expected = by_class(found, lambda boxes, scores: soft_nms_of_one_class(boxes, scores, threshold))
    kept, scores = soft_nms(*found, threshold, most)
    # A score at the threshold may be rounded to either side of it.
    assert abs(len(kept) - min(most, len(expected))) <= sum(abs(score - threshold) < 1e-6 for _, score in expected)
    np.testing.assert_allclose(scores, [score for _, score in expected][: len(scores)], rtol=1e-5)
    assert dict(zip(kept.tolist(), scores.tolist(), strict=True)) == pytest.approx(
        {number: score for number, score in expected if number in kept}, rel=1e-5
    )


@given(parts=st.lists(candidates(), min_size=1, max_size=4), most=st.sampled_from([3, 100]))
def test_nms_suppresses_the_candidates_of_all_views_together(parts: list[Arrays], most: int) -> None:
    union: Any = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    expected = by_class(union, lambda boxes, scores: nms_of_one_class(boxes, scores, 0.5))[:most]
    boxes, scores, labels = Views(True, "nms", 0.5, 0.05, most).merged(parts)
    np.testing.assert_array_equal(np.sort(scores), np.sort(np.array([s for _, s in expected], np.float32)))
    assert (np.diff(scores) <= 0).all()
    found = {(tuple(box), label) for box, label in zip(boxes.tolist(), labels.tolist(), strict=True)}
    assert found == {(tuple(union[0][number].tolist()), int(union[2][number])) for number, _ in expected}


def test_of_equal_boxes_soft_nms_keeps_the_best_and_lowers_the_other() -> None:
    box = np.array([[0, 0, 10, 10]] * 3, np.float32)
    kept, scores = soft_nms(box, np.array([0.5, 0.9, 0.8], np.float32), np.array([1, 1, 2], np.int32), 0.05, 10)
    assert kept.tolist() == [1, 2, 0]
    assert scores == pytest.approx([0.9, 0.8, 0.5 * math.exp(-2)])


# Views of real images


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    paths = ensure_synthetic(tmp_path_factory.mktemp("data") / "synthetic", train_images=1, val_images=5)
    return load_dataset(paths["val_annotations"], paths["val_images"], training=False)


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    detector = build_detector(config().model, config().batch_norm, 6)
    detector.roi_heads.box_predictor.cls_score.bias.data = torch.linspace(2, -4, 7)
    return detector.eval()


def detections(detector: Detector, dataset: CocoDataset, **evaluation: Any) -> Detections:
    values = config(**evaluation)
    loader = build_eval_loader(dataset, values.data, rank=0, ranks=1, scales=values.evaluation.scales)
    return predict_shard(detector, loader, CPU, views=Views.of(values.evaluation, values.model))


def assert_same_bits(one: Detections, other: Detections) -> None:
    for name, array in vars(one).items():
        np.testing.assert_array_equal(array, vars(other)[name])


def test_the_scale_of_the_configuration_alone_changes_no_bit(detector: Detector, dataset: CocoDataset) -> None:
    plain = detections(detector, dataset)
    assert len(plain.scores) > 50
    assert_same_bits(detections(detector, dataset, scales=[64]), plain)
    assert len(detections(detector, dataset, scales=[80]).scores) > 50
    with pytest.raises(AssertionError):
        assert_same_bits(detections(detector, dataset, scales=[80]), plain)


def test_candidates_merged_by_nms_are_the_detections_of_the_detector(detector: Detector, dataset: CocoDataset) -> None:
    one_view = Views(False, "nms", config().model.nms_threshold, config().model.score_threshold, 100)
    loader = build_eval_loader(dataset, config().data, rank=0, ranks=1)
    merged, plain = predict_shard(detector, loader, CPU, views=one_view), detections(detector, dataset)
    np.testing.assert_array_equal(merged.counts, plain.counts)
    np.testing.assert_array_equal(merged.scores, plain.scores)
    np.testing.assert_allclose(merged.boxes, plain.boxes, atol=1e-3)


def test_the_detector_gives_all_candidates_once_and_keeps_its_limits(detector: Detector, dataset: CocoDataset) -> None:
    [batch, *_] = build_eval_loader(dataset, config().data, rank=0, ranks=1)
    [plain], [all_of_them] = detector.predict(batch.images), detector.predict(batch.images, suppress=False)
    assert len(all_of_them["scores"]) > len(plain["scores"])
    [again] = detector.predict(batch.images)
    assert torch.equal(again["boxes"], plain["boxes"])


@pytest.mark.parametrize("merge", ["nms", "soft_nms"])
@pytest.mark.parametrize("width", [64, 75])
def test_a_mirrored_image_has_mirrored_detections(detector: Detector, merge: str, width: int) -> None:
    image = torch.randint(0, 256, (3, 64, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    test = views(flip=True, merge=merge)
    assert test
    sizes = [image, torch.nn.functional.interpolate(image[None], scale_factor=1.5)[0]]
    boxes, scores, labels = test.detect(detector, sizes, (64, width))
    mirrored, same_scores, same_labels = test.detect(detector, [size.flip(-1) for size in sizes], (64, width))
    assert len(scores) > 10
    np.testing.assert_allclose(same_scores, scores, rtol=1e-5)
    np.testing.assert_array_equal(same_labels, labels)
    np.testing.assert_allclose(mirrored[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [width, 0, width, 0], boxes, atol=1e-3)


class Painted(Detector):
    """Finds the bounding box of the pixels that are white, in images of any size."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def predict(self, images: list[Tensor], suppress: bool = True) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            y, x = (image[0] > 127).nonzero(as_tuple=True)
            box = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
            found.append({"boxes": box[None], "scores": torch.ones(1), "labels": torch.ones(1, dtype=torch.int64)})
        return found


def test_boxes_of_all_views_are_in_pixels_of_the_original_image() -> None:
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    image[:, 10:30, 20:40] = 255
    larger = torch.nn.functional.interpolate(image[None], scale_factor=2)[0]
    test = Views(True, "nms", 1.1, 0.0, 10)
    boxes, scores, _ = test.detect(Painted(), [image, larger], (30, 45))
    assert len(scores) == 4, "two sizes, each of them mirrored, too"
    np.testing.assert_array_equal(boxes, [[10, 5, 20, 15]] * 4)


def test_a_batch_has_all_scales_of_an_image_and_the_longer_side_is_bounded(dataset: CocoDataset) -> None:
    for batch in build_eval_loader(dataset, config().data, rank=0, ranks=1, scales=(32, 64, 96)):
        assert len({target["image_id"] for target in batch.targets}) == 1
        for image, side in zip(batch.images, (32, 64, 96), strict=True):
            assert min(image.shape[1:]) <= side
            assert max(image.shape[1:]) <= 112 * side / 64
            assert min(image.shape[1:]) == side or max(image.shape[1:]) == 112 * side / 64


@pytest.mark.parametrize("batch_size", [1, 3])
def test_python_programs_get_the_detections_of_the_evaluation(
    detector: Detector, dataset: CocoDataset, batch_size: int
) -> None:
    values = {"scales": [48, 80], "flip": True, "merge": "soft_nms"}
    trained = TrainedDetector(detector, config(**values), list("abcdef"), list(range(6)))
    expected = dict(detections(detector, dataset, **values).per_image())
    found = trained.detect([dataset.path(index) for index in range(len(dataset))], batch_size)
    for index, one in enumerate(found):
        boxes, scores, labels = expected[int(dataset.image_ids[index])]
        np.testing.assert_allclose(one.scores, scores, atol=1e-5)
        np.testing.assert_allclose(one.boxes, boxes, atol=1e-2)
        np.testing.assert_array_equal(one.labels, labels)
