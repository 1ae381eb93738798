"""COCO annotation files and image folders: parsed, checked entry by entry, and packed into arrays."""

import itertools
import json
import reprlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from horovod_megdet.data.images import ImageFileError, read_header, read_image
from horovod_megdet.errors import UserError
from horovod_megdet.progress import progress

FILE_THREADS = 8
"""Threads that check image files: on a network file system each file takes milliseconds, most of them waiting."""

FILES_PER_TASK = 64
"""Image files that a thread takes at a time, so that distributing them costs next to nothing."""

MINIMUM_SIDE = 0.01
"""Boxes thinner than this, in pixels, count as empty: scaled down they could vanish in float32."""

COORDINATE_LIMIT = 1e9
"""Coordinates and areas beyond this count as garbage, like NaN."""

ID_LIMIT = 2**63

CheckImages = Literal["open", "decode"]


@dataclass(frozen=True)
class Problem:
    """One bad entry of an annotation file, or one bad image file."""

    message: str
    """A sentence without its period, such as `the box [3, 4, 0, 7] has no area`."""
    file: str = ""
    """The image file, if there is one."""
    image: int | None = None
    """Image id."""
    annotation: int | None = None
    """Annotation id."""

    def __str__(self) -> str:
        where = []
        if self.annotation is not None:
            where.append(f"annotation {self.annotation}")
        if self.image is not None:
            where.append(f"image {self.image}" + (f" ({self.file})" if self.file else ""))
        return f"{', '.join(where)}: {self.message}" if where else self.message


@dataclass(frozen=True)
class Annotations:
    """The valid entries of an annotation file, as arrays. Boxes are sorted by image."""

    category_ids: list[int]
    """Ids in the file, sorted."""
    class_names: list[str]
    """In the order of `category_ids`."""
    image_ids: NDArray[np.int64]
    """(n,), ids in the file, in its order."""
    file_names: NDArray[np.str_]
    """(n,), relative to the image folder."""
    sizes: NDArray[np.int32]
    """(n, 2), (height, width) in pixels after EXIF orientation."""
    annotated: NDArray[np.bool_]
    """(n,), whether the file has any entry for the image, valid or not."""
    first_box: NDArray[np.int64]
    """(n + 1,): the boxes of image i are `boxes[first_box[i] : first_box[i + 1]]`."""
    boxes: NDArray[np.float64]
    """(m, 4), x, y, width, height in pixels, as in the file: they may extend past the image's edge."""
    labels: NDArray[np.int64]
    """(m,), 1 + index in `category_ids`."""
    areas: NDArray[np.float64]
    """(m,), the object's area in square pixels, as in the file, or the box's if the file has none."""
    crowd: NDArray[np.bool_]
    """(m,), whether the box surrounds a crowd of objects."""
    problems: list[Problem]
    """What was left out, and why."""

    def select(self, keep: NDArray[np.bool_]) -> "Annotations":
        """The images for which ``keep`` (n,) is true, with their boxes."""
        counts = np.diff(self.first_box)
        boxes = np.repeat(keep, counts)
        per_image = {name: getattr(self, name)[keep] for name in ("image_ids", "file_names", "sizes", "annotated")}
        per_box = {name: getattr(self, name)[boxes] for name in ("boxes", "labels", "areas", "crowd")}
        first_box = np.concatenate([[0], np.cumsum(counts[keep])])
        return replace(self, first_box=first_box, **per_image, **per_box)


@dataclass(frozen=True)
class _Image:
    """A valid entry of `images`."""

    id: int
    file: str
    size: tuple[int, int] | None
    """(height, width) according to the annotation file, not checked."""


def read_annotations(annotations: Path, images: Path, check_images: CheckImages) -> Annotations:
    """Reads a COCO JSON, checks every image file, and separates valid entries from bad ones.

    Raises :class:`UserError` if nothing can be used: a missing folder, invalid JSON, a missing section, no images.
    """
    content = _read_json(annotations)
    if not images.is_dir():
        raise UserError(f"{images}: no such image folder (the images of {annotations}).")
    problems: list[Problem] = []
    names = _read_categories(content["categories"], problems)
    listed = _read_images(content["images"], problems)
    sizes = _check_files(listed, images, check_images, problems)
    reader = _AnnotationReader(sorted(names), listed, sizes, problems)
    for index, entry in enumerate(content["annotations"]):
        reader.read(index, entry)
    return reader.pack(_unique_names(names))


