"""Makes the pre-trained backbone: a ResNet that has learned to classify single shapes, as torchvision would save it.

MegDet starts from a backbone with statistics of its own, and freezes them where it does without BN. ImageNet's weights
would not know the generated images, and they would have to be downloaded.

    python -m experiments.pretraining runs/experiments/backbone.pth
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet18

from horovod_megdet.data.synthetic import CATEGORY_IDS, draw_image
from horovod_megdet.engine import hardware
from horovod_megdet.errors import UserError
from horovod_megdet.files import atomic_write
from horovod_megdet.models.detector import IMAGE_MEAN, IMAGE_STD

SEED = 0
DRAWN_APART = 2
"""Third number beside those of the training (0) and the validation images (1): no image of theirs is seen here."""

SIDE = 64
"""Pixels of a crop."""
MARGIN = 0.15
"""Of the box's sides, added on each side."""

BATCH = 64
PEAK_LR = 0.1
EPOCHS = 6
TRAIN_CROPS, TEST_CROPS = 5300, 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="file to write")
    parser.add_argument("--crops", type=int, default=TRAIN_CROPS, help="to train on")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    try:
        pretrain(arguments.path, arguments.crops, arguments.epochs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def pretrain(path: Path, train_crops: int = TRAIN_CROPS, epochs: int = EPOCHS) -> None:
    """Trains a ResNet-18 and writes its state dict. The same on every call, as far as the processor allows."""
    hardware.prepare_cpu()
    torch.set_num_threads(1)  # sums then have one order, whatever the machine
    torch.manual_seed(SEED)
    started = time.monotonic()
    images, labels = crops(train_crops + TEST_CROPS)
    model = resnet18(num_classes=len(CATEGORY_IDS)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK_LR, momentum=0.9, weight_decay=1e-4)
    steps = epochs * (train_crops // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=max(steps, 1))
    for epoch in range(epochs):
        losses = []
        order = torch.randperm(train_crops)
        for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(_flipped(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        right = accuracy(model, images[train_crops:], labels[train_crops:])
        print(
            f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, {right:.1%} of {TEST_CROPS} other crops right, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )
    with atomic_write(path) as file:
        torch.save(model.state_dict(), file)


def crops(count: int) -> tuple[Tensor, Tensor]:
    """So many shapes cut out of generated images: float (count, 3, SIDE, SIDE), normalized, and labels from 0."""
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    number = 0
    while len(labels) < count:
        number += 1
        image, objects = draw_image(np.random.default_rng([SEED, DRAWN_APART, number]))
        for entry in objects:
            pixels.append(np.asarray(cut(image, entry["bbox"])))
            labels.append(CATEGORY_IDS.index(entry["category_id"]))
    images = (torch.from_numpy(np.stack(pixels[:count])).float() / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(
        IMAGE_STD
    )
    return images.permute(0, 3, 1, 2), torch.tensor(labels[:count])


def cut(image: np.ndarray, box: list[float]) -> Image.Image:
    """The part of an image (H, W, 3) in a box [x, y, w, h] with a margin, SIDE pixels wide and high."""
    x, y, width, height = box
    corners = (x - MARGIN * width, y - MARGIN * height, x + (1 + MARGIN) * width, y + (1 + MARGIN) * height)
    inside = np.clip(corners, 0, (image.shape[1], image.shape[0]) * 2)
    return Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=tuple(inside))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction of the images that the model classifies right."""
    model.eval()
    predicted = torch.cat([model(part).argmax(1) for part in images.split(256)])
    model.train()
    return (predicted == labels).float().mean().item()


def _flipped(images: Tensor) -> Tensor:
    return torch.where((torch.rand(len(images)) < 0.5)[:, None, None, None], images.flip(3), images)


if __name__ == "__main__":
    sys.exit(main())
