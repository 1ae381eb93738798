"""Batches for training and evaluation, read and resized in worker processes."""

import math
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from horovod_megdet.config import DataConfig
from horovod_megdet.data.coco import CocoDataset
from horovod_megdet.data.images import ImageFileError
from horovod_megdet.data.repeat_factors import repeat_factors
from horovod_megdet.data.sampler import GroupedBatchSampler, ImageStream, PlannedImage, evaluation_shard
from horovod_megdet.data.transforms import DetectionTransform, evaluation_transforms, training_transform
from horovod_megdet.data.workers import start_fork_server, start_worker

PREFETCH = 2
"""Batches that each worker prepares ahead."""


@dataclass
class Batch:
    """The images of one forward pass on one rank, or the reason why there are none."""

    images: list[Tensor]
    """uint8 (3, h, w) each, RGB, resized, channels last in memory; their sizes differ."""
    targets: list[dict[str, Any]] = field(default_factory=list)
    """For each image: `boxes` float32 (k, 4) xyxy in pixels of the resized image, `labels` int64 (k,), `image_id` in
    the JSON, `index` in the data set, `original_size` (height, width) in pixels after EXIF orientation, and `seed`,
    which depends on the run's seed, the epoch, the index and, of an image that comes again, how often it came."""
    error: str | None = None
    """A sentence that names the image files that could not be read. They are left out; if no image remains, a black
    one without objects replaces the batch, so that its rank takes part in the collectives of the forward pass."""
    packed: "_Packed | None" = field(default=None, repr=False)
    """What the tensors are views of, if they are."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def images_read(self) -> int:
        """Images of the data set: a black one that stands in does not count."""
        return sum(target["index"] >= 0 for target in self.targets)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory."""
        return self._pack().map(lambda tensor: tensor.pin_memory()).unpack()

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``, in three copies; images stay uint8, a quarter of the bytes of float32."""
        if device.type == "cpu":
            return self
        return self._pack().map(lambda tensor: tensor.to(device, non_blocking=True)).unpack()

    def __reduce__(self) -> tuple[Any, ...]:
        boxes, labels, rest = self._targets()
        return _unpickle, (_in_memory_file(self._rows()), boxes.numpy(), labels.numpy(), rest, self.error)

    def _pack(self) -> "_Packed":
        if self.packed is not None:
            return self.packed
        return _Packed(torch.cat([row.reshape(-1) for row in self._rows()]), *self._targets(), self.error)

    def _rows(self) -> list[Tensor]:
        """The images as (h, w, 3): decoded and resized, they are channels last in memory, so nothing is transposed."""
        return [image.permute(1, 2, 0) for image in self.images]

    def _targets(self) -> tuple[Tensor, Tensor, list["_Rest"]]:
        boxes = [target["boxes"] for target in self.targets]
        rest = [
            ((image.shape[1], image.shape[2], 3), _without_objects(target), len(own))
            for image, target, own in zip(self.images, self.targets, boxes, strict=True)
        ]
        return torch.cat(boxes), torch.cat([target["labels"] for target in self.targets]), rest


_Rest = tuple[tuple[int, int, int], dict[str, Any], int]
"""The (h, w, 3) of an image, what its target has besides boxes and labels, and the number of its objects."""


def _without_objects(target: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in target.items() if key not in ("boxes", "labels")}


@dataclass
class _Packed:
    """A batch in three tensors: each of those that go to another process or device has its own costs."""

    pixels: Tensor
    boxes: Tensor
    labels: Tensor
    rest: list[_Rest]
    error: str | None

    def map(self, change: Callable[[Tensor], Tensor]) -> "_Packed":
        return _Packed(change(self.pixels), change(self.boxes), change(self.labels), self.rest, self.error)

    def unpack(self) -> Batch:
        """The batch, whose tensors are views of these."""
        objects = [count for _, _, count in self.rest]
        pixels = self.pixels.split([math.prod(shape) for shape, _, _ in self.rest])
        images = [part.view(shape).permute(2, 0, 1) for part, (shape, _, _) in zip(pixels, self.rest, strict=True)]
        targets = [
            {"boxes": boxes, "labels": labels, **other}
            for boxes, labels, (_, other, _) in zip(
                self.boxes.split(objects), self.labels.split(objects), self.rest, strict=True
            )
        ]
        return Batch(images, targets, self.error, self)


def _in_memory_file(rows: list[Tensor]) -> Any:
    """Writes pixels to a file in memory, whose descriptor another process can be sent.

    So they are copied once. In shared memory the kernel would have to clear each page first, and to interrupt the
    process for it, which takes as long as decoding the image; and there may be little of it: Docker's /dev/shm has
    64 MB.
    """
    with os.fdopen(os.memfd_create("batch"), "wb") as file:
        for row in rows:
            file.write(row.contiguous().numpy().data)
        file.flush()
        return DupFd(file.fileno())


def _unpickle(pixels: Any, boxes: NDArray[np.float32], labels: NDArray[np.int64], *others: Any) -> Batch:
    descriptor = pixels.detach()
    try:
        mapped = torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8)
    finally:
        os.close(descriptor)
    return _Packed(mapped, torch.from_numpy(boxes), torch.from_numpy(labels), *others).unpack()


class BatchReader(Dataset[Batch]):
    """Reads and transforms the images of a batch; an index is the batch's list of planned images."""

    def __init__(self, dataset: CocoDataset, transform: DetectionTransform, seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __getitem__(self, planned: list[PlannedImage]) -> Batch:
        batch, errors = Batch([]), []
        for place in planned:
            try:
                image, target = self._read(place)
            except ImageFileError as error:
                errors.append(f"{error}.")
                continue
            batch.images.append(image)
            batch.targets.append(target)
        if errors:
            batch.error = "\n".join(errors)
        if not batch.images:
            image, target = _black_image()
            batch.images.append(image)
            batch.targets.append(target)
        return batch

    def _read(self, planned: PlannedImage) -> tuple[Tensor, dict[str, Any]]:
        index = planned.image
        seed = image_seed(self.seed, planned)
        generator = torch.Generator().manual_seed(seed)
        height, width = self.dataset.sizes[index].tolist()
        new_size = self.transform.draw_size((height, width), generator)
        image, boxes, labels = self.dataset.read(index, at_least=new_size)
        image, boxes = self.transform.apply(image, boxes, (height, width), new_size, generator)
        target = {
            "boxes": boxes,
            "labels": labels,
            "image_id": int(self.dataset.image_ids[index]),
            "index": index,
            "original_size": (height, width),
            "seed": seed,
        }
        return image, target


class ViewsReader(Dataset[Batch]):
    """Reads each image of a batch in several sizes, one after the other."""

    def __init__(self, readers: list[BatchReader]) -> None:
        self.readers = readers

    def __getitem__(self, planned: list[PlannedImage]) -> Batch:
        views = [reader[planned] for reader in self.readers]
        images = [image for view in views for image in view.images]
        error = next((view.error for view in views if view.error), None)
        return Batch(images, [target for view in views for target in view.targets], error)


def _black_image() -> tuple[Tensor, dict[str, Any]]:
    boxes, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    target = {"boxes": boxes, "labels": labels, "image_id": -1, "index": -1, "original_size": (64, 64), "seed": 0}
    return torch.zeros(3, 64, 64, dtype=torch.uint8), target


def image_seed(seed: int, planned: PlannedImage) -> int:
    """A 63-bit seed for everything random about one image at one place of the stream."""
    repeat = (planned.repeat,) if planned.repeat else ()
    sequence = np.random.SeedSequence([seed, planned.epoch, planned.image], spawn_key=repeat)
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def image_stream(dataset: CocoDataset, data: DataConfig, seed: int) -> ImageStream:
    """The order in which a training set is seen; its length is that of an epoch."""
    factors = repeat_factors(dataset.ground_truth, data.repeat_factor) if data.repeat_factor else None
    return ImageStream(dataset.sizes, data.images_per_rank, seed, factors)


def build_train_loader(
    dataset: CocoDataset,
    data: DataConfig,
    *,
    seed: int,
    rank: int,
    ranks: int,
    start: int,
    stop: int,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """This rank's batches of ``images_per_rank`` images, from stream position ``start`` up to ``stop``.

    The images and their augmentation depend only on the seed and the stream position, not on ranks or workers.
    """
    sampler = GroupedBatchSampler(image_stream(dataset, data, seed), rank, ranks, start, stop)
    return _build_loader(BatchReader(dataset, training_transform(data), seed), sampler, data, pin_memory)


def build_eval_loader(
    dataset: CocoDataset,
    data: DataConfig,
    *,
    rank: int,
    ranks: int,
    scales: tuple[int, ...] = (),
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """This rank's images, one per batch: with padding, detections would depend on the number of ranks.

    With ``scales`` a batch has its image in each of these sizes.
    """
    shard = [[PlannedImage(0, int(index))] for index in evaluation_shard(dataset.sizes, rank, ranks)]
    readers = [BatchReader(dataset, transform, 0) for transform in evaluation_transforms(data, scales)]
    return _build_loader(ViewsReader(readers), shard, data, pin_memory)


def _build_loader(reader: Dataset[Batch], sampler: Any, data: DataConfig, pin_memory: bool) -> DataLoader[Batch]:
    # The loader draws a seed when it starts. With its own generator it leaves the global one untouched.
    generator = torch.Generator().manual_seed(0)
    if data.workers == 0:
        return DataLoader(reader, batch_size=None, sampler=sampler, generator=generator, pin_memory=pin_memory)
    start_fork_server(__name__)
    return DataLoader(
        reader,
        batch_size=None,
        sampler=sampler,
        generator=generator,
        pin_memory=pin_memory,
        num_workers=data.workers,
        # Workers forked from this process could crash: MPI does not survive a fork.
        multiprocessing_context="forkserver",
        worker_init_fn=start_worker,
        prefetch_factor=PREFETCH,
        persistent_workers=True,
    )
