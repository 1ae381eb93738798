"""What the ranks agree on about the losses of a step.

torchvision averages each loss over the anchors or RoIs that its rank sampled, and the ranks' numbers of samples differ.
Weighting each loss by ``count * ranks / counts of all ranks`` makes the average over ranks the loss of one process that
holds the whole mini-batch. So before each backward pass one message sums the counts, on the losses' device. The losses,
and what else a rank alone knows, are summed in a second message when the backward passes are done: no rank waits for
the losses of its device, or of another rank, in between.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from horovod_megdet import comm, launched
from horovod_megdet.data.loader import Batch
from horovod_megdet.errors import NotFiniteError, UserError
from horovod_megdet.models.detector import COUNT_OF_LOSS, Losses
from horovod_megdet.printing import warn


@dataclass(frozen=True)
class PassReport:
    """What this rank keeps of a forward and backward pass until all ranks agree on the step."""

    image_ids: list[int]
    images_read: int
    error: str | None
    """Which images could not be read; None if all could."""
    sums: Tensor
    """Each loss times the number of samples of this rank, (losses,) float64 on their device."""
    all_counts: Tensor
    """The number of samples of all ranks, likewise."""


def weigh_losses(batch: Batch, losses: Losses) -> tuple[Tensor, PassReport]:
    """Returns this rank's part of the loss of a pass, () float32 with a gradient, and what to report of the pass.

    The average of the first over the ranks is the loss of the pass. Collective.
    """
    counts = torch.stack([losses.counts[name] for name in COUNT_OF_LOSS]).double()
    all_counts = comm.sum_(counts.clone(), "sample_counts").clamp_(min=1)  # a loss without samples on any rank is 0
    values = torch.stack([losses.values[name].float() for name in COUNT_OF_LOSS])
    loss = (values * (counts * comm.size() / all_counts).to(values)).sum()
    report = PassReport(
        image_ids=[target["image_id"] for target in batch.targets],
        images_read=batch.images_read,
        error=batch.error,
        sums=values.detach().double() * counts,
        all_counts=all_counts,
    )
    return loss, report


@dataclass(frozen=True)
class StepSummary:
    """What all ranks know of a step; the same on each."""

    losses: dict[str, float]
    """Each loss over the samples of all ranks, averaged over the passes."""
    stop_requested: bool
    """Whether any rank received a signal to stop."""
    hosts_changed: bool
    """Whether hosts came or went, in an elastic job."""


def agree_on_step(reports: list[PassReport], stop_requested: bool, step: int, skip_unreadable: bool) -> StepSummary:
    """Puts together what the ranks found out in the passes of a step, in one message. Collective.

    Raises a :class:`UserError` on all ranks if any of them could not read an image, unless those are skipped, and a
    :class:`NotFiniteError` if a loss of any of them is not finite.
    """
    errors = [report.error for report in reports if report.error is not None]
    # All that the host has to know of a step is fetched here, when the device has nothing else to do for it.
    fetched = torch.stack([torch.cat([report.sums, report.all_counts]) for report in reports]).cpu()
    mine, all_counts = fetched.chunk(2, dim=1)
    flags = torch.tensor([stop_requested, bool(errors), comm.hosts_changed()], dtype=torch.float64)
    message = comm.sum_(torch.cat([mine.flatten(), flags]), "losses")
    sums, (stops, unreadable, hosts_changed) = message[:-3].view_as(mine), message[-3:]
    if unreadable and not skip_unreadable:
        with comm.agreement("images"):
            if errors:
                raise UserError("\n".join(errors))
    for error in errors:
        warn(f"rank {comm.rank()} on {launched.host()} trains without an image: {error}")
    if not torch.isfinite(sums).all():
        _raise_not_finite(reports, step)
    means = (sums / all_counts).mean(0)
    return StepSummary(dict(zip(COUNT_OF_LOSS, means.tolist(), strict=True)), bool(stops), bool(hosts_changed))


def _raise_not_finite(reports: list[PassReport], step: int) -> None:
    bad = [report for report in reports if not report.sums.isfinite().all()]
    images = [image for report in bad for image in report.image_ids]
    mine = f"rank {comm.rank()} on {launched.host()}, images {images}" if images else None
    ranks = [where for where in comm.gather_objects(mine, "not_finite") if where]
    raise NotFiniteError(f"The loss is not finite at step {step}: {'; '.join(ranks)}")