def _read_json(path: Path) -> dict[str, list[Any]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=_without_polygons)
    except FileNotFoundError:
        raise UserError(f"{path}: no such annotation file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the annotation file cannot be read: {error}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a COCO annotation file: its top level must be an object with a list `images`.")
    for section in ("images", "annotations", "categories"):
        if not isinstance(content.get(section), list):
            raise UserError(f"{path}: not a COCO annotation file: it has no list `{section}`.")
    for section in ("images", "categories"):
        if not content[section]:
            raise UserError(f"{path}: the list `{section}` is empty: there is nothing to detect.")
    return content


def _without_polygons(entry: dict[str, Any]) -> dict[str, Any]:
    """Drops segmentations, most of a COCO file, during parsing: they never fill the memory."""
    entry.pop("segmentation", None)
    return entry


def _read_categories(entries: list[Any], problems: list[Problem]) -> dict[int, str]:
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        if error := _entry_error(entry, "id", "name"):
            problems.append(Problem(f"entry {index} of `categories` {error}"))
        elif entry["id"] in names:
            problems.append(
                Problem(f"duplicate category id {entry['id']}: {names[entry['id']]!r} and {entry['name']!r}")
            )
        else:
            names[entry["id"]] = str(entry["name"])
    return names


def _unique_names(names: dict[int, str]) -> list[str]:
    """Class names in the order of their ids; those that several categories share get the id as a suffix."""
    uses = Counter(names.values())
    return [name if uses[name] == 1 else f"{name} ({id})" for id, name in sorted(names.items())]


def _read_images(entries: list[Any], problems: list[Problem]) -> list[_Image]:
    images: dict[int, _Image] = {}
    for index, entry in enumerate(entries):
        if error := _entry_error(entry, "id", "file_name"):
            problems.append(Problem(f"entry {index} of `images` {error}"))
        elif entry["id"] in images:
            problems.append(Problem("duplicate image id", str(entry["file_name"]), entry["id"]))
        else:
            size = (entry["height"], entry["width"]) if "height" in entry and "width" in entry else None
            images[entry["id"]] = _Image(entry["id"], str(entry["file_name"]), size)
    return list(images.values())


def _check_files(
    listed: list[_Image], folder: Path, check_images: CheckImages, problems: list[Problem]
) -> dict[int, tuple[int, int]]:
    """Sizes (height, width) after EXIF orientation of the usable image files, by image id."""

    def check(image: _Image) -> tuple[int, int] | str:
        path = folder / image.file
        try:
            header = read_header(path)
            if check_images == "decode":
                read_image(path)
        except ImageFileError as error:
            return str(error)
        # Many tools write the size as stored, but boxes as drawn on the displayed image.
        if image.size not in (None, header.size, header.stored_size):
            return f"(height, width) is {image.size} in the annotation file and {header.size} in the image file"
        return header.size

    tasks = [listed[at : at + FILES_PER_TASK] for at in range(0, len(listed), FILES_PER_TASK)]
    with ThreadPoolExecutor(FILE_THREADS) as threads:
        results = threads.map(lambda task: [check(image) for image in task], tasks)
    sizes: dict[int, tuple[int, int]] = {}
    for image, result in zip(listed, itertools.chain.from_iterable(results), strict=True):
        progress.advance()
        if isinstance(result, str):
            problems.append(Problem(result, image.file, image.id))
        else:
            sizes[image.id] = result
    return sizes


