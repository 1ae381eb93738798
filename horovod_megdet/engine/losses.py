"""The agreement of all ranks on the losses of a pass, before anyone acts on them.

torchvision averages each loss over the anchors or RoIs that its rank sampled, and the ranks' numbers of samples differ.
One message sums losses times counts, counts and flags over the ranks. Weighting each loss by ``count * ranks / all
counts`` then makes the average over ranks the loss of one process that holds the whole mini-batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from horovod_megdet import comm, launched
from horovod_megdet.data.loader import Batch
from horovod_megdet.errors import NonFiniteLossError, UserError
from horovod_megdet.models.detector import Losses
from horovod_megdet.printing import say


@dataclass(frozen=True)
class AgreedLosses:
    """What all ranks know of a pass; the same on every rank, but for ``loss``."""

    loss: Tensor
    """() float32: this rank's part, with a gradient. The average over ranks is the loss of the whole pass."""
    means: dict[str, float]
    """Each loss over the samples of all ranks."""
    finite: bool
    stop_requested: bool
    """Whether any rank received a signal to stop."""
    unreadable: bool
    """Whether any rank could not read an image."""


def agree_on_losses(losses: Losses, stop_requested: bool, unreadable: bool) -> AgreedLosses:
    """Sums losses, counts and flags over the ranks, in one message. Collective."""
    counts = torch.tensor([losses.counts[name] for name in losses.values], dtype=torch.float64)
    values = torch.stack([value.float() for value in losses.values.values()])
    flags = torch.tensor([stop_requested, unreadable], dtype=torch.float64)
    message = torch.cat([values.detach().double().cpu() * counts, counts, flags])
    sums, all_counts, (stops, bad_images) = comm.sum_(message, name="losses").split([len(counts), len(counts), 2])
    all_counts = all_counts.clamp(min=1)  # a loss without samples on any rank is 0
    weights = (counts * comm.size() / all_counts).to(values)
    return AgreedLosses(
        loss=(values * weights).sum(),
        means=dict(zip(losses.values, (sums / all_counts).tolist(), strict=True)),
        finite=bool(torch.isfinite(sums).all()),
        stop_requested=bool(stops),
        unreadable=bool(bad_images),
    )


def raise_unreadable(batch: Batch) -> None:
    """Raises a :class:`UserError` on all ranks, naming the images that any rank could not read. Collective."""
    with comm.agreement("batch"):
        if batch.error is not None:
            raise UserError(batch.error)


def warn_of_unreadable(batch: Batch) -> None:
    """Says which images this rank could not read and trains without."""
    if batch.error is not None:
        say(f"warning: rank {comm.rank()} on {launched.host()} trains without an image: {batch.error}")


def raise_not_finite(losses: Losses, batch: Batch, step: int) -> None:
    """Raises a :class:`NonFiniteLossError` on all ranks, naming the ranks and images it happened on. Collective."""
    mine = None
    if not all(value.isfinite() for value in losses.values.values()):
        mine = f"rank {comm.rank()} on {launched.host()}, images {[target['image_id'] for target in batch.targets]}"
    ranks = [where for where in comm.gather_objects(mine, "not_finite") if where]
    raise NonFiniteLossError(
        f"The loss is not finite at step {step}: {'; '.join(ranks)}. The last good checkpoint is kept. Lower "
        "solver.base_lr, lengthen solver.warmup_epochs, set solver.clip_gradient_norm, or look at the images."
    )
