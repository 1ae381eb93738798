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
    """The ranks that share statistics with this one: those that hold ``bn_size`` images together. Collective.

    Raises :class:`UserError` with the possible sizes if ``bn_size`` images are not a whole group of ranks, or the ranks
    are not a whole number of groups.
    """
    if batch_norm.bn_size == "world":
        return comm.world()
    possible = [images_per_rank * ranks for ranks in range(1, comm.size() + 1) if comm.size() % ranks == 0]
    if batch_norm.bn_size not in possible:
        raise UserError(
            f"batch_norm.bn_size: {batch_norm.bn_size} does not work with {comm.size()} ranks of {images_per_rank} "
            f"images; possible are {', '.join(map(str, possible))}."
        )
    return comm.split_world(batch_norm.bn_size // images_per_rank)
