"""Detections of a trained checkpoint in any images."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from horovod_megdet.data.images import IMAGE_SUFFIXES, ImageFileError, read_image
from horovod_megdet.data.transforms import DetectionTransform, build_transform
from horovod_megdet.engine import checkpoint as checkpoints
from horovod_megdet.errors import UserError
from horovod_megdet.evaluation.detections import Arrays, Detections, in_original_pixels
from horovod_megdet.files import atomic_write
from horovod_megdet.models.detector import Detector, build_detector
from horovod_megdet.report.pictures import draw_detections

DETECTIONS_FILE = "detections.json"


def predict_images(
    checkpoint: str | Path, images: list[Path], output: Path, score_threshold: float, device: str | torch.device
) -> Path:
    """Writes the detections in some images to a JSON in COCO format, and each image with its detections drawn on it.

    Args:
        checkpoint: a checkpoint folder, or a run directory for its newest checkpoint.
        images: image files, and folders of images (subfolders are ignored).
        output: folder for ``detections.json`` and one PNG per image. The JSON has ``images``, ``categories`` and
            ``annotations`` with ``score``: a complete COCO file whose ``annotations`` alone are COCO's results format.
        score_threshold: detections with a lower score are left out.
        device: where the detector runs: ``cpu``, ``cuda`` or ``cuda:1``.

    Returns the path of the JSON. Raises :class:`UserError` immediately for a bad checkpoint, score or device; for
    missing or unreadable images, with a sentence for each, after all other images are done and written.
    """
    if not 0 <= score_threshold <= 1:
        raise UserError(f"The lowest score must be between 0 and 1, not {score_threshold:g}.")
    saved = checkpoints.read(checkpoint)
    config, class_names = saved.config, saved.run.class_names
    model = config.model.model_copy(update={"weights": "none", "score_threshold": score_threshold})
    detector = build_detector(model, config.batch_norm, len(class_names))
    detector.load_state_dict(saved.weights())
    detector.to(_checked(device)).eval()
    transform = build_transform(config.data, training=False)

    files, problems = _find_images(images)
    entries: list[dict[str, Any]] = []
    detections: list[tuple[int, Arrays]] = []
    for path, name in track(_with_picture_names(files), "predicting", console=Console(stderr=True)):
        try:
            image = read_image(path)
        except ImageFileError as error:
            problems.append(f"{error}.")
            continue
        found = _predict(detector, transform, path, _size(image))
        height, width = image.shape[-2:]
        entries.append({"id": len(entries) + 1, "file_name": str(path), "height": height, "width": width})
        detections.append((len(entries), found))
        _write_picture(output / name, image, found, class_names)
    categories = [{"id": id, "name": name} for id, name in zip(saved.run.category_ids, class_names, strict=True)]
    annotations = Detections.of_images(detections).to_annotations(saved.run.category_ids)
    with atomic_write(output / DETECTIONS_FILE) as file:
        file.write(json.dumps({"images": entries, "categories": categories, "annotations": annotations}).encode())
    if problems:
        raise UserError("\n".join(problems))
    return output / DETECTIONS_FILE


def _checked(device: str | torch.device) -> torch.device:
    try:
        return torch.zeros((), device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise UserError(f"The device {str(device)!r} cannot be used: {reason}. Use cpu instead.") from None


def _write_picture(path: Path, image: Tensor, found: Arrays, class_names: list[str]) -> None:
    boxes, scores, labels = found
    with atomic_write(path) as file:
        draw_detections(image, boxes, labels, scores, class_names).save(file, format="PNG")


@torch.inference_mode()
def _predict(detector: Detector, transform: DetectionTransform, path: Path, size: tuple[int, int]) -> Arrays:
    # Read again and resized like the images of an evaluation, so that the detections are the same.
    generator = torch.Generator()
    new_size = transform.draw_size(size, generator)
    resized, _ = transform.apply(read_image(path, new_size), torch.zeros(0, 4), size, new_size, generator)
    device = next(detector.parameters()).device
    return in_original_pixels(detector.predict([resized.to(device)])[0], new_size, size)


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


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
