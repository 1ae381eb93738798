"""Where a data set of another format is: its annotation files, its images, and which image belongs to which."""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from horovod_megdet.data.images import IMAGE_SUFFIXES
from horovod_megdet.data.importing.classes import CLASS_FILES, CLASSES_FILE
from horovod_megdet.data.importing.formats import SUFFIXES, Bad, Record
from horovod_megdet.errors import UserError
from horovod_megdet.wording import count, some

NO_LABELS = {CLASSES_FILE, "labels.txt", "train.txt", "val.txt", "valid.txt", "test.txt"}
"""Text files beside YOLO's that hold no boxes; so do those whose names begin with `readme`."""

Names = dict[str, list[str]]


@dataclass(frozen=True)
class Source:
    """Where to find what is imported."""

    annotations: Path
    """A folder, or one annotation file."""
    images: Path
    """Folder of the images; their names in the COCO JSON are relative to it."""
    format: str | None = None
    """A key of :data:`~horovod_megdet.data.importing.formats.SUFFIXES`; None finds out."""
    classes: Path | None = None
    """File with the names of the classes."""
    output: Path | None = None
    """Folder that is written to: nothing is read from it."""

    @classmethod
    def find(cls, path: Path, images: Path | None, format: str | None, classes: Path | None, output: Path) -> "Source":
        """From the folder of a data set, with the usual names of the folders in it.

        Raises :class:`UserError` if there is no such file or folder, or ``output`` is one of them.
        """
        if not path.exists():
            raise UserError(f"{path}: no such file or folder.")
        folder = path if path.is_dir() else path.parent
        annotations = path
        if path.is_dir():
            annotations = next((path / name for name in ("Annotations", "labels") if (path / name).is_dir()), path)
        if images is None:
            images = next((folder / name for name in ("JPEGImages", "images") if (folder / name).is_dir()), folder)
        if not images.is_dir():
            raise UserError(f"{images}: no such folder of images.")
        if output.resolve() in {folder.resolve(), annotations.resolve(), images.resolve()}:
            raise UserError(f"{output}: the data set is in this folder. Give --output a folder of its own.")
        if classes is None:
            classes = next((folder / name for name in CLASS_FILES if (folder / name).is_file()), None)
        return cls(annotations, images, format, classes, output)


def _walk(folder: Path, output: Path | None) -> Iterator[Path]:
    """All files below a folder, except hidden ones and what earlier imports wrote."""
    written = output.resolve() if output else None
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and Path(parent, name).resolve() != written
        )
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def image_names(source: Source) -> list[str]:
    files = (file for file in _walk(source.images, source.output) if file.suffix.lower() in IMAGE_SUFFIXES)
    return [file.relative_to(source.images).as_posix() for file in files]


def annotation_files(source: Source) -> list[Path]:
    """The annotation files, all of one suffix."""
    path = source.annotations
    wanted = {SUFFIXES[source.format]} if source.format else set(SUFFIXES.values())
    by_suffix: dict[str, list[Path]] = defaultdict(list)
    for file in _walk(path, source.output) if path.is_dir() else [path]:
        suffix = file.suffix.lower()
        if suffix in wanted and not (suffix == ".txt" and _holds_no_labels(file)) and file != source.classes:
            by_suffix[suffix].append(file)
    if not by_suffix:
        formats = ", ".join(f"{suffix} ({name})" for name, suffix in SUFFIXES.items())
        raise UserError(f"{path}: no annotation files in it; known are {formats}.")
    if len(by_suffix) > 1:
        listed = [f"{len(files)} {suffix} ({files[0]})" for suffix, files in by_suffix.items()]
        raise UserError(
            f"{path}: files of several formats: {', '.join(listed)}. Say which to read: --format "
            f"{' or '.join(name for name, suffix in SUFFIXES.items() if suffix in by_suffix)}."
        )
    return next(iter(by_suffix.values()))


def _holds_no_labels(file: Path) -> bool:
    return file.name.lower() in NO_LABELS or file.name.lower().startswith("readme")


def find_images(
    source: Source, records: list[Record], names: list[str], bad: list[Bad]
) -> tuple[list[tuple[str, Record]], set[str]]:
    """Each record with the name of its image file, of which ``names`` are all; and all files that a record could mean.

    Records without an image file, with several, or with one that is taken become bad.
    """
    by_path, by_name = _indices(names)
    taken: dict[str, Record] = {}
    mentioned: set[str] = set()
    for record in records:
        files = _files_of(source, record, by_path, by_name)
        mentioned.update(files)
        if not files:
            bad.append(Bad("missing images", record.where, f"there is no image {record.image!r} in {source.images}"))
        elif len(files) > 1:
            message = f"{count(len(files), 'image file')} could be {record.image!r}: {some(files)}"
            bad.append(Bad("images of one name", record.where, message))
        elif files[0] in taken:
            message = f"the image {files[0]} has annotations in {taken[files[0]].where} already"
            bad.append(Bad("images of one name", record.where, message))
        else:
            taken[files[0]] = record
    return list(taken.items()), mentioned


def _indices(names: list[str]) -> tuple[Names, Names]:
    """The image files by path and by name alone, both with and without suffix."""
    by_path: Names = defaultdict(list)
    by_name: Names = defaultdict(list)
    for name in names:
        path = Path(name)
        for key in {name, path.with_suffix("").as_posix()}:
            by_path[key].append(name)
        for key in {path.name, path.stem}:
            by_name[key].append(name)
    return by_path, by_name


def _files_of(source: Source, record: Record, by_path: Names, by_name: Names) -> list[str]:
    """The image files that a record can mean.

    Beside its annotations, in the same folder below that of images, by its path in it, or else by its name anywhere.
    """
    beside = os.path.relpath(record.folder / record.image, source.images)
    alike = os.path.relpath(record.folder / record.image, source.annotations)
    for path in (Path(beside).as_posix(), Path(alike).as_posix(), record.image):
        if path in by_path:
            return by_path[path]
    return by_name.get(Path(record.image).name, [])
