"""The order of images: an infinite stream that does not depend on the number of ranks, and each rank's share of it."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from horovod_megdet.data.repeat_factors import RepeatFactors


class PlannedImage(NamedTuple):
    """An image of the data set at one place of the stream."""

    epoch: int
    image: int
    """Its index in the data set."""
    repeat: int = 0
    """How often it came before in this epoch."""


class ImageStream:
    """The images of epoch 0 in random order, then those of epoch 1, and so on forever.

    Stream positions ``b*j ... b*j + b-1`` (b = ``images_per_rank``) hold images of one aspect-ratio group, landscape
    or portrait, so that batches need little padding; only leftovers, fewer than 2 b images per epoch, are mixed.

    ``sizes``: int (n, 2), (height, width) of each image. With ``factors``, an epoch has an image as often as they say;
    all epochs have the same number of images.
    """

    def __init__(
        self, sizes: NDArray[np.integer], images_per_rank: int, seed: int, factors: RepeatFactors | None = None
    ) -> None:
        assert len(sizes) > 0
        assert images_per_rank > 0
        self.images_per_rank = images_per_rank
        self.seed = seed
        self.factors = factors
        self.portrait = np.asarray(sizes[:, 0] > sizes[:, 1])
        """bool (n,), the aspect-ratio group of each image."""
        self._cached_order = lru_cache(maxsize=2)(self._order)
        self._cached_repeats = lru_cache(maxsize=2)(self._repeats)

    def __len__(self) -> int:
        """Images in one epoch."""
        return self.factors.epoch_images if self.factors else len(self.portrait)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The indices in the order of ``epoch``, which depends on (seed, epoch) only; without factors a permutation."""
        return self._cached_order(epoch)

    def indices(self, position: int, count: int) -> list[PlannedImage]:
        """The images at the stream positions ``position ... position + count - 1``."""
        positions = (divmod(at, len(self)) for at in range(position, position + count))
        return [
            PlannedImage(epoch, int(self.order(epoch)[offset]), int(self._cached_repeats(epoch)[offset]))
            for epoch, offset in positions
        ]

    def _repeats(self, epoch: int) -> NDArray[np.int64]:
        """For each place in the epoch, how often its image came before."""
        order = self.order(epoch)
        by_image = np.argsort(order, kind="stable")
        of_image = order[by_image]
        repeats = np.empty_like(order)
        repeats[by_image] = np.arange(len(order)) - np.searchsorted(of_image, of_image)
        return repeats

    def _order(self, epoch: int) -> NDArray[np.int64]:
        random = np.random.default_rng([self.seed, epoch])
        shuffled = random.permutation(len(self.portrait))
        if self.factors:
            shuffled = random.permutation(np.repeat(shuffled, self.factors.draw(shuffled, random)))
        groups = [shuffled[~self.portrait[shuffled]], shuffled[self.portrait[shuffled]]]
        length = self.images_per_rank
        whole = [len(group) - len(group) % length for group in groups]
        runs = np.concatenate([group[:end].reshape(-1, length) for group, end in zip(groups, whole, strict=True)])
        rest = np.concatenate([group[end:] for group, end in zip(groups, whole, strict=True)])
        # If the number of images is not a multiple of the run length, the epoch starts in the middle of a run.
        head = min(-(epoch * len(self)) % length, len(self))
        runs = runs[random.permutation(len(runs))]
        if len(rest) < head:
            rest, runs = np.concatenate([rest, runs[-1]]), runs[:-1]
        return np.concatenate([rest[:head], runs.ravel(), rest[head:]])


class GroupedBatchSampler(Sampler[list[PlannedImage]]):
    """This rank's part of the stream: a list of ``images_per_rank`` images for each forward pass.

    The pass at position p gives rank r the stream positions ``p + r*b ... p + (r+1)*b - 1``. All ranks make the same
    number of passes; the last one may reach past ``stop``.
    """

    def __init__(self, stream: ImageStream, rank: int, ranks: int, start: int, stop: int) -> None:
        assert 0 <= rank < ranks
        self.stream = stream
        self.rank = rank
        self.images_per_pass = ranks * stream.images_per_rank
        self.positions = range(start, max(start, stop), self.images_per_pass)

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[list[PlannedImage]]:
        per_rank = self.stream.images_per_rank
        for position in self.positions:
            yield self.stream.indices(position + self.rank * per_rank, per_rank)


def evaluation_shard(sizes: NDArray[np.integer], rank: int, ranks: int) -> NDArray[np.int64]:
    """Indices that ``rank`` evaluates: every image on exactly one rank; images of similar shape and size take turns.

    All ranks get the same number of images, give or take one, and about the same number of pixels.
    """
    height, width = np.asarray(sizes, dtype=np.int64).T
    return np.lexsort((width, height, height / width))[rank::ranks]
