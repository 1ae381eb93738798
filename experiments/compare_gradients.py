"""The first step's gradients of all ranks together, against those that one rank computes from the same images.

    mpirun -np 16 python experiments/compare_gradients.py --config C --run-dir DIR

Writes the difference to ``DIR/difference.json``. Only with frozen norms do the two agree: the images of other norms
depend on each other, and rank 0 alone would compute each part's statistics apart.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from horovod_megdet import comm, run
from horovod_megdet.arguments import add_config_arguments, add_run_dir_argument, config_of
from horovod_megdet.config import Config
from horovod_megdet.data.loader import Batch, build_train_loader
from horovod_megdet.engine.startup import build_trainer
from horovod_megdet.engine.trainer import Trainer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    add_run_dir_argument(parser)
    return run.run_ranks(partial(config_of, parser.parse_args()), compare)


def compare(config: Config) -> int:
    """Takes the first step on all ranks up to its gradients, and again on rank 0 alone."""
    trainer = build_trainer(config, resume=False)
    trainer.apply_gradients = lambda: None  # type: ignore[method-assign]  # weights and gradients stay as they are
    trainer.train_step(first_batches(trainer, comm.rank()))
    if comm.is_main():
        weights = [weight for weight in trainer.detector.parameters() if weight.grad is not None]
        # Not backward(): Horovod would wait for the other ranks.
        alone = torch.autograd.grad(loss_of_all_ranks(trainer), weights)
        difference = norm([weight.grad - grad for weight, grad in zip(weights, alone, strict=True)])
        result = {"gradient_norm": norm(alone), "gradient_difference": difference / norm(alone)}
        Path(config.output.run_dir, "difference.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


def first_batches(trainer: Trainer, rank: int) -> Iterator[Batch]:
    """The passes of a rank's first step."""
    return iter(
        build_train_loader(
            trainer.train_set,
            trainer.config.data,
            seed=trainer.config.runtime.seed,
            rank=rank,
            ranks=comm.size(),
            start=0,
            stop=trainer.schedule.mini_batch,
        )
    )


def loss_of_all_ranks(trainer: Trainer) -> Tensor:
    """The loss of the whole mini-batch, of one pass per rank: each loss is the mean over the samples of all ranks."""
    parts = []
    for rank in range(comm.size()):
        batch = next(first_batches(trainer, rank))
        parts.append(trainer.detector.forward_losses(batch.images, batch.targets))
    loss = torch.zeros(())
    for name in parts[0].values:
        samples = torch.stack([part.counts[name] for part in parts]).sum().clamp(min=1)
        loss = loss + sum(part.values[name] * (part.counts[name] / samples) for part in parts)
    return loss


def norm(tensors: list[Tensor] | tuple[Tensor, ...]) -> float:
    """The L2 norm of all tensors together, summed in float64."""
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


if __name__ == "__main__":
    sys.exit(main())
