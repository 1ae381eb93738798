"""The list of classes of a data set that is imported."""

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from horovod_megdet.data.importing.formats import Record
from horovod_megdet.errors import UserError

CLASSES_FILE = "classes.txt"
"""One name per line; written beside what is imported."""

CLASS_FILES = ("data.yaml", "dataset.yaml", CLASSES_FILE, "obj.names")
"""Where YOLO tools write the names of the classes."""


@dataclass(frozen=True)
class Classes:
    """The list of classes, and the number of each label that annotations use."""

    names: list[str]
    number_of: dict[str, int]

    @classmethod
    def of(cls, path: Path | None, format: str, records: list[Record]) -> "Classes":
        """From the file ``path``, or without one all that the annotations name, in alphabetical order.

        Raises :class:`UserError` if there has to be such a file, or it cannot be used.
        """
        if path is None and format == "yolo":
            raise UserError(
                f"{records[0].where}: YOLO files number the classes. Name them: --classes FILE, with one name per line "
                "from class 0, or the data.yaml that training with YOLO used."
            )
        if path is None:
            names = sorted({item.label for record in records for item in record.objects})
            return cls(names, {name: number for number, name in enumerate(names)})
        labels, names = _read_classes(path)
        if twice := [name for name, uses in Counter(names).items() if uses > 1]:
            raise UserError(f"{path}: the class {twice[0]!r} is listed twice.")
        keys = map(str, range(len(names))) if format == "yolo" else labels
        return cls(names, {key: number for number, key in enumerate(keys)})


def _read_classes(path: Path) -> tuple[list[str], list[str]]:
    """The labels that annotations use, and the names to write: the same, but in a CSV of two columns."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() in (".yaml", ".yml"):
            listed = _names_in_yaml(path, yaml.safe_load(text))
        elif path.suffix.lower() == ".csv":
            rows = [row for row in csv.reader(text.splitlines()) if row]
            return [row[0].strip() for row in rows], [row[-1].strip() for row in rows]
        else:
            listed = [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: the list of classes cannot be read: {error}.") from None
    if not listed:
        raise UserError(f"{path}: no names of classes in it.")
    return listed, listed


def _names_in_yaml(path: Path, content: Any) -> list[str]:
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list):
        raise UserError(f"{path}: it has no list `names`, or one whose numbers do not go from 0 without gaps.")
    return [str(name) for name in names]
