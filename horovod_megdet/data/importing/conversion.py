"""Data sets of other formats as COCO JSON: which image each annotation belongs to, one list of classes, bad input."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from horovod_megdet.data.annotation_entries import MINIMUM_SIDE
from horovod_megdet.data.image_files import check_files
from horovod_megdet.data.importing.classes import Classes
from horovod_megdet.data.importing.formats import NOT_A_BOX, AnnotationReader, Bad, Record
from horovod_megdet.data.importing.source import Source, annotation_files, find_images, image_names
from horovod_megdet.errors import UserError
from horovod_megdet.files import atomic_write
from horovod_megdet.wording import some

SHOWN = 10
"""Bad things that an error message lists; `bad.txt` has all of them."""


@dataclass(frozen=True)
class ImportedImage:
    """An image with its valid boxes."""

    name: str
    """Relative to the folder of images."""
    size: tuple[int, int]
    """(height, width) as displayed."""
    boxes: NDArray[np.float64]
    """(k, 4) x, y, width, height in pixels, inside the image."""
    labels: list[int]
    """k numbers of classes, from 0."""
    crowd: list[bool]


@dataclass(frozen=True)
class Imported:
    """What came out of an import."""

    format: str
    images: list[ImportedImage]
    """By name."""
    class_names: list[str]
    bad: list[Bad]
    """What was left out, and why."""
    clipped: int
    """Boxes that reached past the edge of their image."""
    unannotated: int
    """Image files that no annotation mentions, and that are left out."""

    def present(self) -> NDArray[np.bool_]:
        """(images, classes): which classes an image has objects of."""
        found = np.zeros((len(self.images), len(self.class_names)), bool)
        for row, image in zip(found, self.images, strict=True):
            row[image.labels] = True
        return found

    def write_coco(self, path: Path, chosen: Iterable[int]) -> None:
        """Writes the chosen images as a COCO JSON. Ids count from 1 over all images: no two parts share one."""
        images, annotations = [], []
        first_box = np.cumsum([1] + [len(image.labels) for image in self.images])
        for index in chosen:
            image = self.images[index]
            height, width = image.size
            images.append({"id": index + 1, "file_name": image.name, "height": height, "width": width})
            for number, (box, label, crowd) in enumerate(
                zip(image.boxes.tolist(), image.labels, image.crowd, strict=True), start=int(first_box[index])
            ):
                entry = {"id": number, "image_id": index + 1, "category_id": label + 1, "bbox": box}
                annotations.append(entry | {"area": box[2] * box[3], "iscrowd": int(crowd)})
        categories = [{"id": number, "name": name} for number, name in enumerate(self.class_names, start=1)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        with atomic_write(path) as file:
            file.write(json.dumps(content, allow_nan=False).encode())


def import_annotations(source: Source) -> Imported:
    """Reads annotations of any known format, finds their images, and checks every box.

    Bad input is noted in ``bad`` and left out; so is an image of whose objects only bad ones exist: without them it
    would teach that objects are background. Boxes that reach past the edge of their image are clipped.

    Raises :class:`UserError` if nothing can be used: no annotations, those of several formats, no names of classes.
    """
    reader = AnnotationReader()
    records = _of_one_format(source, reader)
    format, bad = records[0].format, reader.bad
    names = image_names(source)
    found, mentioned = find_images(source, records, names, bad)
    unannotated = sorted(set(names) - mentioned)
    if format == "yolo":  # where a file without boxes may be left out
        found += [(name, Record("yolo", name, source.images, name)) for name in unannotated]
        unannotated = []
    classes = Classes.of(source.classes, format, records)
    maker = _ImageMaker(classes, bad)
    images = list(maker.images(source.images, sorted(found, key=lambda pair: pair[0])))
    if not images:
        raise UserError(f"{source.annotations}: no image with usable annotations.{_list(bad)}")
    return Imported(format, images, classes.names, bad, maker.clipped, len(unannotated))


def count_bad(bad: list[Bad]) -> str:
    """How many bad things of each kind there are: `missing images (2), unknown classes (1)`."""
    return ", ".join(f"{kind} ({number})" for kind, number in Counter(problem.kind for problem in bad).items())


def describe_bad(bad: list[Bad]) -> str:
    """One message with the number of each kind, and the first few."""
    return f"{count_bad(bad)}:{_list(bad)}"


def _of_one_format(source: Source, reader: AnnotationReader) -> list[Record]:
    records = [record for file in annotation_files(source) for record in reader.read(file)]
    if source.format:
        records = [record for record in records if record.format == source.format]
    if not records:
        raise UserError(f"{source.annotations}: nothing in it can be imported.{_list(reader.bad)}")
    first = {record.format: record.where for record in reversed(records)}
    if len(first) > 1:
        listed = ", ".join(f"{name} ({where})" for name, where in first.items())
        raise UserError(f"{source.annotations}: files of several formats: {listed}. Say which to read: --format NAME.")
    return records


def _list(bad: list[Bad]) -> str:
    more = f"\n  ... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return "".join(f"\n  {problem}" for problem in bad[:SHOWN]) + more


class _ImageMaker:
    """Checks the image files and boxes of records."""

    def __init__(self, classes: Classes, bad: list[Bad]) -> None:
        self.classes = classes
        self.bad = bad
        self.clipped = 0

    def images(self, folder: Path, found: list[tuple[str, Record]]) -> Iterator[ImportedImage]:
        """The usable images, with their valid boxes."""
        checked = check_files(folder, [name for name, _ in found], "open")
        for index, (name, record) in enumerate(found):
            height, width, *stored = checked.headers[index].tolist()
            if error := checked.errors.get(index):
                self.bad.append(Bad("image files that cannot be read", str(folder / name), error))
            elif record.size not in (None, (height, width), tuple(stored)):
                message = f"{_sides(record.size)} in the annotations, and {_sides((height, width))} in {folder / name}"
                self.bad.append(Bad("images of another size", record.where, f"the image is {message}"))
            elif image := self._image(name, (height, width), record):
                yield image

    def _image(self, name: str, size: tuple[int, int], record: Record) -> ImportedImage | None:
        """None if only bad objects are known of it."""
        height, width = size
        sides = np.array([width, height] * 2, float)
        boxes, labels, crowd = [], [], []
        for item in record.objects:
            corners = np.array(item.corners) * (sides if record.relative else 1.0)
            inside = corners.clip(0, sides)
            number = self.classes.number_of.get(item.label)
            if number is None:
                known = some(self.classes.number_of)
                self.bad.append(Bad("unknown classes", item.where, f"unknown class {item.label!r}; known are {known}"))
            elif error := _box_error(corners, inside, size):
                self.bad.append(Bad(error[0], item.where, error[1]))
            else:
                self.clipped += bool(np.abs(inside - corners).max() > MINIMUM_SIDE)
                boxes.append([*inside[:2], *(inside[2:] - inside[:2])])
                labels.append(number)
                crowd.append(item.crowd)
        if not boxes and (record.objects or record.unreadable):
            return None
        return ImportedImage(name, size, np.array(boxes).reshape(-1, 4), labels, crowd)


def _box_error(
    corners: NDArray[np.float64], inside: NDArray[np.float64], size: tuple[int, int]
) -> tuple[str, str] | None:
    """Kind and sentence, or None for a good box."""
    shown = [round(float(value), 2) for value in corners]
    if not np.isfinite(corners).all():
        return NOT_A_BOX, f"the box {shown} is not four finite numbers"
    if (corners[2:] - corners[:2] < MINIMUM_SIDE).any():
        return "boxes without area", f"the box {shown} (x1, y1, x2, y2) has no area"
    if (inside[2:] - inside[:2] < MINIMUM_SIDE).any():
        message = f"the box {shown} (x1, y1, x2, y2) lies outside its image, which is {_sides(size)}"
        return "boxes outside their image", message
    return None


def _sides(size: tuple[int, int] | None) -> str:
    """`640 x 480 pixels`, the width first."""
    assert size is not None
    return f"{size[1]} x {size[0]} pixels"
