"""Drawn boxes, which of them are right, and the page that shows them."""

import base64
import contextlib
import html.parser
import io
import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import Tab
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from horovod_megdet.data.annotation_cache import Source
from horovod_megdet.data.coco import CocoDataset, load_dataset
from horovod_megdet.data.synthetic import ensure_synthetic
from horovod_megdet.evaluation.coco import Evaluation
from horovod_megdet.evaluation.detections import Arrays, Detections
from horovod_megdet.evaluation.metrics import METRICS
from horovod_megdet.report import drawing
from horovod_megdet.report.dataset import write_dataset_page
from horovod_megdet.report.drawing import LEGIBLE, Mark, class_color, contrast_with_white, draw_marks
from horovod_megdet.report.matching import CORRECT, IGNORED, WRONG, GroundTruth, match
from horovod_megdet.report.pictures import draw_detections, write_validation_page

# Matching


def truth_of(*objects: tuple[list[float], int], crowd: tuple[bool, ...] | None = None) -> GroundTruth:
    """Ground truth of (x1 y1 x2 y2, label) objects."""
    boxes = np.array([box for box, _ in objects], np.float64).reshape(-1, 4)
    labels = np.array([label for _, label in objects], np.int64)
    return GroundTruth(boxes, labels, np.array(crowd or [False] * len(objects), bool))


SQUARE = [10.0, 10.0, 20.0, 20.0]
HALF_OFF = [15.0, 10.0, 25.0, 20.0]  # IoU 1/3 with SQUARE
JUST = [10.0, 10.0, 20.0, 15.0]  # IoU 1/2


@pytest.mark.parametrize(
    ("boxes", "labels", "verdicts", "found"),
    [
        ([SQUARE], [1], [CORRECT], [True]),
        ([JUST], [1], [CORRECT], [True]),
        ([HALF_OFF], [1], [WRONG], [False]),
        ([SQUARE], [2], [WRONG], [False]),
        ([SQUARE, SQUARE], [1, 1], [CORRECT, WRONG], [True]),
        ([HALF_OFF, SQUARE], [1, 1], [WRONG, CORRECT], [True]),
        ([], [], [], [False]),
    ],
)
def test_a_detection_is_correct_at_half_overlap_with_a_free_object_of_its_class(
    boxes: list[list[float]], labels: list[int], verdicts: list[str], found: list[bool]
) -> None:
    said, seen = match(truth_of((SQUARE, 1)), np.array(boxes).reshape(-1, 4), np.array(labels))
    assert said == verdicts
    assert seen.tolist() == found


def test_without_objects_every_detection_is_wrong() -> None:
    said, found = match(truth_of(), np.array([SQUARE, JUST]), np.array([1, 1]))
    assert said == [WRONG, WRONG]
    assert found.shape == (0,)


def test_detections_inside_a_crowd_do_not_count_unless_they_find_an_object() -> None:
    truth = truth_of(([0.0, 0.0, 100.0, 100.0], 1), (SQUARE, 1), crowd=(True, False))
    boxes = np.array([[50.0, 50, 60, 60], [70.0, 70, 80, 80], SQUARE, [50.0, 50, 60, 60]])
    said, found = match(truth, boxes, np.array([1, 1, 1, 2]))
    assert said == [IGNORED, IGNORED, CORRECT, WRONG]
    assert found.tolist() == [False, True]


@pytest.mark.parametrize("seed", range(20))
def test_matching_agrees_with_pycocotools_at_half_overlap(seed: int) -> None:
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 60, (8, 2))
    truth_boxes = np.concatenate([corners, corners + random.uniform(15, 40, (8, 2))], axis=1)
    truth = GroundTruth(truth_boxes, random.integers(1, 3, 8), random.random(8) < 0.2)
    boxes = np.concatenate([truth_boxes, truth_boxes]) + random.normal(0, 4, (16, 4))
    labels = np.where(random.random(16) < 0.8, np.tile(truth.labels, 2), 1)
    said, _ = match(truth, boxes, labels)
    assert said == verdicts_of_pycocotools(truth, boxes, labels)


