"""COCO annotation files: parsed, checked, and packed into arrays.

If all entries of a file have the right types, msgspec parses them into small objects, without the polygons. Any other
file goes through Python's parser. Both ways lead to the same arrays and the same problems.
"""

import hashlib
import json
import mmap
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET

from horovod_megdet.data.annotation_entries import AnnotationEntry, EntryReader, ListedImage, entry_error
from horovod_megdet.data.annotations import Annotations, Problem
from horovod_megdet.data.image_files import CheckedFiles
from horovod_megdet.errors import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

PIECE_BYTES = 1 << 22
"""Of the text of the list `annotations` that is decoded at a time."""

_BETWEEN_OBJECTS = re.compile(rb"\}[ \t\n\r]*,[ \t\n\r]*\{")


@dataclass(frozen=True)
class AnnotationFile:
    """A parsed annotation file, its image files not yet checked."""

    sha256: str
    """Of the file's content."""
    class_names: dict[int, str]
    """By category id."""
    images: list[ListedImage]
    entries: list[Any]
    """The list `annotations`: objects of :class:`AnnotationEntry`, or whatever Python's parser found."""
    problems: list[Problem]
    """Bad entries of `categories` and `images`."""

    def sizes_as_written(self) -> CheckedFiles:
        """Takes the sizes in the annotation file for those of the image files, where it has any."""
        checked = CheckedFiles.unknown(len(self.images))
        for index, image in enumerate(self.images):
            if image.size and all(type(side) is int and 0 < side < 2**31 for side in image.size):
                checked.headers[index] = image.size * 2
        return checked

    def pack(self, checked: CheckedFiles) -> Annotations:
        """The valid entries as arrays, given the result of the check of all files of ``images``."""
        problems = list(self.problems)
        usable = _compare_sizes(self.images, checked, problems)
        reader = EntryReader(sorted(self.class_names), self.images, checked.headers[:, :2], usable, problems)
        rows = reader.rows(self.entries)
        return Annotations(
            category_ids=reader.category_ids,
            class_names=_unique_names(self.class_names),
            image_ids=np.array([self.images[index].id for index in usable], dtype=np.int64),
            file_names=np.array([self.images[index].file for index in usable], dtype=np.str_),
            sizes=checked.headers[usable, :2],
            annotated=reader.annotated,
            first_box=np.searchsorted(rows[:, 0], np.arange(len(usable) + 1)),
            boxes=rows[:, 1:5],
            labels=rows[:, 5].astype(np.int64),
            areas=rows[:, 6],
            crowd=rows[:, 7].astype(bool),
            problems=problems,
        )


