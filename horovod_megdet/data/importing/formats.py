"""Annotation files of other formats: Pascal VOC, YOLO, LabelMe, CVAT and OpenImages.

globox converts the boxes. It is called box by box, since it reads a whole folder or nothing and does not say which line
it stopped at; what it passes over in silence (polygons, rotations) is noticed here.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from horovod_megdet.errors import UserError

SUFFIXES = {"voc": ".xml", "cvat": ".xml", "yolo": ".txt", "labelme": ".json", "openimages": ".csv"}
"""The formats, and the suffix of their files."""

ROOTS = {"annotation": "voc", "annotations": "cvat"}
"""Outermost element of an XML file, and its format."""

OPENIMAGES_COLUMNS = ("ImageID", "LabelName", "XMin", "YMin", "XMax", "YMax")

UNREADABLE, NOT_A_BOX = "annotations that cannot be read", "objects without a usable box"
"""Kinds of bad input."""


@dataclass(frozen=True)
class Bad:
    """One bad thing in what is imported."""

    kind: str
    """Such as `unknown class`; the summary counts by it."""
    where: str
    """File, and line where the format has lines: `labels/a.txt:3`."""
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class Object:
    """An annotated object."""

    label: str
    """As written; in YOLO files the number of a class."""
    corners: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels, or in fractions of the image's sides where the record is ``relative``."""
    where: str
    crowd: bool = False
    """Whether the box surrounds a group of objects."""


@dataclass
class Record:
    """An image and its objects, as an annotation file describes them."""

    format: str
    """A key of :data:`SUFFIXES`."""
    image: str
    """Name of the image file as written: with or without folders, with or without suffix."""
    folder: Path
    """Where the name starts from, if the image is beside its annotations."""
    where: str
    size: tuple[int, int] | None = None
    """(height, width) as written."""
    relative: bool = False
    objects: list[Object] = field(default_factory=list)
    unreadable: int = 0
    """Objects that could not be read."""