class _AnnotationReader:
    """Checks the entries of `annotations` one by one, and packs the valid ones into arrays."""

    def __init__(
        self,
        category_ids: list[int],
        listed: list[_Image],
        sizes: dict[int, tuple[int, int]],
        problems: list[Problem],
    ) -> None:
        self.category_ids = category_ids
        self.labels = {id: label for label, id in enumerate(category_ids, start=1)}
        self.listed = {image.id: image for image in listed}
        self.usable = [image for image in listed if image.id in sizes]
        self.index_of = {image.id: index for index, image in enumerate(self.usable)}
        self.sizes = sizes
        self.problems = problems
        self.annotated = np.zeros(len(self.usable), dtype=bool)
        self.seen: set[int] = set()
        self.rows: list[tuple[float, ...]] = []

    def read(self, index: int, entry: Any) -> None:
        """Adds an entry, or notes what is wrong with it."""
        if error := _entry_error(entry, "id", "image_id", "category_id", "bbox"):
            self.problems.append(Problem(f"entry {index} of `annotations` {error}"))
            return
        image = self.listed.get(entry["image_id"]) if _is_id(entry["image_id"]) else None
        if image is not None and image.id not in self.index_of:
            return  # Left out with its image: one problem, not one for each annotation.
        if image is not None:
            self.annotated[self.index_of[image.id]] = True
        if error := self._error(entry, image):
            file, image_id = (image.file, image.id) if image else ("", None)
            self.problems.append(Problem(error, file, image_id, entry["id"]))
            return
        assert image is not None
        self.seen.add(entry["id"])
        box = entry["bbox"]
        area = entry.get("area", box[2] * box[3])
        crowd = bool(entry.get("iscrowd", 0))
        self.rows.append((self.index_of[image.id], *box, self.labels[entry["category_id"]], area, crowd))

    def _error(self, entry: dict[str, Any], image: _Image | None) -> str | None:
        box = entry["bbox"]
        if entry["id"] in self.seen:
            return "duplicate annotation id"
        if image is None:
            return f"there is no image {entry['image_id']!r} in `images`"
        if not _is_id(entry["category_id"]) or entry["category_id"] not in self.labels:
            return f"there is no category {entry['category_id']!r} in `categories`"
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
            return f"the box {reprlib.repr(box)} is not [x, y, width, height] in finite numbers"
        if not _is_number(entry.get("area", 0)):
            return f"the area {entry['area']!r} is not a finite number"
        if entry.get("iscrowd", 0) not in (0, 1):
            return f"iscrowd is {entry['iscrowd']!r}, neither 0 nor 1"
        if min(box[2:]) < MINIMUM_SIDE:
            return f"the box {box} has no area"
        height, width = self.sizes[image.id]
        if min(box[0] + box[2], width) - max(box[0], 0) < MINIMUM_SIDE:
            return f"the box {box} lies outside the image, which is {width} pixels wide"
        if min(box[1] + box[3], height) - max(box[1], 0) < MINIMUM_SIDE:
            return f"the box {box} lies outside the image, which is {height} pixels high"
        return None

    def pack(self, class_names: list[str]) -> Annotations:
        """The valid entries as arrays."""
        rows = np.array(self.rows, dtype=np.float64).reshape(-1, 8)
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        return Annotations(
            category_ids=self.category_ids,
            class_names=class_names,
            image_ids=np.array([image.id for image in self.usable], dtype=np.int64),
            file_names=np.array([image.file for image in self.usable], dtype=np.str_),
            sizes=np.array([self.sizes[image.id] for image in self.usable], dtype=np.int32).reshape(-1, 2),
            annotated=self.annotated,
            first_box=np.searchsorted(rows[:, 0], np.arange(len(self.usable) + 1)),
            boxes=rows[:, 1:5],
            labels=rows[:, 5].astype(np.int64),
            areas=rows[:, 6],
            crowd=rows[:, 7].astype(bool),
            problems=self.problems,
        )


def _entry_error(entry: Any, *keys: str) -> str | None:
    """What is wrong with an entry of any section: it must be an object with these keys and a valid id."""
    if not isinstance(entry, dict):
        return f"is {reprlib.repr(entry)}, not an object"
    if missing := [key for key in keys if key not in entry]:
        return f"has no {' and no '.join(f'`{key}`' for key in missing)}: {reprlib.repr(entry)}"
    if not _is_id(entry["id"]):
        return f"has the id {entry['id']!r}, but ids must be integers"
    return None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -ID_LIMIT <= value < ID_LIMIT


def _is_number(value: Any) -> bool:
    # NaN compares false with everything.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < COORDINATE_LIMIT
