"""Detections drawn on images, and the validation page that shows them beside the ground truth."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from horovod_megdet.data.annotations import to_corners
from horovod_megdet.data.coco import CocoDataset
from horovod_megdet.evaluation.coco import Evaluation
from horovod_megdet.evaluation.detections import Arrays
from horovod_megdet.evaluation.metrics import DRAWN_METRICS, DRAWN_SCORE, percent
from horovod_megdet.files import atomic_write
from horovod_megdet.report.drawing import GRAY, Mark, class_color, draw_marks
from horovod_megdet.report.matching import CORRECT, IGNORED, WRONG, GroundTruth, match
from horovod_megdet.report.page import VALIDATION_PAGE, Card, render

LONGEST_SIDE = 1280
"""Larger pictures are scaled down to this many pixels for the page."""


def draw_detections(
    image: Tensor, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray, class_names: Sequence[str]
) -> Image.Image:
    """Draws detections in the color of their class, with name and score.

    Args:
        image: uint8 (3, H, W), RGB; small images are enlarged (see :mod:`horovod_megdet.report.drawing`).
        boxes: (n, 4) xyxy in pixels of ``image``.
        labels: (n,), label k + 1 is class_names[k].
        scores: (n,).
        class_names: names of the classes, without background.
    """
    marks = [
        _mark(box, label, f"{class_names[label - 1]} {score:.2f}")
        for box, label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist(), strict=True)
    ]
    return draw_marks(image, marks)


def write_validation_page(
    path: str | Path,
    dataset: CocoDataset,
    evaluation: Evaluation,
    *,
    count: int,
    title: str,
) -> list[Card]:
    """Writes a self-contained HTML page: ``count`` validation images, ground truth beside detections. Returns them.

    The images are spread evenly over the data set and are the same for every run. Only detections with a score of at
    least :data:`DRAWN_SCORE` are drawn. Rank 0 only: it holds the detections.
    """
    assert evaluation.detections is not None, "only rank 0 holds the detections"
    drawn = evaluation.detections.above(DRAWN_SCORE)
    detections = dict(drawn.per_image())
    indices = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)).tolist()
    cards, labels = [], set()
    for index in indices:
        image_id = int(dataset.image_ids[index])
        truth = _ground_truth(dataset, index)
        cards.append(_card(dataset, index, truth, detections[image_id]))
        labels |= {*truth.labels.tolist(), *detections[image_id][2].tolist()}
    classes = [(dataset.class_names[label - 1], class_color(label - 1)) for label in sorted(labels)]
    values = ", ".join(f"{name} {percent(evaluation.metrics[name])}" for name in DRAWN_METRICS)
    summary = f"{values} on all {evaluation.images} validation images. "
    summary += f"The pictures show detections with a score of at least {DRAWN_SCORE:g}"
    if not len(drawn.scores):
        summary += f": none of the {len(evaluation.detections.scores)} has one"
    with atomic_write(path) as file:
        file.write(render(VALIDATION_PAGE, title=title, summary=f"{summary}.", classes=classes, cards=cards))
    return cards


def draw_ground_truth(dataset: CocoDataset, index: int) -> tuple[Image.Image, set[int]]:
    """An image with the boxes of its objects, groups of objects in gray; and the labels among them."""
    truth = _ground_truth(dataset, index)
    marks = [
        _object_mark(box, label, is_crowd, True, dataset.class_names)
        for box, label, is_crowd in zip(truth.boxes.tolist(), truth.labels.tolist(), truth.crowd.tolist(), strict=True)
    ]
    return _scaled_down(draw_marks(dataset.read(index)[0], marks)), set(truth.labels.tolist())


def _card(dataset: CocoDataset, index: int, truth: GroundTruth, detections: Arrays) -> Card:
    boxes, scores, labels = detections
    image = dataset.read(index)[0]
    verdicts, found = match(truth, boxes, labels)
    names = dataset.class_names
    objects = [
        _object_mark(*entry, names)
        for entry in zip(truth.boxes.tolist(), truth.labels.tolist(), truth.crowd.tolist(), found.tolist(), strict=True)
    ]
    detected = [
        _detection_mark(*entry, names)
        for entry in zip(boxes.tolist(), labels.tolist(), scores.tolist(), verdicts, strict=True)
    ]
    return Card(
        name=dataset.file_name(index),
        height=int(dataset.sizes[index][0]),
        width=int(dataset.sizes[index][1]),
        objects=_scaled_down(draw_marks(image, objects)),
        detections=_scaled_down(draw_marks(image, detected)),
        correct=verdicts.count(CORRECT),
        wrong=verdicts.count(WRONG),
        missed=int((~found & ~truth.crowd).sum()),
        crowded=bool(truth.crowd.any()),
    )


def _ground_truth(dataset: CocoDataset, index: int) -> GroundTruth:
    found = dataset.ground_truth
    rows = found.boxes_of(index)
    return GroundTruth(to_corners(found.boxes[rows]), found.labels[rows], found.crowd[rows])


def _object_mark(box: list[float], label: int, crowd: bool, found: bool, names: Sequence[str]) -> Mark:
    name = names[label - 1]
    if crowd:
        return _mark(box, label, f"crowd of {name}", emphasis=False, gray=True)
    return _mark(box, label, name if found else f"✗ {name}", emphasis=found)


def _detection_mark(box: list[float], label: int, score: float, verdict: str, names: Sequence[str]) -> Mark:
    text = f"{names[label - 1]} {score:.2f}"
    if verdict == IGNORED:
        return _mark(box, label, text, emphasis=False, gray=True)
    return _mark(box, label, text if verdict == CORRECT else f"✗ {text}", emphasis=verdict == CORRECT)


def _mark(box: list[float], label: int, text: str, emphasis: bool = True, gray: bool = False) -> Mark:
    x1, y1, x2, y2 = box
    return Mark((x1, y1, x2, y2), text, GRAY if gray else class_color(label - 1), emphasis)


def _scaled_down(picture: Image.Image) -> Image.Image:
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return picture
