"""Detections in many images as a few flat arrays."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from horovod_megdet.files import atomic_write

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Boxes float32 (k, 4) xyxy, scores float32 (k,), labels int32 (k,)."""


class Result(msgspec.Struct, gc=False):
    """A detection in COCO's results format."""

    image_id: int
    category_id: int
    bbox: list[float]
    """x, y, width, height in pixels of the original image."""
    score: float


@dataclass(frozen=True)
class Detections:
    """Detections in a set of images: 24 bytes each, where a Python list of dicts would take a kilobyte.

    The detections of an image are consecutive, best score first; the images are in the order of ``image_ids``.
    """

    image_ids: np.ndarray
    """int64 (images,): ids of the JSON, including those of images without detections."""

    counts: np.ndarray
    """int64 (images,): number of detections in each image."""

    boxes: np.ndarray
    """float32 (n, 4): x1, y1, x2, y2 in pixels of the original image."""

    scores: np.ndarray
    """float32 (n,)."""

    labels: np.ndarray
    """int32 (n,): label k + 1 stands for category_ids[k]."""

    @classmethod
    def of_images(cls, images: Iterable[tuple[int, Arrays]]) -> "Detections":
        """Packs (image id, (boxes, scores, labels)) pairs, sorted by image id."""
        pairs = sorted(images, key=lambda pair: pair[0])
        empty = (np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
        boxes, scores, labels = zip(empty, *(arrays for _, arrays in pairs), strict=True)
        return cls(
            np.array([image_id for image_id, _ in pairs], np.int64),
            np.array([len(part) for part in scores[1:]], np.int64),
            np.concatenate(boxes),
            np.concatenate(scores),
            np.concatenate(labels),
        )

    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The same as two tables: int64 (images, 2) with id and count, float32 (n, 6) with box, score and label."""
        images = np.stack([self.image_ids, self.counts], axis=1)
        # Labels are exact as float32: there are far fewer than 2^24 classes.
        return images, np.concatenate([self.boxes, self.scores[:, None], self.labels[:, None]], 1, dtype=np.float32)

    @classmethod
    def from_rows(cls, images: NDArray[np.int64], found: NDArray[np.float32]) -> "Detections":
        """Detections from the :meth:`rows` of one or several shards, one below the other, sorted by image id."""
        order = np.argsort(images[:, 0], kind="stable")
        image_ids, counts = images[order].T
        starts = np.cumsum(images[:, 1]) - images[:, 1]
        new_starts = np.cumsum(counts) - counts
        found = found[np.repeat(starts[order] - new_starts, counts) + np.arange(len(found))]
        return cls(image_ids, counts, found[:, :4], found[:, 4], found[:, 5].astype(np.int32))

    def per_image(self) -> list[tuple[int, Arrays]]:
        """(image id, (boxes, scores, labels)) for each image; the arrays are views."""
        ends = np.cumsum(self.counts)[:-1]
        split = (np.split(array, ends) for array in (self.boxes, self.scores, self.labels))
        return list(zip(self.image_ids.tolist(), zip(*split, strict=True), strict=True)) if len(self.counts) else []

    def above(self, score_threshold: float) -> "Detections":
        """The detections with a score of at least ``score_threshold``, in the same images."""
        keep = self.scores >= score_threshold
        owner = np.repeat(np.arange(len(self.counts)), self.counts)
        counts = np.bincount(owner[keep], minlength=len(self.counts))
        return Detections(self.image_ids, counts, self.boxes[keep], self.scores[keep], self.labels[keep])

    def rounded(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Boxes (n, 4) x, y, width, height, rounded to 0.001 pixels, and scores (n,), rounded to 1e-7."""
        corners = self.boxes.astype(np.float64)
        xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        return xywh.round(3), self.scores.astype(np.float64).round(7)

    def results(self, category_ids: list[int]) -> list[Result]:
        """COCO's results; boxes and scores are :meth:`rounded`, which halves a file of them."""
        xywh, scores = self.rounded()
        return [
            Result(*values)
            for values in zip(
                np.repeat(self.image_ids, self.counts).tolist(),
                np.asarray(category_ids, np.int64)[self.labels - 1].tolist(),
                xywh.tolist(),
                scores.tolist(),
                strict=True,
            )
        ]

    def write(self, path: str | Path, category_ids: list[int]) -> None:
        """Writes COCO's results JSON, in one step."""
        with atomic_write(path) as file:
            file.write(msgspec.json.encode(self.results(category_ids)))

    def to_coco(self, category_ids: list[int]) -> list[dict[str, Any]]:
        """:meth:`results` as dicts."""
        return [msgspec.structs.asdict(result) for result in self.results(category_ids)]

    def to_annotations(self, category_ids: list[int]) -> list[dict[str, Any]]:
        """:meth:`to_coco` with the other keys of a COCO data set's annotations: id (from 1), area, iscrowd."""
        results = self.to_coco(category_ids)
        for number, result in enumerate(results, start=1):
            width, height = result["bbox"][2:]
            result.update(id=number, area=width * height, iscrowd=0)
        return results


def in_original_pixels(prediction: dict[str, Tensor], size: tuple[int, int], original_size: tuple[int, int]) -> Arrays:
    """Boxes, scores and labels of one image, as compact arrays, with the boxes scaled back to the original image.

    Args:
        prediction: ``boxes`` float (k, 4) xyxy in pixels of the resized image, ``scores`` (k,), ``labels`` (k,).
        size: (height, width) of the resized image.
        original_size: (height, width) of the original image.
    """
    scale_y, scale_x = original_size[0] / size[0], original_size[1] / size[1]
    boxes = prediction["boxes"].float().cpu().numpy() * np.array([scale_x, scale_y] * 2, np.float32)
    scores = prediction["scores"].float().cpu().numpy()
    order = np.argsort(-scores, kind="stable")
    return boxes[order], scores[order], prediction["labels"].cpu().numpy().astype(np.int32)[order]
