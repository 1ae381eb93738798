"""A data set in COCO format: a COCO JSON and a folder of images, checked once and held compactly."""

import contextlib
import hashlib
import io
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from horovod_megdet.data.annotations import Annotations, CheckImages, Problem, read_annotations
from horovod_megdet.data.images import read_image
from horovod_megdet.errors import UserError
from horovod_megdet.wording import some

SHOWN_PROBLEMS = 5
"""Problems that an error message lists; `megdet check-data` lists all of them."""


class CocoDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Images with their boxes; made by :func:`load_dataset`.

    Label ``k + 1`` stands for the category ``category_ids[k]``; label 0 is the background. Everything is held in a few
    numpy arrays, so that each loader worker's copy is small.
    """

    def __init__(self, found: Annotations, images: Path, *, training: bool, annotations: Path | None = None) -> None:
        self.image_folder = images
        self.annotations = annotations
        """The JSON file."""
        self.training = training
        self.category_ids = found.category_ids
        """Category ids in the JSON, sorted."""
        self.class_names = found.class_names
        """In the order of `category_ids`."""
        self.image_ids = found.image_ids
        """int64 (n,), ids in the JSON."""
        self.file_names = found.file_names
        """(n,), relative to `image_folder`."""
        self.sizes = found.sizes
        """int32 (n, 2), (height, width) in pixels after EXIF orientation."""
        self.problems = found.problems
        """What was skipped, and why."""
        self._first_box = found.first_box
        self._boxes = found.boxes
        self._labels = found.labels
        self._areas = found.areas
        self._crowd = found.crowd
        self.fingerprint = self._fingerprint()
        """SHA-256 of ids, names, sizes and annotations: equal on all hosts if, and only if, they have the same data."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`read`."""
        return self.read(index)

    def read(self, index: int, at_least: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """An image with its boxes; in a training set without crowd regions.

        Returns the image as uint8 (3, height, width) RGB, boxes as float32 (k, 4) xyxy in pixels of the full image,
        clipped to it, and labels as int64 (k,). With ``at_least`` = (height, width) the image may come at a fraction
        of its size, see :func:`~horovod_megdet.data.images.read_image`; the boxes do not change.

        Raises :class:`~horovod_megdet.data.images.ImageFileError` naming the file.
        """
        image = read_image(self.path(index), at_least)
        height, width = self.sizes[index]
        rows = slice(self._first_box[index], self._first_box[index + 1])
        boxes, labels = self._boxes[rows], self._labels[rows]
        if self.training:
            boxes, labels = boxes[~self._crowd[rows]], labels[~self._crowd[rows]]
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        corners = corners.clip(0, [width, height, width, height])
        return image, torch.from_numpy(corners.astype(np.float32)), torch.from_numpy(labels.copy())

    def path(self, index: int) -> Path:
        """The image file."""
        return self.image_folder / str(self.file_names[index])

    def to_coco(self) -> COCO:
        """The valid annotations, including crowd regions, for pycocotools; image and category ids are the JSON's.

        Annotation ids count from 1, because to pycocotools a match with an annotation of id 0 is no match.
        """
        image_of_box = np.repeat(self.image_ids, np.diff(self._first_box)).tolist()
        boxes, areas = self._boxes.tolist(), self._areas.tolist()
        coco = COCO()
        coco.dataset = {
            "images": [
                {"id": id, "file_name": name, "height": height, "width": width}
                for id, name, (height, width) in zip(
                    self.image_ids.tolist(), self.file_names.tolist(), self.sizes.tolist(), strict=True
                )
            ],
            "categories": [
                {"id": id, "name": name} for id, name in zip(self.category_ids, self.class_names, strict=True)
            ],
            "annotations": [
                {
                    "id": index + 1,
                    "image_id": image_of_box[index],
                    "category_id": self.category_ids[label - 1],
                    "bbox": boxes[index],
                    "area": areas[index],
                    "iscrowd": int(self._crowd[index]),
                }
                for index, label in enumerate(self._labels.tolist())
            ],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.category_ids, self.class_names, self.file_names.tolist())).encode())
        for array in (self.image_ids, self.sizes, self._first_box, self._boxes, self._labels, self._areas, self._crowd):
            digest.update(array.tobytes())
        return digest.hexdigest()


