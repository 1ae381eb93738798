"""The entries of a COCO file's list `annotations`: checked, and packed into rows.

Numpy checks entries of the right types all at once; only those that look bad, and entries of any other kind, are
checked one by one. Both ways lead to the same rows and the same problems.
"""

import itertools
import reprlib
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from horovod_megdet.data.annotations import Problem

MINIMUM_SIDE = 0.01
"""Boxes thinner than this, in pixels, count as empty: scaled down they could vanish in float32."""

COORDINATE_LIMIT = 1e9
"""Coordinates and areas beyond this count as garbage, like NaN."""

ID_LIMIT = 2**63

Number = int | float


class AnnotationEntry(msgspec.Struct, gc=False):
    """An entry whose fields have the right types."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[Number, Number, Number, Number]
    area: Number | UnsetType = UNSET
    iscrowd: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The entry as Python's parser gives it, without what nobody reads."""
        entry = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not UNSET}
        return entry | {"bbox": list(self.bbox)}


@dataclass(frozen=True)
class ListedImage:
    """A valid entry of `images`."""

    id: int
    file: str
    size: tuple[Any, Any] | None
    """(height, width) according to the annotation file, not checked."""


class EntryReader:
    """Checks the entries of `annotations`, and packs the valid ones into rows."""

    def __init__(
        self,
        category_ids: list[int],
        images: list[ListedImage],
        sizes: NDArray[np.int32],
        usable: list[int],
        problems: list[Problem],
    ) -> None:
        self.category_ids = category_ids
        self.labels = {id: label for label, id in enumerate(category_ids, start=1)}
        self.listed = {image.id: image for image in images}
        self.index_of = {images[index].id: number for number, index in enumerate(usable)}
        self.sizes = sizes[usable]
        self.problems = problems
        self.annotated = np.zeros(len(usable), dtype=bool)
        self.seen: set[int] = set()

    def rows(self, entries: list[Any]) -> NDArray[np.float64]:
        """(m, 8), image by image: image index, x, y, width, height, label, area, crowd."""
        if not entries or not isinstance(entries[0], AnnotationEntry):
            rows = _as_rows([row for index, entry in enumerate(entries) if (row := self._read(index, entry))])
            return rows[np.argsort(rows[:, 0], kind="stable")]
        rows, clean, suspicious = self._check_all(entries)
        # Bad entries, and all that share their id with another: few, or none at all.
        checked = {index: self._read(index, entries[index].as_dict()) for index in np.flatnonzero(suspicious).tolist()}
        for index, row in checked.items():
            if row:
                rows[index], clean[index] = row, True
        valid = np.flatnonzero(clean)
        return rows[valid[np.argsort(rows[valid, 0], kind="stable")]]

    def _read(self, index: int, entry: Any) -> tuple[float, ...] | None:
        """The row of an entry, or None where there is something wrong with it, which is noted."""
        if error := entry_error(entry, "id", "image_id", "category_id", "bbox"):
            self.problems.append(Problem(f"entry {index} of `annotations` {error}"))
            return None
        image = self.listed.get(entry["image_id"]) if _is_id(entry["image_id"]) else None
        if image is not None and image.id not in self.index_of:
            return None  # Left out with its image: one problem, not one for each annotation.
        if image is not None:
            self.annotated[self.index_of[image.id]] = True
        if error := self._error(entry, image):
            file, image_id = (image.file, image.id) if image else ("", None)
            self.problems.append(Problem(error, file, image_id, entry["id"]))
            return None
        assert image is not None
        self.seen.add(entry["id"])
        box = entry["bbox"]
        area = entry.get("area", box[2] * box[3])
        crowd = bool(entry.get("iscrowd", 0))
        return (self.index_of[image.id], *box, self.labels[entry["category_id"]], area, crowd)

    def _error(self, entry: dict[str, Any], image: ListedImage | None) -> str | None:
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
        height, width = self.sizes[self.index_of[image.id]].tolist()
        if min(box[0] + box[2], width) - max(box[0], 0) < MINIMUM_SIDE:
            return f"the box {box} lies outside the image, which is {width} pixels wide"
        if min(box[1] + box[3], height) - max(box[1], 0) < MINIMUM_SIDE:
            return f"the box {box} lies outside the image, which is {height} pixels high"
        return None

    def _check_all(
        self, entries: list[AnnotationEntry]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
        """Rows of all entries, which of them are certainly valid, and which must be checked one by one.

        Entries that are neither belong to images that are left out.
        """
        try:
            columns = _Columns.of(entries)
        except OverflowError:  # integers of hundreds of digits
            columns = None
        if columns is None or not self.category_ids or not len(self.sizes):
            return np.zeros((len(entries), 8)), np.zeros(len(entries), bool), np.ones(len(entries), bool)
        image, listed = self._image_indices(columns.image_ids)
        left_out = listed & (image < 0)
        unique, counts = np.unique(columns.ids[~left_out], return_counts=True)
        category = np.searchsorted(self.category_ids, columns.category_ids).clip(max=len(self.category_ids) - 1)
        valid = (
            (image >= 0)
            & (np.take(self.category_ids, category) == columns.category_ids)
            & _are_valid_boxes(columns.boxes, self.sizes[image])
            & (np.abs(columns.areas) < COORDINATE_LIMIT)
            & ((columns.crowd == 0) | (columns.crowd == 1))
            & ~np.isin(columns.ids, unique[counts > 1])
        )
        self.annotated[image[image >= 0]] = True
        rows = columns.rows
        rows[:, 0], rows[:, 5], rows[:, 7] = image, category + 1, columns.crowd
        return rows, valid, ~valid & ~left_out

    def _image_indices(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """For each image id the index among the usable images, or -1; and whether the image is listed at all."""
        listed = np.array(sorted(self.listed), np.int64)
        indices = np.array([self.index_of.get(id, -1) for id in listed.tolist()], np.int64)
        place = np.searchsorted(listed, ids).clip(max=len(listed) - 1)
        known = listed[place] == ids
        return np.where(known, indices[place], -1), known


@dataclass(frozen=True)
class _Columns:
    """The fields of many entries, one array for each."""

    rows: NDArray[np.float64]
    """(n, 8), as :meth:`EntryReader.rows` returns them; only boxes and areas are filled in."""
    ids: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    crowd: NDArray[np.int64]

    @property
    def boxes(self) -> NDArray[np.float64]:
        """(n, 4), part of the rows."""
        return self.rows[:, 1:5]

    @property
    def areas(self) -> NDArray[np.float64]:
        """Of the box, where the entry has none; part of the rows."""
        return self.rows[:, 6]

    @classmethod
    def of(cls, entries: list[AnnotationEntry]) -> "_Columns":
        """Raises ``OverflowError`` for numbers that do not fit."""
        count = len(entries)
        rows = np.zeros((count, 8))
        boxes = np.fromiter(itertools.chain.from_iterable(entry.bbox for entry in entries), np.float64, 4 * count)
        rows[:, 1:5] = boxes.reshape(-1, 4)
        del boxes
        areas = rows[:, 6]
        np.multiply(rows[:, 3], rows[:, 4], out=areas)
        for index, entry in enumerate(entries):
            if entry.area is not UNSET:
                areas[index] = entry.area
        return cls(
            rows=rows,
            ids=np.fromiter((entry.id for entry in entries), np.int64, count),
            image_ids=np.fromiter((entry.image_id for entry in entries), np.int64, count),
            category_ids=np.fromiter((entry.category_id for entry in entries), np.int64, count),
            crowd=np.fromiter((entry.iscrowd for entry in entries), np.int64, count),
        )


def _are_valid_boxes(boxes: NDArray[np.float64], sizes: NDArray[np.int32]) -> NDArray[np.bool_]:
    """For (n, 4) boxes, (x, y, width, height), and the (n, 2) sizes, (height, width), of their images."""
    valid = np.ones(len(boxes), bool)
    for axis in (0, 1):
        first, extent, size = boxes[:, axis], boxes[:, 2 + axis], sizes[:, 1 - axis]
        valid &= (np.abs(first) < COORDINATE_LIMIT) & (np.abs(extent) < COORDINATE_LIMIT) & (extent >= MINIMUM_SIDE)
        valid &= np.minimum(first + extent, size) - first.clip(min=0) >= MINIMUM_SIDE
    return valid


def _as_rows(rows: list[tuple[float, ...]]) -> NDArray[np.float64]:
    return np.array(rows, dtype=np.float64).reshape(-1, 8)


def entry_error(entry: Any, *keys: str) -> str | None:
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
