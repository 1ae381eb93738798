"""A data set in COCO format: a COCO JSON and a folder of images, checked once and held compactly."""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from horovod_megdet.data.annotation_cache import Source
from horovod_megdet.data.annotations import Annotations, Problem, to_corners
from horovod_megdet.data.image_files import CheckImages
from horovod_megdet.data.images import FRACTIONS, ImageFileError, read_image
from horovod_megdet.data.reading import ALONE, Ranks, read_annotations
from horovod_megdet.errors import UserError
from horovod_megdet.wording import count, some

SHOWN_PROBLEMS = 5
"""Problems that an error message lists; `megdet check-data` lists all of them."""

ROWS_AT_A_TIME = 1 << 16
"""Boxes that are copied at a time to be hashed: a copy of all of them would be as large as what is mapped."""


class CocoDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Images with their boxes; made by :func:`load_dataset`.

    Label ``k + 1`` stands for the category ``category_ids[k]``; label 0 is the background. The large arrays are mapped
    from a file where possible: all ranks of a host and their loader workers share them.
    """

    def __init__(
        self, found: Annotations, source: Source, *, training: bool, kept: NDArray[np.int64] | None = None
    ) -> None:
        """``kept`` holds the indices of the images that belong to the set; None stands for all."""
        if kept is not None and len(kept) == len(found.image_ids):
            kept = None
        self.image_folder = source.images
        self.annotations = source.annotations
        """The JSON file."""
        self.training = training
        self.category_ids = found.category_ids
        """Category ids in the JSON, sorted."""
        self.class_names = found.class_names
        """In the order of `category_ids`."""
        self.image_ids = found.image_ids if kept is None else found.image_ids[kept]
        """int64 (n,), ids in the JSON."""
        self.sizes = found.sizes if kept is None else found.sizes[kept]
        """int32 (n, 2), (height, width) in pixels after EXIF orientation."""
        self.problems = found.problems
        """What was skipped, and why."""
        self._found, self._kept = found, kept
        self.fingerprint = self._fingerprint()
        """SHA-256 of ids, names, sizes and annotations: equal on all hosts if, and only if, they have the same data."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def read(self, index: int, at_least: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """An image with its boxes; in a training set without crowd regions.

        Returns the image as uint8 (3, height, width) RGB, boxes as float32 (k, 4) xyxy in pixels of the full image,
        clipped to it, and labels as int64 (k,). With ``at_least`` = (height, width) the image may come at a fraction
        of its size, see :func:`~horovod_megdet.data.images.read_image`; the boxes do not change.

        Raises :class:`~horovod_megdet.data.images.ImageFileError` naming the file, also if it has another size by now.
        """
        image = read_image(self.path(index), at_least)
        height, width = self.sizes[index].tolist()
        if image.shape[1:] not in [(-(-height // part), -(-width // part)) for part in FRACTIONS]:
            found_height, found_width = image.shape[1:]
            raise ImageFileError(
                f"{self.path(index)}: the image has {found_width} x {found_height} pixels, and not {width} x {height} "
                "as at the start"
            )
        found, place = self._found, self._place(index)
        rows = found.boxes_of(place)
        boxes, labels = found.boxes[rows], found.labels[rows]
        if self.training:
            boxes, labels = boxes[~found.crowd[rows]], labels[~found.crowd[rows]]
        corners = to_corners(boxes).clip(0, [width, height, width, height])
        return image, torch.from_numpy(corners.astype(np.float32)), torch.from_numpy(labels.copy())

    def crowd(self, index: int) -> NDArray[np.bool_]:
        """Which boxes of an image in a set for evaluation are crowd regions, in the order of :meth:`read`."""
        return self._found.crowd[self._found.boxes_of(self._place(index))]

    def path(self, index: int) -> Path:
        """The image file."""
        return self.image_folder / self.file_name(index)

    def file_name(self, index: int) -> str:
        """The image file, relative to `image_folder`."""
        return str(self._found.file_names[self._place(index)])

    @property
    def ground_truth(self) -> Annotations:
        """The valid annotations of these images, including crowd regions; ids are those of the JSON."""
        return self._found if self._kept is None else self._found.select(self._is_kept())

    def _place(self, index: int) -> int:
        return index if self._kept is None else int(self._kept[index])

    def _is_kept(self) -> NDArray[np.bool_]:
        kept = np.ones(len(self._found.image_ids), bool)
        if self._kept is not None:
            kept[:] = False
            kept[self._kept] = True
        return kept

    def _fingerprint(self) -> str:
        found, kept = self._found, self._is_kept()
        counts = np.diff(found.first_box)
        names = found.file_names[kept].tolist()
        digest = hashlib.sha256(repr((self.category_ids, self.class_names, names)).encode())
        first_box = np.concatenate([[0], np.cumsum(counts[kept])])
        for array in (self.image_ids, self.sizes, first_box):
            digest.update(np.ascontiguousarray(array).data)
        boxes_kept = np.repeat(kept, counts)
        for array in (found.boxes, found.labels, found.areas, found.crowd):
            for start in range(0, len(array), ROWS_AT_A_TIME):
                rows = slice(start, start + ROWS_AT_A_TIME)
                digest.update(array[rows][boxes_kept[rows]].data)
        return digest.hexdigest()


def load_dataset(
    annotations: str | Path,
    images: str | Path,
    *,
    training: bool,
    keep_empty: bool = False,
    bad: Literal["error", "skip"] = "error",
    check_images: CheckImages = "open",
    cache_dir: Path | None = None,
    ranks: Ranks = ALONE,
) -> CocoDataset:
    """Reads and checks a COCO JSON and its folder of images. Collective over ``ranks``.

    ``training`` leaves out crowd regions, images with only crowd regions or bad annotations and, without
    ``keep_empty``, images without annotations; evaluation keeps all images. ``bad`` says whether bad entries and image
    files raise one error, or are skipped and listed in ``problems``. ``check_images`` says whether to read the header
    of each new image file, to decode all of it, or to trust the sizes in the JSON. The result is kept in ``cache_dir``,
    by default beside the JSON or else in the user's cache folder.

    Raises :class:`UserError` if there are problems, or no image remains.
    """
    source = Source(Path(annotations), Path(images), check_images, cache_dir)
    found = read_annotations(source, ranks)
    with ranks.agreement("data"):
        if found.problems and bad == "error":
            raise UserError(describe_problems(source, found.problems))
        kept = _trainable(found, keep_empty) if training else np.arange(len(found.image_ids))
        if len(kept) == 0:
            raise UserError(_describe_nothing_left(source, found.problems, training))
    return CocoDataset(found, source, training=training, kept=kept)


def check_dataset(
    annotations: str | Path,
    images: str | Path,
    check_images: CheckImages = "decode",
    cache_dir: Path | None = None,
) -> list[Problem]:
    """All bad entries of a COCO JSON, and all bad image files.

    Raises :class:`UserError` if the file or the folder cannot be used at all.
    """
    return read_annotations(Source(Path(annotations), Path(images), check_images, cache_dir)).problems


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


def describe_problems(source: Source, problems: list[Problem]) -> str:
    """One message with the first few problems, and how many there are."""
    found = count(len(problems), "problem")
    lines = [f"{source.annotations}: {found} in the annotations or the image files in {source.images}:"]
    lines += [f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  ... and {len(problems) - SHOWN_PROBLEMS} more")
    lines.append("`megdet check-data` lists all of them; `data.bad_annotations: skip` leaves them out.")
    return "\n".join(lines)


def _trainable(found: Annotations, keep_empty: bool) -> NDArray[np.int64]:
    """Indices of the images to train on."""
    objects = np.bincount(found.image_of_box[~found.crowd], minlength=len(found.image_ids))
    keep = objects > 0
    if keep_empty:
        # An image with only crowd regions or bad boxes is not empty: it would teach that objects are background.
        keep |= ~found.annotated
    return np.flatnonzero(keep)


def _describe_nothing_left(source: Source, problems: list[Problem], training: bool) -> str:
    if problems:
        return f"{source.annotations}: no image is left.\n{describe_problems(source, problems)}"
    if training:
        return (
            f"{source.annotations}: no image has annotations; `data.keep_empty_images: true` trains on images without "
            "any."
        )
    return f"{source.annotations}: no image is left."
