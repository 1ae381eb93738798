"""`megdet import-data`: a data set of another format becomes COCO JSON files that training reads."""

from pathlib import Path

import numpy as np
import yaml

from horovod_megdet.data.coco import load_dataset
from horovod_megdet.data.importing.classes import CLASSES_FILE
from horovod_megdet.data.importing.conversion import Imported, count_bad, describe_bad, import_annotations
from horovod_megdet.data.importing.source import Source
from horovod_megdet.data.importing.splitting import split_images
from horovod_megdet.errors import UserError
from horovod_megdet.files import atomic_write
from horovod_megdet.report.dataset import Parts, dataset_table, write_dataset_page
from horovod_megdet.report.tables import console
from horovod_megdet.wording import count

PARTS = ("train", "val", "test")
"""Names of the parts, in the order of their fractions."""

PAGE_FILE = "images.html"
BAD_FILE = "bad.txt"
PICTURES = 24
"""Pictures on the page."""


def import_data(source: Source, output: Path, split: tuple[float, ...], seed: int, skip_bad: bool) -> None:
    """Reads, checks, splits and writes; prints a summary and the lines of YAML that use the result.

    Writes into ``output`` one COCO JSON per part, the list of classes, a page of pictures, and the list of what is bad,
    which may be empty. Images stay where they are.

    Raises :class:`UserError` if anything is bad, without ``skip_bad``, or nothing can be used.
    """
    imported = import_annotations(source)
    _write_lines(output / BAD_FILE, [str(problem) for problem in imported.bad])
    if imported.bad and not skip_bad:
        raise UserError(
            f"{source.annotations}: {describe_bad(imported.bad)}\n"
            f"{output / BAD_FILE} lists all of it; --skip-bad leaves it out."
        )
    _write_lines(output / CLASSES_FILE, imported.class_names)
    parts: Parts = {}
    for name, chosen in zip(PARTS, split_images(imported.present(), split, seed), strict=False):
        imported.write_coco(output / f"{name}.json", chosen.tolist())
        parts[name] = load_dataset(output / f"{name}.json", source.images, training=False)
    summary = "\n".join(_sentences(source, imported, output))
    write_dataset_page(
        output / PAGE_FILE, parts, count=PICTURES, title=output.resolve().name, summary=summary.replace("\n", " ")
    )
    console().print(dataset_table(parts))
    print(f"\n{summary}\n\nLook at {output / PAGE_FILE} before you train. The lines for the configuration:\n")
    print(_configuration(source, output, parts))


def _sentences(source: Source, imported: Imported, output: Path) -> list[str]:
    """What a table does not say."""
    images = count(len(imported.images), "image")
    sentences = [f"{images} imported from {source.annotations} ({imported.format}), images in {source.images}."]
    if imported.clipped:
        sentences.append(f"{imported.clipped} of the boxes clipped to the edge of the image.")
    if imported.unannotated:
        sentences.append(f"{count(imported.unannotated, 'image file')} without annotations left out.")
    if imported.bad:
        sentences.append(f"Left out: {count_bad(imported.bad)}; {output / BAD_FILE} lists all of it.")
    return sentences


def _configuration(source: Source, output: Path, parts: Parts) -> str:
    images = str(source.images.resolve())
    data: dict[str, str | bool] = {}
    for name in ("train", "val"):
        if name in parts:
            data[f"{name}_annotations"] = str(output.resolve() / f"{name}.json")
            data[f"{name}_images"] = images
    if (np.diff(parts["train"].ground_truth.first_box) == 0).any():
        data["keep_empty_images"] = True
    return yaml.safe_dump({"data": data}, sort_keys=False)


def _write_lines(path: Path, lines: list[str]) -> None:
    with atomic_write(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