def read_annotation_file(path: Path) -> AnnotationFile:
    """Parses a COCO JSON and checks its categories and images.

    Raises :class:`UserError` if nothing can be used: no such file, invalid JSON, a missing or empty section.
    """
    try:
        try:
            parsed = _read_typed(path)
        except (msgspec.DecodeError, RecursionError):
            parsed = _read_any(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such annotation file.") from None
    except OSError as error:
        raise UserError(f"{path}: the annotation file cannot be read: {error}.") from None
    sha256, images, entries, categories = parsed
    for section, listed in (("images", images), ("categories", categories)):
        if not listed:
            raise UserError(f"{path}: the list `{section}` is empty: there is nothing to detect.")
    problems: list[Problem] = []
    class_names = _read_categories(categories, problems)
    return AnnotationFile(sha256, class_names, _read_images(images, problems), entries, problems)


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    height: Any = UNSET
    width: Any = UNSET

    def as_dict(self) -> dict[str, Any]:
        """The entry as Python's parser gives it, without what nobody reads."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not UNSET}


class _Content(msgspec.Struct, gc=False):
    images: list[_Image]
    annotations: msgspec.Raw
    categories: list[Any]


_Parsed = tuple[str, list[Any], list[Any], list[Any]]
"""SHA-256 of the content, and the lists `images`, `annotations` and `categories`."""


def _read_typed(path: Path) -> _Parsed:
    """Raises ``msgspec.DecodeError`` unless all entries have the right types."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise msgspec.DecodeError("the file is empty")
        memory = mmap.mmap(-1, size)  # can be given back piece by piece, which `bytes` cannot
        text = memoryview(memory)[: file.readinto(memory)]
    sha256 = hashlib.sha256(text).hexdigest()
    start = len(BYTE_ORDER_MARK) if text[: len(BYTE_ORDER_MARK)] == BYTE_ORDER_MARK else 0
    content = msgspec.json.decode(text[start:], type=_Content)
    entries = _decode_entries(memory, memoryview(content.annotations))  # first: it gives memory back
    return sha256, [image.as_dict() for image in content.images], entries, content.categories


def _decode_entries(memory: mmap.mmap, text: memoryview) -> list[AnnotationEntry]:
    """Decodes the list `annotations`, whose ``text`` lies in ``memory``, and gives back the memory as it goes on.

    Text and objects together would take three quarters more than the text. A piece that ends anywhere but between two
    entries of the list is not valid JSON, so that a wrong end is noticed; then Python's parser reads the file.
    """
    if text[:1] != b"[":
        raise msgspec.DecodeError("`annotations` is not a list")
    decoder = msgspec.json.Decoder(list[AnnotationEntry])
    offset = _address(text) - _address(memory)
    entries: list[AnnotationEntry] = []
    start, given_back = 1, 0
    while start < len(text) - 1:
        between = _BETWEEN_OBJECTS.search(text, start + PIECE_BYTES)
        end = between.start() + 1 if between else len(text) - 1
        entries += decoder.decode(b"[" + text[start:end] + b"]")
        start = between.end() - 1 if between else len(text)
        pages_end = (offset + end) // mmap.PAGESIZE * mmap.PAGESIZE
        if pages_end > given_back:
            memory.madvise(mmap.MADV_DONTNEED, given_back, pages_end - given_back)
            given_back = pages_end
    return entries


def _address(buffer: Any) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def _read_any(path: Path) -> _Parsed:
    """Python's parser accepts NaN, reports where JSON is invalid, and does not care what the entries are."""
    content = path.read_bytes()
    try:
        parsed = json.loads(content.decode("utf-8-sig"), object_hook=_without_polygons)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the annotation file cannot be read: {error}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}.") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path}: not a COCO annotation file: its top level must be an object with a list `images`.")
    sections = ("images", "annotations", "categories")
    for section in sections:
        if not isinstance(parsed.get(section), list):
            raise UserError(f"{path}: not a COCO annotation file: it has no list `{section}`.")
    images, entries, categories = (parsed[section] for section in sections)
    return hashlib.sha256(content).hexdigest(), images, entries, categories


def _without_polygons(entry: dict[str, Any]) -> dict[str, Any]:
    """Drops segmentations, most of a COCO file, during parsing: they never fill the memory."""
    entry.pop("segmentation", None)
    return entry


def _read_categories(entries: list[Any], problems: list[Problem]) -> dict[int, str]:
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        if error := entry_error(entry, "id", "name"):
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


def _read_images(entries: list[Any], problems: list[Problem]) -> list[ListedImage]:
    images: dict[int, ListedImage] = {}
    for index, entry in enumerate(entries):
        if error := entry_error(entry, "id", "file_name"):
            problems.append(Problem(f"entry {index} of `images` {error}"))
        elif entry["id"] in images:
            problems.append(Problem("duplicate image id", str(entry["file_name"]), entry["id"]))
        else:
            size = (entry["height"], entry["width"]) if "height" in entry and "width" in entry else None
            images[entry["id"]] = ListedImage(entry["id"], str(entry["file_name"]), size)
    return list(images.values())


def _compare_sizes(images: list[ListedImage], checked: CheckedFiles, problems: list[Problem]) -> list[int]:
    """Indices of the images whose file is readable and has the size that the annotation file says."""
    usable = []
    for index, (image, (height, width, *stored)) in enumerate(zip(images, checked.headers.tolist(), strict=True)):
        error = checked.errors.get(index)
        # Many tools write the size as stored, but boxes as drawn on the displayed image.
        if error is None and image.size not in (None, (height, width), tuple(stored)):
            error = f"(height, width) is {image.size} in the annotation file and {(height, width)} in the image file"
        if error is None:
            usable.append(index)
        else:
            problems.append(Problem(error, image.file, image.id))
    return usable
