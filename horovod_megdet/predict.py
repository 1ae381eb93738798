"""Detections of a trained checkpoint in any images."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from horovod_megdet.data.images import IMAGE_SUFFIXES, ImageFileError
from horovod_megdet.errors import UserError
from horovod_megdet.evaluation.detections import Arrays, Detections
from horovod_megdet.files import atomic_write
from horovod_megdet.inference import load

DETECTIONS_FILE = "detections.json"


def predict_images(
    checkpoint: str | Path,
    images: list[Path],
    output: Path,
    score_threshold: float | None,
    device: str | torch.device,
    settings: Sequence[str] = (),
) -> Path:
    """Writes the detections in some images to a JSON in COCO format, and each image with its detections drawn on it.

    Args:
        checkpoint: a checkpoint folder, or a run directory for its newest checkpoint.
        images: image files, and folders of images (subfolders are ignored).
        output: folder for ``detections.json`` and one PNG per image. The JSON has ``images``, ``categories`` and
            ``annotations`` with ``score``: a complete COCO file whose ``annotations`` alone are COCO's results format.
        score_threshold: detections with a lower score are left out; None leaves it to ``settings``.
        device: where the detector runs: ``cpu``, ``cuda`` or ``cuda:1``.
        settings: other values of the checkpoint's configuration, such as ``evaluation.flip=true``.

    Returns the path of the JSON. Raises :class:`UserError` immediately for a bad checkpoint, score, device or setting,
    and where a picture would replace one of the images; for missing or unreadable images, with a sentence for each,
    after all other images are done and written.
    """
    detector = load(checkpoint, device, score_threshold, settings)
    files, problems = _find_images(images)
    named = _with_picture_names(files)
    _check_nothing_is_replaced(files, [output / name for _, name in named])
    entries: list[dict[str, Any]] = []
    detections: list[tuple[int, Arrays]] = []
    for path, name in track(named, "predicting", console=Console(stderr=True)):
        try:
            [found] = detector.detect([path])
            picture = found.draw()
        except ImageFileError as error:
            problems.append(f"{error}.")
            continue
        height, width = found.size
        entries.append({"id": len(entries) + 1, "file_name": str(path), "height": height, "width": width})
        detections.append((len(entries), (found.boxes, found.scores, found.labels)))
        with atomic_write(output / name) as file:
            picture.save(file, format="PNG")
    ids = detector.category_ids
    categories = [{"id": id, "name": name} for id, name in zip(ids, detector.class_names, strict=True)]
    annotations = Detections.of_images(detections).to_annotations(ids)
    with atomic_write(output / DETECTIONS_FILE) as file:
        file.write(json.dumps({"images": entries, "categories": categories, "annotations": annotations}).encode())
    if problems:
        raise UserError("\n".join(problems))
    return output / DETECTIONS_FILE


def _find_images(paths: list[Path]) -> tuple[list[Path], list[str]]:
    """The image files that the paths lead to, and a sentence for each path that leads to none."""
    files, problems = [], []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
            if not found:
                problems.append(f"{path}: there are no images in this folder.")
            files += found
        else:
            files.append(path)
    return files, problems


def _check_nothing_is_replaced(files: list[Path], pictures: list[Path]) -> None:
    images = {path.resolve() for path in files}
    for picture in pictures:
        if picture.resolve() in images:
            raise UserError(
                f"{picture}: this image would be replaced by a picture of its detections. Give --output another folder."
            )


def _with_picture_names(files: list[Path]) -> list[tuple[Path, str]]:
    """Each file with the name of its PNG; duplicate names get a number."""
    taken: set[str] = set()
    named = []
    for path in files:
        name, number = f"{path.stem}.png", 1
        while name in taken:
            number += 1
            name = f"{path.stem}_{number}.png"
        taken.add(name)
        named.append((path, name))
    return named
