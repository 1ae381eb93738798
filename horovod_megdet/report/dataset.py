"""What is in a data set, as a table and as a page of pictures, to look at before hours are spent on training."""

from pathlib import Path

import numpy as np
from rich.table import Table

from horovod_megdet.data.annotations import Annotations
from horovod_megdet.data.coco import CocoDataset
from horovod_megdet.files import atomic_write
from horovod_megdet.report.drawing import class_color
from horovod_megdet.report.page import DATASET_PAGE, PictureCard, render
from horovod_megdet.report.pictures import draw_ground_truth

SHOWN_SIDE = 640
"""Pixels of the longer side of a picture on the page."""

QUANTILES = (0.05, 0.5, 0.95)

Parts = dict[str, CocoDataset]
"""The parts of a data set, by name; all have the same classes."""


def dataset_table(parts: Parts) -> Table:
    """Images, objects of every class, sizes and aspect ratios of each part, and what all have together."""
    table = Table(title="Data set", title_justify="left")
    table.add_column("")
    for name in parts:
        table.add_column(name, justify="right")
    found = [part.ground_truth for part in parts.values()]
    table.add_row("images", *(str(len(each.image_ids)) for each in found))
    table.add_row("  without objects", *(str(int((np.diff(each.first_box) == 0).sum())) for each in found))
    table.add_row("objects", *(str(int((~each.crowd).sum())) for each in found))
    table.add_row("groups of objects", *(str(int(each.crowd.sum())) for each in found))
    table.add_section()
    for label, name in enumerate(found[0].class_names, start=1):
        table.add_row(name, *(_of_class(each, label) for each in found))
    table.add_section()
    columns: dict[str, list[np.ndarray]] = {
        "height of images": [each.sizes[:, 0] for each in found],
        "width of images": [each.sizes[:, 1] for each in found],
        "height of boxes": [each.boxes[:, 3] for each in found],
        "width of boxes": [each.boxes[:, 2] for each in found],
        "height / width of boxes": [each.boxes[:, 3] / each.boxes[:, 2] for each in found],
    }
    for title, values in columns.items():
        table.add_row(f"{title}: 5 %, median, 95 %", *map(_quantiles, values))
    return table


def write_dataset_page(path: Path, parts: Parts, *, count: int, title: str, summary: str) -> None:
    """Writes a self-contained HTML page: ``count`` images with their boxes, spread evenly over each part in turn."""
    cards, labels = [], set()
    for name, part in parts.items():
        share = min(len(part), max(1, count * len(part) // sum(map(len, parts.values()))))
        for index in np.linspace(0, len(part) - 1, share).round().astype(int).tolist():
            picture, drawn = draw_ground_truth(part, index)
            picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
            height, width = part.sizes[index].tolist()
            cards.append(PictureCard(part.file_name(index), name, height, width, picture))
            labels |= drawn
    names = next(iter(parts.values())).class_names
    classes = [(names[label - 1], class_color(label - 1)) for label in sorted(labels)]
    with atomic_write(path) as file:
        file.write(render(DATASET_PAGE, title=title, summary=summary, classes=classes, cards=cards))


def _of_class(found: Annotations, label: int) -> str:
    of_class = (found.labels == label) & ~found.crowd
    return f"{int(of_class.sum())} in {len(np.unique(found.image_of_box[of_class]))} images"


def _quantiles(values: np.ndarray) -> str:
    return ", ".join(f"{value:.3g}" for value in np.quantile(values, QUANTILES)) if len(values) else "-"