class AnnotationReader:
    """Reads annotation files one by one; notes in ``bad`` what it could not read."""

    def __init__(self) -> None:
        try:
            from globox import BoundingBox
            from globox.errors import ParsingError
        except ImportError:
            raise UserError(
                "megdet import-data needs the package globox: pip install 'horovod-megdet[import]'."
            ) from None
        self._box = BoundingBox
        self._errors = (ParsingError, AssertionError, ArithmeticError, LookupError, TypeError, ValueError)
        self.bad: list[Bad] = []

    def read(self, path: Path) -> Iterator[Record]:
        """The images that a file describes.

        Raises :class:`UserError` for a CSV that is not OpenImages', since then nothing in it can be used.
        """
        read = {".xml": self._read_xml, ".txt": self._read_yolo, ".json": self._read_labelme, ".csv": self._read_csv}
        try:
            yield from read[path.suffix.lower()](path)
        except expat.ExpatError as error:
            self._note(UNREADABLE, f"{path}:{error.lineno}", f"not valid XML: {expat.ErrorString(error.code)}")
        except json.JSONDecodeError as error:
            self._note(UNREADABLE, f"{path}:{error.lineno}", f"not valid JSON: {error.msg}")
        except (OSError, UnicodeError, csv.Error) as error:
            self._note(UNREADABLE, str(path), f"it cannot be read: {error}")

    def _note(self, kind: str, where: str, message: str) -> None:
        self.bad.append(Bad(kind, where, message))

    def _add(self, record: Record, where: str, parse: Callable[[], Any], crowd: bool = False) -> None:
        try:
            box = parse()
            if not (box.label and box.label.strip()):
                raise ValueError("the label is empty")
        except self._errors as error:
            self._not_a_box(record, where, f"this object has no usable box and label: {str(error).rstrip('.')}")
        else:
            record.objects.append(Object(box.label.strip(), box.ltrb, where, crowd))

    def _not_a_box(self, record: Record, where: str, message: str) -> None:
        self._note(NOT_A_BOX, where, message)
        record.unreadable += 1

    def _read_xml(self, path: Path) -> Iterator[Record]:
        root, lines = _parse_xml(path)
        form = ROOTS.get(root.tag)
        if form == "voc":
            yield self._voc_record(path, root, lines)
        elif form == "cvat":
            yield from self._cvat_records(path, root, lines)
        else:
            message = f"its outermost element is <{root.tag}>; Pascal VOC has <annotation>, and CVAT <annotations>"
            self._note(UNREADABLE, f"{path}:1", message)

    def _voc_record(self, path: Path, root: Element, lines: dict[Element, int]) -> Record:
        name = (root.findtext("filename") or "").strip() or path.stem
        record = Record("voc", name, path.parent, str(path))
        if (size := root.find("size")) is not None:
            record.size = _size(size.findtext("height"), size.findtext("width"))
        for node in root.findall("object"):
            self._add(record, f"{path}:{lines[node]}", lambda node=node: self._box.from_xml(node))  # type: ignore[misc]
        return record

    def _cvat_records(self, path: Path, root: Element, lines: dict[Element, int]) -> Iterator[Record]:
        if (track := root.find("track")) is not None:
            message = "tracks of a video; export the task from CVAT as `CVAT for images`"
            self._note(UNREADABLE, f"{path}:{lines[track]}", message)
        for node in root.findall("image"):
            where = f"{path}:{lines[node]}"
            record = Record("cvat", node.get("name", ""), path.parent, where)
            record.size = _size(node.get("height"), node.get("width"))
            for shape in node:
                self._add_cvat_shape(record, f"{path}:{lines[shape]}", shape)
            yield record

    def _add_cvat_shape(self, record: Record, where: str, shape: Element) -> None:
        if shape.tag == "tag":  # of the whole image
            return
        if shape.tag != "box":
            self._not_a_box(record, where, f"a {shape.tag}; only boxes are read from CVAT files")
        else:
            self._add(record, where, lambda: self._cvat_box(shape))

    def _cvat_box(self, shape: Element) -> Any:
        if float(shape.get("rotation", 0)) % 180:
            raise ValueError(f"it is rotated by {shape.get('rotation')} degrees")
        return self._box.from_cvat(shape)

    def _read_yolo(self, path: Path) -> Iterator[Record]:
        """The boxes of one image; also polygons, of which the surrounding box is taken."""
        record = Record("yolo", path.stem, _folder_of_images(path.parent), str(path), relative=True)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            lines, record.unreadable = [], 1  # else its image would count as one without objects
            self._note(UNREADABLE, str(path), f"it cannot be read: {error}")
        for number, line in enumerate(lines, start=1):
            if values := line.split():
                parse = self._box.from_yolo_seg if len(values) > 6 else self._box.from_yolo_v5
                self._add(record, f"{path}:{number}", lambda line=line, parse=parse: parse(line, image_size=(1, 1)))  # type: ignore[misc]
        yield record

    def _read_labelme(self, path: Path) -> Iterator[Record]:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            self._note(UNREADABLE, str(path), "not a LabelMe file: it has no list `shapes`")
            return
        name = str(content.get("imagePath") or path.stem).replace("\\", "/")
        record = Record("labelme", name, path.parent, str(path))
        record.size = _size(content.get("imageHeight"), content.get("imageWidth"))
        for number, shape in enumerate(content["shapes"], start=1):
            where = f"{path}, shape {number}"
            kind = shape.get("shape_type", "polygon") if isinstance(shape, dict) else "thing without a type"
            if kind not in ("rectangle", "polygon"):
                self._not_a_box(record, where, f"a {kind}; only rectangles and polygons are read from LabelMe files")
            else:
                self._add(record, where, lambda shape=shape: self._box.from_labelme(shape))  # type: ignore[misc]
        yield record

    def _read_csv(self, path: Path) -> Iterator[Record]:
        records: dict[str, Record] = {}
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if missing := [name for name in OPENIMAGES_COLUMNS if name not in (rows.fieldnames or ())]:
                raise UserError(
                    f"{path}:1: not OpenImages' boxes: there is no column {' and no column '.join(missing)}."
                )
            for row in rows:
                where, name = f"{path}:{rows.line_num}", row["ImageID"]
                if name not in records:
                    records[name] = Record("openimages", name, path.parent, where, relative=True)
                crowd = row.get("IsGroupOf") == "1"
                self._add(records[name], where, lambda row=row: self._openimages_box(row), crowd)  # type: ignore[misc]
        yield from records.values()

    def _openimages_box(self, row: dict[str, str]) -> Any:
        coordinates = tuple(float(row[column]) for column in OPENIMAGES_COLUMNS[2:])
        return self._box.create(label=row["LabelName"], coords=coordinates, relative=True, image_size=(1, 1))


def _parse_xml(path: Path) -> tuple[Element, dict[Element, int]]:
    """The outermost element, and the line of each: ElementTree's own parser does not tell."""
    content = path.read_bytes()
    try:
        return _parsed(content)
    except (ValueError, LookupError):  # expat knows Unicode's encodings, and those of one byte per character
        return _parsed(_decoded(content))


def _decoded(content: bytes) -> str:
    declared = re.match(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)", content)
    encoding = declared[1].decode() if declared else "utf-8"
    try:
        return content.decode(encoding)
    except LookupError:
        raise UnicodeError(f"the encoding {encoding} is not known") from None


def _parsed(content: bytes | str) -> tuple[Element, dict[Element, int]]:
    parser, builder, lines = expat.ParserCreate(), TreeBuilder(), {}

    def start(tag: str, attributes: dict[str, str]) -> None:
        lines[builder.start(tag, attributes)] = parser.CurrentLineNumber

    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.Parse(content, True)
    return builder.close(), lines


def _size(height: Any, width: Any) -> tuple[int, int] | None:
    """(height, width), or None where there is none: some tools write 0."""
    try:
        size = int(height), int(width)
    except (TypeError, ValueError):
        return None
    return size if min(size) > 0 else None


def _folder_of_images(labels: Path) -> Path:
    """YOLO's rule: `train/labels/a.txt` belongs to `train/images/a.jpg`."""
    parts = list(labels.parts)
    if "labels" in parts:
        parts[len(parts) - 1 - parts[::-1].index("labels")] = "images"
    return Path(*parts)
