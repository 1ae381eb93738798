"""COCO annotation files and image folders: parsed, checked entry by entry, and packed into compact arrays."""

import itertools
import json
import reprlib
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
"""Threads that look at image files: on a network file system each file is a wait of some milliseconds."""

FILES_PER_TASK = 64
"""Image files that a thread takes at a time, so that handing them out costs nothing."""

MINIMUM_SIDE = 0.01
"""Boxes thinner than this, in pixels, have no area: scaled down they could vanish in float32."""

COORDINATE_LIMIT = 1e9
"""Coordinates and areas beyond this are taken for garbage, like NaN."""

ID_LIMIT = 2**63

CheckImages = Literal["open", "decode"]


@dataclass(frozen=True)
class Problem:
    """One bad entry of an annotation file, or one bad image file."""

    what: str
    """A sentence without full stop, such as `box [3, 4, 0, 7] has no area`."""
    file: str = ""
    """The image file, where there is one."""
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
        return f"{', '.join(where)}: {self.what}" if where else self.what


@dataclass(frozen=True)
class Annotations:
    """The good entries of an annotation file, as arrays. Boxes are sorted by image."""

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
    """(n,), whether the file has any entry for the image, good or bad."""
    first_box: NDArray[np.int64]
    """(n + 1,): image i has the boxes `first_box[i]` up to `first_box[i + 1]`."""
    boxes: NDArray[np.float64]
    """(m, 4), x, y, width, height in pixels, as in the file: they may reach past the image's edge."""
    labels: NDArray[np.int64]
    """(m,), 1 + index in `category_ids`."""
    areas: NDArray[np.float64]
    """(m,), of the object in square pixels, as in the file; of the box where the file has none."""
    crowd: NDArray[np.bool_]
    """(m,), whether the box is around a crowd of objects."""
    problems: list[Problem]
    """What was left out, and why."""

    def select(self, keep: NDArray[np.bool_]) -> "Annotations":
        """The images where ``keep`` (n,) is true, with their boxes."""
        counts = np.diff(self.first_box)
        boxes = np.repeat(keep, counts)
        per_image = {name: getattr(self, name)[keep] for name in ("image_ids", "file_names", "sizes", "annotated")}
        per_box = {name: getattr(self, name)[boxes] for name in ("boxes", "labels", "areas", "crowd")}
        first_box = np.concatenate([[0], np.cumsum(counts[keep])])
        return replace(self, first_box=first_box, **per_image, **per_box)


@dataclass(frozen=True)
class _Image:
    """An entry of `images` that could be understood."""

    id: int
    file: str
    size: tuple[int, int] | None
    """(height, width) in the annotation file, not checked."""


def read_annotations(annotations: Path, images: Path, check_images: CheckImages) -> Annotations:
    """Reads a COCO JSON, looks at every image file, and separates good entries from bad ones.

    Raises :class:`UserError` where nothing can be used: a missing folder, invalid JSON, a missing section, no images.
    """
    content = _read_json(annotations)
    if not images.is_dir():
        raise UserError(f"{images}: no such image folder (the images of {annotations}).")
    problems: list[Problem] = []
    names = _read_categories(content["categories"], problems)
    listed = _read_images(content["images"], problems)
    sizes = _check_files(listed, images, check_images, problems)
    reader = _AnnotationReader(sorted(names), listed, sizes, problems)
    for place, entry in enumerate(content["annotations"]):
        reader.read(place, entry)
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
            raise UserError(f"{path}: the list `{section}` is empty, there is nothing to detect.")
    return content


def _without_polygons(entry: dict[str, Any]) -> dict[str, Any]:
    """Segmentations are most of a COCO file; dropped while it is parsed, they never fill the memory."""
    entry.pop("segmentation", None)
    return entry


def _read_categories(entries: list[Any], problems: list[Problem]) -> dict[int, str]:
    names: dict[int, str] = {}
    for place, entry in enumerate(entries):
        if fault := _entry_fault(entry, "id", "name"):
            problems.append(Problem(f"entry {place} of `categories` {fault}"))
        elif entry["id"] in names:
            problems.append(
                Problem(f"category id {entry['id']} is given twice: {names[entry['id']]!r} and {entry['name']!r}")
            )
        else:
            names[entry["id"]] = str(entry["name"])
    return names


def _unique_names(names: dict[int, str]) -> list[str]:
    """Class names in the order of their ids; where two are alike the id is added."""
    given = list(names.values())
    return [name if given.count(name) == 1 else f"{name} ({id})" for id, name in sorted(names.items())]


def _read_images(entries: list[Any], problems: list[Problem]) -> list[_Image]:
    images: dict[int, _Image] = {}
    for place, entry in enumerate(entries):
        if fault := _entry_fault(entry, "id", "file_name"):
            problems.append(Problem(f"entry {place} of `images` {fault}"))
        elif entry["id"] in images:
            problems.append(Problem("the image id is given twice", str(entry["file_name"]), entry["id"]))
        else:
            size = (entry["height"], entry["width"]) if "height" in entry and "width" in entry else None
            images[entry["id"]] = _Image(entry["id"], str(entry["file_name"]), size)
    return list(images.values())


