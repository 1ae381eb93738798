"""What is known about the images of a COCO data set, as arrays."""

import contextlib
import io
import json
from dataclasses import astuple, dataclass, fields, replace
from multiprocessing import context
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO

from horovod_megdet.data.array_file import MappedArrays, names_to_numbers, numbers_to_names


@dataclass(frozen=True)
class Problem:
    """One bad entry of an annotation file, or one bad image file."""

    message: str
    """A sentence without its period, such as `the box [3, 4, 0, 7] has no area`."""
    file: str = ""
    """The image file, if there is one."""
    image: int | None = None
    """Image id."""
    annotation: int | None = None
    """Annotation id."""

    def __str__(self) -> str:
        where = []
        if self.annotation is not None:
            where.append(f"annotation {self.annotation}")
        if self.image is not None:
            where.append(f"image {self.image}" + (f" ({self.file})" if self.file else ""))
        return f"{', '.join(where)}: {self.message}" if where else self.message


def to_corners(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 4) x1, y1, x2, y2 of (n, 4) x, y, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


@dataclass(frozen=True)
class Annotations:
    """The valid entries of an annotation file, as arrays. Boxes are sorted by image."""

    category_ids: list[int]
    """Ids in the file, sorted."""
    class_names: list[str]
    """In the order of `category_ids`."""
    image_ids: NDArray[np.int64]
    """(n,), ids in the file, in its order."""
    file_names: NDArray[np.str_]
    """(n,), relative to the image folder."""
    sizes: NDArray[np.int32]
    """(n, 2), (height, width) in pixels after EXIF orientation."""
    annotated: NDArray[np.bool_]
    """(n,), whether the file has any entry for the image, valid or not."""
    first_box: NDArray[np.int64]
    """(n + 1,): the boxes of image i are `boxes[first_box[i] : first_box[i + 1]]`."""
    boxes: NDArray[np.float64]
    """(m, 4), x, y, width, height in pixels, as in the file: they may extend past the image's edge."""
    labels: NDArray[np.int64]
    """(m,), 1 + index in `category_ids`."""
    areas: NDArray[np.float64]
    """(m,), the object's area in square pixels, as in the file, or the box's if the file has none."""
    crowd: NDArray[np.bool_]
    """(m,), whether the box surrounds a crowd of objects."""
    problems: list[Problem]
    """What was left out, and why."""
    mapping: MappedArrays | None = None
    """The file that the arrays are mapped from, if they are."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A process that is being started maps the file as well, instead of getting a copy of the arrays.
        if self.mapping is not None and context.get_spawning_popen() is not None:
            return from_mapping, (self.mapping,)
        return Annotations, tuple(getattr(self, field.name) for field in fields(self) if field.name != "mapping")

    @property
    def image_of_box(self) -> NDArray[np.int64]:
        """(m,), the index of each box's image."""
        return np.repeat(np.arange(len(self.image_ids)), np.diff(self.first_box))

    def boxes_of(self, image: int) -> slice:
        """Where the boxes of an image are in :attr:`boxes`, :attr:`labels`, ...; ``image`` is its index."""
        return slice(self.first_box[image], self.first_box[image + 1])

    def select(self, keep: NDArray[np.bool_]) -> "Annotations":
        """The images for which ``keep`` (n,) is true, with their boxes."""
        counts = np.diff(self.first_box)
        boxes = np.repeat(keep, counts)
        per_image = {name: getattr(self, name)[keep] for name in ("image_ids", "file_names", "sizes", "annotated")}
        per_box = {name: getattr(self, name)[boxes] for name in ("boxes", "labels", "areas", "crowd")}
        first_box = np.concatenate([[0], np.cumsum(counts[keep])])
        return replace(self, first_box=first_box, mapping=None, **per_image, **per_box)

    def to_coco(self) -> COCO:
        """For pycocotools. Annotation ids count from 1: to pycocotools, a match with annotation 0 is no match."""
        image_of_box = self.image_ids[self.image_of_box].tolist()
        boxes, areas, crowd = self.boxes.tolist(), self.areas.tolist(), self.crowd.tolist()
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
                    "iscrowd": int(crowd[index]),
                }
                for index, label in enumerate(self.labels.tolist())
            ],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco


ARRAYS = ("image_ids", "sizes", "annotated", "first_box", "boxes", "labels", "areas", "crowd")
"""The fields that :func:`to_arrays` leaves as they are."""


def to_arrays(found: Annotations) -> dict[str, NDArray[Any]]:
    """All of ``found`` as numeric arrays, names and problems as well, for a file that can be mapped."""
    text = {
        "category_ids": found.category_ids,
        "class_names": found.class_names,
        "problems": [astuple(problem) for problem in found.problems],
    }
    return {name: getattr(found, name) for name in ARRAYS} | {
        "file_names": names_to_numbers(found.file_names),
        "text": np.frombuffer(json.dumps(text).encode(), np.uint8),
    }


def from_mapping(mapping: MappedArrays) -> Annotations:
    """The inverse of :func:`to_arrays`, for arrays in a mapped file."""
    arrays = mapping.arrays
    text = json.loads(arrays["text"].tobytes())
    return Annotations(
        category_ids=text["category_ids"],
        class_names=text["class_names"],
        file_names=numbers_to_names(arrays["file_names"]),
        problems=[Problem(*problem) for problem in text["problems"]],
        mapping=mapping,
        **{name: arrays[name] for name in ARRAYS},
    )
