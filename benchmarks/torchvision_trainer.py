"""The trainer that one would write by hand around torchvision's Faster R-CNN: the peer of ``detector_step.py``.

    torchrun --nproc-per-node 2 benchmarks/torchvision_trainer.py --annotations train.json --images train

torchvision's own detector, transform, data set and v2 transforms in the style of its reference scripts, under DDP over
Gloo. ``nn.SyncBatchNorm`` refuses CPUs, so the batch normalization is the differentiable allreduce of means that
detection code bases use there. Each rank runs one thread on its own core. Imports nothing of horovod_megdet.
"""

import argparse
import json
import math
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.transforms import v2

# What torch recommends in its place is private.
warnings.filterwarnings("ignore", message=".*torch.distributed.nn", category=FutureWarning)

Batch = tuple[tuple[Tensor, ...], tuple[dict[str, Any], ...]]


@dataclass(frozen=True)
class Settings:
    """The detector and its input; the defaults are those of ``configs/coco``, but for the smaller images."""

    annotations: Path
    images: Path
    backbone: str = "resnet50"
    shorter_side: int = 320
    longer_side: int = 427
    fpn_channels: int = 256
    box_head_channels: int = 1024
    smallest_anchor: int = 32
    candidates: int = 2000
    proposals: int = 1000
    anchors: int = 256
    rois: int = 512
    images_per_rank: int = 2
    workers: int = 1
    lr: float = 0.0025


class NaiveBatchNorm(nn.BatchNorm2d):
    """Batch normalization over all ranks by the differentiable allreduce of (mean x, mean x^2).

    Autograd derives the backward message. All ranks must hold the same number of values.
    """

    running_mean: Tensor
    running_var: Tensor
    momentum: float

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) in and out."""
        if not self.training:
            return super().forward(input)
        means = torch.cat([input.mean(dim=(0, 2, 3)), input.square().mean(dim=(0, 2, 3))])
        if dist.is_initialized():
            means = dist_nn.all_reduce(means) / dist.get_world_size()
        mean, mean_square = means.chunk(2)
        var = mean_square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return input * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def build_model(settings: Settings, num_classes: int) -> FasterRCNN:
    """torchvision's Faster R-CNN with synchronized norms in ResNet and FPN; ``num_classes`` counts no background."""
    resnet = get_model(settings.backbone, weights=None, norm_layer=NaiveBatchNorm)
    channels = resnet.inplanes // 8
    backbone = BackboneWithFPN(
        resnet,
        return_layers={f"layer{number + 1}": str(number) for number in range(4)},
        in_channels_list=[channels * 2**number for number in range(4)],
        out_channels=settings.fpn_channels,
        norm_layer=NaiveBatchNorm,
    )
    sizes = tuple((settings.smallest_anchor * 2**level,) for level in range(5))
    return FasterRCNN(
        backbone,
        min_size=settings.shorter_side,
        max_size=settings.longer_side,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        rpn_pre_nms_top_n_train=settings.candidates,
        rpn_post_nms_top_n_train=settings.proposals,
        rpn_batch_size_per_image=settings.anchors,
        box_head=TwoMLPHead(settings.fpn_channels * 7**2, settings.box_head_channels),
        box_predictor=FastRCNNPredictor(settings.box_head_channels, num_classes + 1),
        box_batch_size_per_image=settings.rois,
    )


def build_dataset(settings: Settings) -> Subset[Any]:
    """torchvision's COCO data set, without images that have no boxes, with the v2 transforms of its reference scripts.

    Images are float32 (3, h, w) in [0, 1], as large as in their files: the detector resizes them.
    """
    transforms = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )
    dataset = CocoDetection(settings.images, settings.annotations, transforms=transforms)
    with_boxes = [index for index, image_id in enumerate(dataset.ids) if dataset.coco.getAnnIds(image_id)]
    return Subset(wrap_dataset_for_transforms_v2(dataset, target_keys=["boxes", "labels"]), with_boxes)


def build_loader(settings: Settings, ranks: int, rank: int) -> "DataLoader[Batch]":
    """This rank's batches in the order of the epoch that its sampler is set to."""
    dataset = build_dataset(settings)
    return DataLoader(
        dataset,
        batch_size=settings.images_per_rank,
        sampler=DistributedSampler(dataset, ranks, rank, drop_last=True),
        num_workers=settings.workers,
        collate_fn=_collate,
        drop_last=True,
        persistent_workers=settings.workers > 0,
    )


def _collate(samples: list[tuple[Tensor, dict[str, Any]]]) -> Batch:
    images, targets = zip(*samples, strict=True)
    return images, targets


def batches(loader: "DataLoader[Batch]") -> Iterator[Batch]:
    """Batches of epoch after epoch, without end."""
    sampler, epoch = loader.sampler, 0
    assert isinstance(sampler, DistributedSampler)
    while True:
        sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def training_step(settings: Settings, num_classes: int) -> Callable[[Batch], float]:
    """The step on a batch: losses, averaged gradients, SGD with momentum; gives the loss of this rank."""
    torch.manual_seed(0)
    model = build_model(settings, num_classes).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9, weight_decay=1e-4, fused=True)
    # The statistics are equal on all ranks: there is nothing to broadcast.
    wrapped = DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def step(batch: Batch) -> float:
        images, targets = batch
        loss = sum(wrapped(list(images), [dict(target) for target in targets]).values())
        value = loss.item()
        if not math.isfinite(value):
            raise SystemExit(f"The loss is {value}.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return value

    return step


def take_own_core(local_rank: int) -> None:
    """One thread on one core, which the loader's workers share."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[local_rank % len(cores)]})


def main() -> None:
    """Trains for some steps; rank 0 prints, and writes the seconds of each step and the peak of the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        required = field.default is MISSING
        default = None if required else field.default
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=default, required=required)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--result", type=Path, help="JSON file to write")
    arguments = vars(parser.parse_args())
    steps, result = arguments.pop("steps"), arguments.pop("result")
    settings = Settings(**arguments)

    take_own_core(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    loader = build_loader(settings, ranks, rank)
    wrapped: Any = loader.dataset
    step = training_step(settings, num_classes=max(wrapped.dataset.coco.cats))
    stream, seconds = batches(loader), []
    for number in range(1, steps + 1):
        began = time.perf_counter()
        loss = step(next(stream))
        seconds.append(time.perf_counter() - began)
        if rank == 0:
            rate = ranks * settings.images_per_rank / seconds[-1]
            print(f"step {number}: loss {loss:.3f}, {rate:.2f} images/s", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    measured: list[Any] = [None] * ranks
    dist.all_gather_object(measured, (seconds, peak))
    if rank == 0 and result:
        slowest = [max(times) for times in zip(*(times for times, _ in measured), strict=True)]
        result.write_text(json.dumps({"seconds": slowest, "peak_mb": max(peak for _, peak in measured)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
