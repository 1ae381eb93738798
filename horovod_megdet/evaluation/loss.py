"""The validation loss: that of training, were the whole validation set one mini-batch.

Each loss is the mean over the anchors or RoIs that are sampled in all images. Images run one by one, normalized by the
running statistics, and an image's samples follow from its index alone: so evaluations of one run compare, and the loss
has the same bits on any number of ranks.
"""

import contextlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from horovod_megdet import comm
from horovod_megdet.data.coco import CocoDataset
from horovod_megdet.data.loader import Batch
from horovod_megdet.errors import UserError
from horovod_megdet.evaluation.coco import Autocast
from horovod_megdet.models.detector import COUNT_OF_LOSS, Detector
from horovod_megdet.progress import noting_waits


def validation_losses(
    detector: Detector,
    dataset: CocoDataset,
    loader: Iterable[Batch],
    device: torch.device,
    autocast: Autocast = contextlib.nullcontext,
) -> dict[str, float]:
    """The losses by name, on every rank. Collective.

    ``loader`` yields this rank's shard of ``dataset``, an image at a time; together, the shards hold every image once.
    Raises :class:`UserError` on every rank if one of them finds an unreadable image.
    """
    with comm.agreement("validation loss"):
        shard = _of_shard(detector, dataset, loader, device, autocast)
    images = comm.gather_to_main(shard, "validation_loss")
    assert images is None or len(images) == len(dataset), "the ranks' shards are not exactly the data set"
    return comm.broadcast_object(None if images is None else _means(images), "validation_loss.means") or {}


@torch.inference_mode()
def _of_shard(
    detector: Detector, dataset: CocoDataset, loader: Iterable[Batch], device: torch.device, autocast: Autocast
) -> Tensor:
    """For each image and loss, the sum over its samples and their number: (images, losses, 2) float64."""
    rows = [torch.zeros(0, len(COUNT_OF_LOSS), 2, dtype=torch.float64)]
    was_training = detector.training
    detector.eval()
    try:
        for batch in noting_waits(loader, doing="computing the validation loss"):
            if batch.error is not None:
                raise UserError(batch.error)
            batch = batch.to(device)
            [target] = batch.targets
            objects = torch.from_numpy(~dataset.crowd(target["index"])).to(device)
            target = target | {key: target[key][objects] for key in ("boxes", "labels")}
            with autocast():
                losses = detector.evaluation_losses(batch.images, [target])
            counts = torch.stack([losses.counts[name] for name in COUNT_OF_LOSS]).double()
            means = torch.stack([losses.values[name].double() for name in COUNT_OF_LOSS])
            rows.append(torch.stack([means * counts, counts], dim=1)[None].cpu())
    finally:
        detector.train(was_training)
    return torch.cat(rows)


def _means(images: Tensor) -> dict[str, float]:
    # An exactly rounded sum does not depend on the order of the images.
    sums, counts = ([math.fsum(column) for column in part.T.tolist()] for part in images.unbind(2))
    return {name: total / max(1.0, count) for name, total, count in zip(COUNT_OF_LOSS, sums, counts, strict=True)}