def _check_files(
    listed: list[_Image], folder: Path, check_images: CheckImages, problems: list[Problem]
) -> dict[int, tuple[int, int]]:
    """Sizes (height, width) after EXIF orientation, by image id, of the image files that are good."""

    def check(image: _Image) -> tuple[int, int] | str:
        path = folder / image.file
        try:
            header = read_header(path)
            if check_images == "decode":
                read_image(path)
        except ImageFileError as error:
            return str(error)
        # Many tools write the size of the pixels as stored, and boxes as they were drawn on the displayed image.
        if image.size not in (None, header.size, header.stored_size):
            return f"the annotation file says (height, width) = {image.size}, the image file {header.size}"
        return header.size

    tasks = [listed[at : at + FILES_PER_TASK] for at in range(0, len(listed), FILES_PER_TASK)]
    with ThreadPoolExecutor(FILE_THREADS) as threads:
        findings = threads.map(lambda task: [check(image) for image in task], tasks)
    sizes: dict[int, tuple[int, int]] = {}
    for image, found in zip(listed, itertools.chain.from_iterable(findings), strict=True):
        progress.advance()
        if isinstance(found, str):
            problems.append(Problem(found, image.file, image.id))
        else:
            sizes[image.id] = found
    return sizes


class _AnnotationReader:
    """Checks the entries of `annotations` one by one, and packs the good ones into arrays."""

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
        self.good = [image for image in listed if image.id in sizes]
        self.places = {image.id: place for place, image in enumerate(self.good)}
        self.sizes = sizes
        self.problems = problems
        self.annotated = np.zeros(len(self.good), dtype=bool)
        self.seen: set[int] = set()
        self.rows: list[tuple[float, ...]] = []

    def read(self, place: int, entry: Any) -> None:
        """Takes one entry in, or notes what is wrong with it."""
        if fault := _entry_fault(entry, "id", "image_id", "category_id", "bbox"):
            self.problems.append(Problem(f"entry {place} of `annotations` {fault}"))
            return
        image = self.listed.get(entry["image_id"]) if _is_id(entry["image_id"]) else None
        if image is not None and image.id not in self.places:
            return  # Left out with its image, which is one problem and not one for each of its annotations.
        if image is not None:
            self.annotated[self.places[image.id]] = True
        if fault := self._fault(entry, image):
            file, image_id = (image.file, image.id) if image else ("", None)
            self.problems.append(Problem(fault, file, image_id, entry["id"]))
            return
        assert image is not None
        self.seen.add(entry["id"])
        box = entry["bbox"]
        area = entry.get("area", box[2] * box[3])
        crowd = bool(entry.get("iscrowd", 0))
        self.rows.append((self.places[image.id], *box, self.labels[entry["category_id"]], area, crowd))

    def _fault(self, entry: dict[str, Any], image: _Image | None) -> str | None:
        box = entry["bbox"]
        if entry["id"] in self.seen:
            return "the annotation id is given twice"
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
            return f"the box {box} lies outside the image, which is {width} wide"
        if min(box[1] + box[3], height) - max(box[1], 0) < MINIMUM_SIDE:
            return f"the box {box} lies outside the image, which is {height} high"
        return None

    def pack(self, class_names: list[str]) -> Annotations:
        """The good entries as arrays."""
        rows = np.array(self.rows, dtype=np.float64).reshape(-1, 8)
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        return Annotations(
            category_ids=self.category_ids,
            class_names=class_names,
            image_ids=np.array([image.id for image in self.good], dtype=np.int64),
            file_names=np.array([image.file for image in self.good], dtype=np.str_),
            sizes=np.array([self.sizes[image.id] for image in self.good], dtype=np.int32).reshape(-1, 2),
            annotated=self.annotated,
            first_box=np.searchsorted(rows[:, 0], np.arange(len(self.good) + 1)),
            boxes=rows[:, 1:5],
            labels=rows[:, 5].astype(np.int64),
            areas=rows[:, 6],
            crowd=rows[:, 7].astype(bool),
            problems=self.problems,
        )


def _entry_fault(entry: Any, *keys: str) -> str | None:
    """What is wrong with an entry of any section: it must be an object with these keys and a usable id."""
    if not isinstance(entry, dict):
        return f"is {reprlib.repr(entry)}, not an object"
    if missing := [key for key in keys if key not in entry]:
        return f"has no {' and no '.join(f'`{key}`' for key in missing)}: {reprlib.repr(entry)}"
    if not _is_id(entry["id"]):
        return f"has the id {entry['id']!r}; ids must be whole numbers"
    return None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -ID_LIMIT <= value < ID_LIMIT


def _is_number(value: Any) -> bool:
    # NaN compares false with everything.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < COORDINATE_LIMIT
