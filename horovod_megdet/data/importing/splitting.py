"""Images divided into training, validation and test parts with the same classes in the same proportions."""

import numpy as np
from numpy.typing import NDArray

from horovod_megdet.errors import UserError


def split_images(present: NDArray[np.bool_], fractions: tuple[float, ...], seed: int) -> list[NDArray[np.int64]]:
    """Iterative stratification (Sechidis et al., 2011), by image.

    ``present`` (n, classes) says which classes an image has objects of. The rarest class is dealt out first, each of
    its images to the part that lacks most of that class; images without objects come last. The parts have exactly the
    sizes that ``fractions``, whose sum is 1, ask for, rounded. Returns the indices of each part's images, sorted.

    Raises :class:`UserError` if a part would have no image.
    """
    sizes = part_sizes(len(present), fractions)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(present))
    room, wanted = np.array(sizes), np.outer(fractions, present.sum(axis=0))
    left, part_of = present.sum(axis=0), np.full(len(present), -1)

    def deal(image: int, lacking: NDArray[np.float64]) -> None:
        """To the part that lacks most, of equal ones the one with most room."""
        part = max(np.flatnonzero(room > 0), key=lambda part: (lacking[part], room[part]))
        part_of[image] = part
        room[part] -= 1
        wanted[part] -= present[image]
        left[:] -= present[image]

    while left.any():
        rarest = int(np.where(left > 0, left, np.inf).argmin())
        for image in order[(part_of[order] < 0) & present[order, rarest]]:
            deal(image, wanted[:, rarest])
    for image in order[part_of[order] < 0]:
        deal(image, room.astype(float))
    return [np.flatnonzero(part_of == part) for part in range(len(sizes))]


def part_sizes(count: int, fractions: tuple[float, ...]) -> list[int]:
    """How many of ``count`` images each part gets: rounded down, what is left over to the largest remainders.

    Raises :class:`UserError` if a part would have none.
    """
    exact = np.array(fractions) * count
    sizes = np.floor(exact + 1e-9).astype(int)
    sizes[np.argsort(sizes - exact, kind="stable")[: count - sizes.sum()]] += 1
    if not sizes.all():
        raise UserError(
            f"--split {','.join(f'{fraction:g}' for fraction in fractions)}: one part would get none of the {count} "
            "images. Give it a larger fraction."
        )
    return [int(size) for size in sizes]