def load_dataset(
    annotations: str | Path,
    images: str | Path,
    *,
    training: bool,
    keep_empty: bool = False,
    bad: Literal["error", "skip"] = "error",
    check_images: CheckImages = "open",
) -> CocoDataset:
    """Reads and checks a COCO JSON and its folder of images.

    ``training`` leaves out crowd regions, images with only crowd regions or bad annotations and, without
    ``keep_empty``, images without annotations; evaluation keeps all images. ``bad`` says whether bad entries and image
    files raise one error, or are skipped and listed in ``problems``. ``check_images`` says whether to read only the
    header of each image file, or to decode all of it.

    Raises :class:`UserError` if there are problems, or no image remains.
    """
    annotations, images = Path(annotations), Path(images)
    found = read_annotations(annotations, images, check_images)
    if found.problems and bad == "error":
        raise UserError(describe_problems(annotations, found.problems))
    if training:
        found = _trainable(found, keep_empty)
    if len(found.image_ids) == 0:
        raise UserError(_describe_nothing_left(annotations, found.problems, training))
    return CocoDataset(found, images, training=training, annotations=annotations)


def check_dataset(annotations: str | Path, images: str | Path, check_images: CheckImages = "decode") -> list[Problem]:
    """All bad entries of a COCO JSON, and all bad image files.

    Raises :class:`UserError` if the file or the folder cannot be used at all.
    """
    return read_annotations(Path(annotations), Path(images), check_images).problems


def check_same_classes(train: CocoDataset, val: CocoDataset) -> None:
    """Raises :class:`UserError` unless both sets have the same categories, by id and name."""
    in_train = dict(zip(train.category_ids, train.class_names, strict=True))
    in_val = dict(zip(val.category_ids, val.class_names, strict=True))
    if in_train == in_val:
        return
    only_train = [f"{id} {name!r}" for id, name in in_train.items() if in_val.get(id) != name]
    only_val = [f"{id} {name!r}" for id, name in in_val.items() if in_train.get(id) != name]
    raise UserError(
        f"{train.annotations} and {val.annotations} have different categories: "
        f"{some(only_train) or 'none'} only in the first, {some(only_val) or 'none'} only in the second. "
        "Give both files the same list `categories`."
    )


def describe_problems(annotations: Path, problems: list[Problem]) -> str:
    """One message with the first few problems, and how many there are."""
    noun = "problem" if len(problems) == 1 else "problems"
    lines = [f"{annotations}: {len(problems)} {noun} in the annotations or image files:"]
    lines += [f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  ... and {len(problems) - SHOWN_PROBLEMS} more")
    lines.append("`megdet check-data` lists all of them; `data.bad_annotations: skip` leaves them out.")
    return "\n".join(lines)


def _trainable(found: Annotations, keep_empty: bool) -> Annotations:
    """Only the images to train on, with their boxes."""
    image_of_box = np.repeat(np.arange(len(found.image_ids)), np.diff(found.first_box))
    objects = np.bincount(image_of_box[~found.crowd], minlength=len(found.image_ids))
    keep = objects > 0
    if keep_empty:
        # An image with only crowd regions or bad boxes is not empty: it would teach that objects are background.
        keep |= ~found.annotated
    return found.select(keep)


def _describe_nothing_left(annotations: Path, problems: list[Problem], training: bool) -> str:
    if problems:
        return f"{annotations}: no image is left.\n{describe_problems(annotations, problems)}"
    if training:
        return f"{annotations}: no image has annotations; `data.keep_empty_images: true` trains on images without any."
    return f"{annotations}: no image is left."
