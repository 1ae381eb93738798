"""Which images an elastic job has trained on, from the log that elastic_train.py writes."""

import itertools
from collections import Counter
from pathlib import Path

from horovod_megdet.data.loader import image_seed
from horovod_megdet.data.sampler import PlannedImage

IMAGES = 24
"""In an epoch of the tiny configuration."""

MOST_EPOCHS = 50


def check_every_image_counts_once(folder: Path, epochs: int) -> None:
    """Asserts that each image was in exactly one step of each epoch, of the steps that count."""
    images = images_of_steps(folder)
    counts = Counter(images)
    assert set(counts.values()) == {1}
    assert {image for image in counts if image[0] < epochs} == set(itertools.product(range(epochs), range(IMAGES)))


def images_of_steps(folder: Path) -> list[tuple[int, int]]:
    """(epoch, index) of the images in the steps that count: of steps from the same position, the last."""
    seen: dict[tuple[str, str], set[int]] = {}
    steps: dict[str, tuple[str, str]] = {}
    for line in (folder / "images.txt").read_text().splitlines():
        match line.split():
            case ["seen", position, ranks, seed]:
                seen.setdefault((position, ranks), set()).add(int(seed))
            case ["step", position, end, ranks]:
                steps[position] = end, ranks
    image_of = {
        image_seed(0, PlannedImage(epoch, index)): (epoch, index)
        for epoch in range(MOST_EPOCHS)
        for index in range(IMAGES)
    }
    images, position = [], "0"
    while position in steps:
        end, ranks = steps[position]
        found = [image_of[seed] for seed in seen[position, ranks]]
        assert len(found) == int(end) - int(position)
        images += found
        position = end
    return images