def verdicts_of_pycocotools(truth: GroundTruth, boxes: np.ndarray, labels: np.ndarray) -> list[str]:
    def annotations(corners: np.ndarray, classes: np.ndarray, crowd: np.ndarray) -> COCO:
        coco = COCO()
        coco.dataset = {
            "images": [{"id": 1}],
            "categories": [{"id": 1}, {"id": 2}],
            "annotations": [
                {
                    "id": number,
                    "image_id": 1,
                    "category_id": int(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": 1.0,
                    "iscrowd": int(flag),
                    "score": 1 / number,
                }
                for number, ((x1, y1, x2, y2), label, flag) in enumerate(
                    zip(corners.tolist(), classes, crowd, strict=True), start=1
                )
            ],
        }
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        found = annotations(boxes, labels, np.zeros(len(boxes)))
        evaluator = COCOeval(annotations(truth.boxes, truth.labels, truth.crowd), found, "bbox")
        evaluator.evaluate()
    verdicts = {}
    for result in evaluator.evalImgs:
        if result is not None and result["aRng"] == evaluator.params.areaRng[0]:
            for number, matched, ignored in zip(
                result["dtIds"], result["dtMatches"][0], result["dtIgnore"][0], strict=True
            ):
                verdicts[number] = IGNORED if ignored else CORRECT if matched else WRONG
    return [verdicts[number] for number in range(1, len(boxes) + 1)]


# Drawing


def gray_image(height: int, width: int) -> torch.Tensor:
    return torch.full((3, height, width), 128, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((120, 160), (360, 480)),
        ((1, 1), (400, 400)),
        ((300, 399), (600, 798)),
        ((300, 400), (300, 400)),
        ((20, 900), (20, 900)),
    ],
)
def test_small_images_are_enlarged_by_an_integer_factor(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert draw_marks(gray_image(*size), []).size == expected[::-1]


def test_the_image_given_is_not_drawn_on() -> None:
    image = gray_image(500, 500)
    draw_marks(image, [Mark((10, 10, 400, 400), "cell", (200, 0, 0))])
    assert (image == 128).all()


def outline(emphasis: bool) -> np.ndarray:
    """The pixels on the lower edge of a drawn box, away from its label."""
    mark = Mark((20.0, 30.0, 80.0, 70.0), "cell", (200, 0, 0), emphasis=emphasis)
    picture = np.asarray(draw_marks(gray_image(100, 100), [mark]))  # enlarged four times
    return picture[280, 84:316]


def test_a_solid_box_is_drawn_at_its_place_in_its_color_and_a_dashed_one_has_gaps() -> None:
    assert (outline(emphasis=True) == (200, 0, 0)).all()
    colors = {tuple(pixel) for pixel in outline(emphasis=False).tolist()}
    assert colors == {(200, 0, 0), (255, 255, 255)}


def test_colors_of_many_classes_differ_and_white_text_is_legible_on_them() -> None:
    colors = [class_color(number) for number in range(80)]
    assert len(set(colors)) == 80
    assert class_color(5) == colors[5]
    for first, second in itertools.combinations(colors[:10], 2):
        assert sum(abs(a - b) for a, b in zip(first, second, strict=True)) > 70
    assert all(contrast_with_white(color) >= LEGIBLE for color in colors)
    assert contrast_with_white((0, 0, 0)) == pytest.approx(21)
    assert contrast_with_white((119, 119, 119)) == pytest.approx(4.48, abs=0.01)


boxes_anywhere = st.lists(
    st.tuples(*[st.floats(-50, 700)] * 4).map(lambda b: (*sorted(b[:2]), *sorted(b[2:]))), max_size=6
)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 600), st.integers(1, 600), boxes_anywhere)
def test_boxes_of_any_size_and_place_can_be_drawn(height: int, width: int, boxes: list[tuple[float, ...]]) -> None:
    marks = [Mark((x1, y1, x2, y2), f"class {x1:.0f}", (0, 90, 200), bool(x1 > 9)) for x1, x2, y1, y2 in boxes]
    picture = draw_marks(gray_image(height, width), marks)
    assert picture.width % width == picture.height % height == 0


def test_labels_stay_inside_the_picture_and_do_not_cover_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pens: list[drawing._Pen] = []
    make = drawing._Pen.__init__

    def remember(pen: drawing._Pen, *arguments: object, **named: object) -> None:
        make(pen, *arguments, **named)  # type: ignore[arg-type]
        pens.append(pen)

    monkeypatch.setattr(drawing._Pen, "__init__", remember)
    corners = [(0, 0), (560, 0), (0, 440), (560, 440), (0, 4), (300, 200), (300, 202), (304, 200)]
    marks = [Mark((x, y, x + 80, y + 40), "Platelets 0.97", (0, 90, 200)) for x, y in corners]
    draw_marks(gray_image(480, 640), marks)
    labels = pens[0].labels
    assert len(labels) == len(marks)
    for x1, y1, x2, y2 in labels:
        assert 0 <= x1 < x2 < 640
        assert 0 <= y1 < y2 < 480
    assert all(drawing._overlap(a, b) == 0 for a, b in itertools.combinations(labels, 2))


def test_detections_are_drawn_in_the_color_of_their_class() -> None:
    boxes = np.array([[50, 50, 200, 200], [300, 300, 450, 450]], np.float32)
    picture = np.asarray(
        draw_detections(gray_image(500, 500), boxes, np.array([1, 3]), np.array([0.9, 0.8]), ["a", "b", "c"])
    )
    assert tuple(picture[100, 50]) == class_color(0)
    assert tuple(picture[400, 300]) == class_color(2)


# The page


