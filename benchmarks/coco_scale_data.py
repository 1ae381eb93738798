"""A data set of COCO's size, made of a few pictures and hard links to them: ``make(folder)``."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from horovod_megdet.data.synthetic import draw_image
from horovod_megdet.evaluation.detections import Arrays, Detections

SPLITS = {"train": 118_287, "val": 5_000}
"""Images of COCO's 2017 splits."""
BOXES_PER_IMAGE = 6.7
"""Mean, as much as COCO has after its images without boxes are left out."""
POLYGON_POINTS = 22
"""Points of each polygon: with them the JSON has the 417 MB of a training set of COCO's size."""
PICTURES = 64
"""Different files; a file system allows some ten thousand hard links to one."""
SIZES = ((480, 640), (640, 480), (427, 640))
"""(height, width) of the pictures."""
DETECTIONS_PER_IMAGE = 74
"""370 thousand detections in 5,000 images."""


def make(folder: Path, photos: Path | None = None) -> None:
    """Writes the data set to ``folder`` unless it is there; takes minutes, and 0.5 GB with what the links share.

    ``photos`` is a folder of JPEG files to use instead of generated pictures.
    """
    if (folder / "complete").exists():
        return
    pictures = _pictures(folder, photos)
    for split, count in SPLITS.items():
        images = folder / split
        images.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            target = images / _file_name(number)
            if not target.exists():
                os.link(pictures[number % len(pictures)], target)
        sizes = [_size(picture) for picture in pictures]
        with (folder / f"{split}.json").open("w", encoding="utf-8") as file:
            file.writelines(_json(count, sizes))
    (folder / "complete").touch()


def detections(image_ids: np.ndarray, classes: int, seed: int = 0) -> Detections:
    """Random detections, ``DETECTIONS_PER_IMAGE`` in each of the images."""
    random = np.random.default_rng(seed)

    def arrays() -> Arrays:
        corners = random.uniform(0, 400, (DETECTIONS_PER_IMAGE, 2))
        boxes = np.concatenate([corners, corners + random.uniform(4, 240, corners.shape)], axis=1)
        labels = random.integers(1, classes + 1, len(boxes))
        scores = -np.sort(-random.random(len(boxes)))
        return boxes.astype(np.float32), scores.astype(np.float32), labels.astype(np.int32)

    return Detections.of_images((int(image_id), arrays()) for image_id in image_ids)


def _file_name(number: int) -> str:
    return f"{number + 1:012d}.jpg"


def _pictures(folder: Path, photos: Path | None) -> list[Path]:
    """The files that all others are links to."""
    own = folder / "pictures"
    own.mkdir(parents=True, exist_ok=True)
    sources = sorted(photos.glob("*.jpg"))[:PICTURES] if photos else []
    for number in range(PICTURES):
        if sources:
            (own / _file_name(number)).write_bytes(sources[number % len(sources)].read_bytes())
            continue
        pixels, _ = draw_image(np.random.default_rng(number))
        height, width = SIZES[number % len(SIZES)]
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        noise = np.random.default_rng(number).normal(0, 9, (height, width, 3))  # as many bytes as a photo has
        Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8)).save(
            own / _file_name(number), quality=92
        )
    return sorted(own.glob("*.jpg"))


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.height, image.width


def _json(count: int, sizes: list[tuple[int, int]]) -> Iterator[str]:
    """The pieces of a COCO JSON as the original's: images with URLs, annotations with polygons, 80 categories."""
    random = np.random.default_rng(count)
    yield '{"info": {"year": 2017}, "licenses": [], "images": ['
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        entry = {
            "license": 3,
            "file_name": _file_name(number),
            "coco_url": f"http://images.cocodataset.org/train2017/{_file_name(number)}",
            "height": height,
            "width": width,
            "date_captured": "2013-11-14 17:02:52",
            "flickr_url": f"http://farm9.staticflickr.com/8186/{number:010d}_cbb8ff4b59_z.jpg",
            "id": number + 1,
        }
        yield (", " if number else "") + json.dumps(entry)
    yield '], "annotations": ['
    first = 1
    for number in range(count):
        entries = list(_annotations(random, number + 1, first, sizes[number % len(sizes)]))
        yield (", " if first > 1 and entries else "") + ", ".join(json.dumps(entry) for entry in entries)
        first += len(entries)
    yield '], "categories": '
    yield json.dumps([{"id": id, "name": f"class {id}", "supercategory": "thing"} for id in range(1, 81)]) + "}"


def _annotations(
    random: np.random.Generator, image_id: int, first: int, size: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    height, width = size
    for number in range(random.poisson(BOXES_PER_IMAGE)):
        x, y = random.uniform(0, (width - 20, height - 20)).round(2).tolist()
        w, h = random.uniform(4, (width - x, height - y)).round(2).tolist()
        points = random.uniform((x, y), (x + w, y + h), (POLYGON_POINTS, 2)).round(2)
        yield {
            "segmentation": [points.ravel().tolist()],
            "area": round(w * h * 0.6, 4),
            "iscrowd": int(random.random() < 0.01),
            "image_id": image_id,
            "bbox": [x, y, w, h],
            "category_id": int(random.integers(1, 81)),
            "id": first + number,
        }
