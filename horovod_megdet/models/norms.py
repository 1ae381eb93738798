"""The choice of normalization for a part of the detector."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from horovod_megdet import comm
from horovod_megdet.config import BatchNormConfig, Norm
from horovod_megdet.errors import UserError
from horovod_megdet.layers.cross_gpu_bn import convert_batch_norm, replace_layers
from horovod_megdet.wording import count


@dataclass(frozen=True)
class Norms:
    """Makes the normalization layers of all parts.

    A part is built with plain ``BatchNorm2d`` (:meth:`layer`), which is then exchanged (:meth:`finish`), so that
    torchvision's constructors need to know nothing about the kinds.
    """

    config: BatchNormConfig
    group: comm.Group | None
    """The ranks that share statistics in ``cgbn`` layers; all if None."""

    def layer(self, kind: Norm) -> Callable[..., nn.Module] | None:
        """The ``norm_layer`` argument of torchvision's blocks: None for no normalization."""
        if kind == "none":
            return None
        return partial(nn.BatchNorm2d, eps=self.config.eps, momentum=self.config.momentum)

    def finish(self, part: nn.Module, kind: Norm, path: str) -> None:
        """Exchanges the ``BatchNorm2d`` layers in ``part``, which sits at ``path`` in the detector."""
        if kind == "frozen":
            freeze_norms(part)
        elif kind == "cgbn":
            convert_batch_norm(part, group=self.group, algorithm=self.config.algorithm, path=path)
        elif kind == "local":
            convert_batch_norm(part, group=comm.alone(), path=path)


def freeze_norms(part: nn.Module) -> None:
    """Replaces ``BatchNorm2d`` by a fixed scale and shift per channel, which no mode and no optimizer changes."""
    replace_layers(part, (nn.BatchNorm2d,), lambda layer, _: FrozenBatchNorm2d(layer.num_features, layer.eps))


def bn_group(batch_norm: BatchNormConfig, images_per_rank: int) -> comm.Group:
    """The ranks that share statistics with this one. Collective. Raises as :func:`bn_group_size` does."""
    size = bn_group_size(batch_norm, images_per_rank, comm.size())
    return comm.world() if batch_norm.bn_size == "world" else comm.split_world(size)


def bn_group_size(batch_norm: BatchNormConfig, images_per_rank: int, ranks: int) -> int:
    """How many of so many ranks share statistics: those that hold ``bn_size`` images together.

    Raises :class:`UserError` with the possible sizes if ``bn_size`` images are not a whole group of ranks, or the ranks
    are not a whole number of groups.
    """
    bn_size = batch_norm.bn_size
    if bn_size == "world":
        return ranks
    possible = [images_per_rank * group for group in range(1, ranks + 1) if ranks % group == 0]
    if bn_size not in possible:
        others = f", or a multiple of {bn_size // images_per_rank} ranks" if bn_size % images_per_rank == 0 else ""
        raise UserError(
            f"batch_norm.bn_size: {bn_size} does not work with {count(ranks, 'rank')} of "
            f"{count(images_per_rank, 'image')}; possible are {', '.join(map(str, possible))}{others}."
        )
    return bn_size // images_per_rank
