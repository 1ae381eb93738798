"""How often images of rare classes come: repeat-factor sampling (Gupta et al. 2019, LVIS, arXiv 1908.03195).

f(c) = images with an object of class c / images        r(c) = max(1, sqrt(t / f(c)))
r(i) = max r(c) over the classes of image i, 1 for an image without objects
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from horovod_megdet.data.annotations import Annotations

UNIT = 1 << 20
"""Factors are whole multiples of 1 / UNIT: a sum of integers has the same value on the processors of all ranks."""


@dataclass(frozen=True)
class RepeatFactors:
    """The repeat factors of a training set; see :func:`repeat_factors`."""

    of_images: NDArray[np.int64]
    """(n,) r(i) in units of 1 / UNIT, at least UNIT."""
    of_classes: NDArray[np.float64]
    """(classes,) r(c); 1 for a class without images."""

    @property
    def epoch_images(self) -> int:
        """Images of an epoch: the sum of r(i), rounded up."""
        return -(-int(self.of_images.sum()) // UNIT)

    def draw(self, order: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        """How often each image of ``order``, a permutation, comes in one epoch; :attr:`epoch_images` in total.

        Systematic sampling: the factors in this order, one after the other, are lengths on a line, and an image comes
        once for each whole number plus a random offset that falls into its length. So it comes r(i) times on average,
        rounded up or down in each epoch, and the sum is the same in all epochs. What rounds that sum up is spread over
        all images, less than 1 / n each.
        """
        ends = np.cumsum(self.of_images[order])
        surplus = self.epoch_images * UNIT - int(ends[-1])
        ends += surplus * np.arange(1, len(order) + 1) // len(order)
        offset = int(random.integers(UNIT))
        return np.diff((ends + offset) // UNIT, prepend=0)


def repeat_factors(found: Annotations, threshold: float) -> RepeatFactors:
    """The repeat factors of the images of a training set, for t = ``threshold``. Crowd regions do not count."""
    images, classes = len(found.image_ids), len(found.category_ids)
    pairs = np.unique((found.image_of_box * classes + found.labels - 1)[~found.crowd])
    image, of_class = pairs // classes, pairs % classes
    counts = np.bincount(of_class, minlength=classes)
    of_classes = np.sqrt(np.maximum(1, threshold * images / np.maximum(1, counts)))
    of_classes[counts == 0] = 1
    of_images = np.ones(images)
    np.maximum.at(of_images, image, of_classes[of_class])
    return RepeatFactors(np.rint(of_images * UNIT).astype(np.int64), of_classes)