class Page(html.parser.HTMLParser):
    """What a test wants to know of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("img", "meta"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                self.addresses.append(value or "")
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    paths = ensure_synthetic(tmp_path_factory.mktemp("data") / "synthetic", train_images=1, val_images=9)
    return load_dataset(paths["val_annotations"], paths["val_images"], training=False)


def evaluation_of(dataset: CocoDataset, score: float = 0.9, skip: int = 0) -> Evaluation:
    """An evaluation whose detections are the ground truth of each image without the first ``skip`` objects."""

    def arrays(index: int) -> Arrays:
        _, boxes, labels = dataset.read(index)
        count = max(0, len(labels) - skip)
        return boxes.numpy()[skip:], np.full(count, score, np.float32), labels.numpy()[skip:].astype(np.int32)

    detections = Detections.of_images((int(id), arrays(index)) for index, id in enumerate(dataset.image_ids))
    return Evaluation(dict.fromkeys(METRICS, 0.5), {}, len(dataset), dataset.category_ids, detections)


def write_page(path: Path, dataset: CocoDataset, evaluation: Evaluation, count: int = 4) -> Page:
    write_validation_page(path, dataset, evaluation, count=count, title="<demo> & more")
    return Page(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("count", "shown"), [(0, 0), (1, 1), (4, 4), (9, 9), (16, 9)])
def test_the_page_holds_a_pair_of_whole_pictures_for_each_image(
    dataset: CocoDataset, tmp_path: Path, count: int, shown: int
) -> None:
    page = write_page(tmp_path / "validation.html", dataset, evaluation_of(dataset), count)
    assert len(page.images) == 2 * shown
    for source in page.images:
        picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        picture.load()
        assert max(picture.size) >= drawing.SMALL


def test_the_page_needs_nothing_beside_it_and_escapes_names(dataset: CocoDataset, tmp_path: Path) -> None:
    page = write_page(tmp_path / "validation.html", dataset, evaluation_of(dataset))
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "<demo> & more" in page.text
    assert [path.name for path in tmp_path.iterdir()] == ["validation.html"]


@pytest.fixture(scope="module")
def pages(dataset: CocoDataset, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """That of a validation, and that of a data set."""
    folder = tmp_path_factory.mktemp("pages")
    write_page(folder / "validation.html", dataset, evaluation_of(dataset), count=2)
    write_dataset_page(folder / "dataset.html", {"val": dataset}, count=2, title="demo", summary="nine images")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1440])
def test_the_pages_fit_screens_and_follow_the_scheme(
    tab: Tab, pages: list[Path], tmp_path: Path, width: int, scheme: str
) -> None:
    assert len(pages) == 2
    for path in pages:
        tab.open(path, width, 800, scheme)
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        widths = tab.evaluate("[...document.querySelectorAll('img')].map(i => i.getBoundingClientRect().width)")
        assert min(widths) > 250, "pictures are as large as a phone allows"
        tab.screenshot(tmp_path / "page.png", whole_page=False)
        with Image.open(tmp_path / "page.png") as picture:
            page = picture.convert("L").getpixel((2, 2))
        card = tab.evaluate("getComputedStyle(document.querySelector('article, figure')).backgroundColor")
        ink = tab.evaluate("getComputedStyle(document.body).color")
        lightest = [max(int(number) for number in re.findall(r"\d+", color)) for color in (card, ink)]
        assert (page > 200, lightest[0] > 200, lightest[1] > 200) == (
            (True, True, False) if scheme == "light" else (False, False, True)
        )


def counts(page: Page) -> list[tuple[int, int, int]]:
    found = re.findall(r"(\d+) correct\D+(\d+) wrong\D+(\d+) missed", page.text)
    return [(int(correct), int(wrong), int(missed)) for correct, wrong, missed in found]


def test_the_page_counts_what_is_correct_wrong_and_missed(dataset: CocoDataset, tmp_path: Path) -> None:
    page = write_page(tmp_path / "page.html", dataset, evaluation_of(dataset, skip=1), count=9)
    total, *cards = counts(page)
    objects = [len(dataset.read(index)[2]) for index in range(len(dataset))]
    assert cards == [(max(0, number - 1), 0, min(1, number)) for number in objects]
    assert total == tuple(np.sum(cards, axis=0))


def test_detections_with_low_scores_are_not_drawn(dataset: CocoDataset, tmp_path: Path) -> None:
    page = write_page(tmp_path / "page.html", dataset, evaluation_of(dataset, score=0.49), count=9)
    assert counts(page)[0][:2] == (0, 0)
    assert re.search(r"a score of at least 0\.5: none of the \d+ has one\.", page.text)


def test_the_key_lists_the_classes_that_occur(dataset: CocoDataset, tmp_path: Path) -> None:
    page = write_page(tmp_path / "page.html", dataset, evaluation_of(dataset), count=1)
    key = page.text.split("missed object")[1].split(dataset.file_name(0))[0]
    labels = set(dataset.read(0)[2].tolist())
    assert [name in key for name in dataset.class_names] == [
        label in labels for label in range(1, len(dataset.class_names) + 1)
    ]
    assert "crowd" not in page.text


def test_crowd_regions_are_explained_and_not_counted(dataset: CocoDataset, tmp_path: Path) -> None:
    found = replace(dataset.ground_truth, crowd=np.ones_like(dataset.ground_truth.crowd))
    crowds = CocoDataset(found, Source(dataset.annotations, dataset.image_folder), training=False)
    page = write_page(tmp_path / "page.html", crowds, evaluation_of(dataset), count=9)
    assert "crowd of name" in page.text
    assert counts(page)[0] == (0, 0, 0)
