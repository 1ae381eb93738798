"""train.py with a fault planted in one rank at one step: MEGDET_FAULT=KIND:RANK:STEP.

raise      an exception in the middle of a step
memory     allocating more memory than there is
deadlock   a collective that the other ranks do not call
loader     a data loader that never returns
"""

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from horovod_megdet import comm
from horovod_megdet.engine.trainer import Trainer
from horovod_megdet.printing import say

KIND, RANK, STEP = os.environ["MEGDET_FAULT"].split(":")

healthy_step = Trainer.train_step


def faulty_step(trainer: Trainer, batches: Iterator[Any]) -> None:
    """A training step, with the fault in its middle if this is the rank and step."""
    if comm.rank() == int(RANK) and trainer.position.step + 1 == int(STEP):
        say("planted fault")
        forward = trainer.detector.forward_losses
        if KIND == "loader":
            batches = never()
        else:
            trainer.detector.forward_losses = lambda *batch: (fail(), forward(*batch))[1]  # type: ignore[method-assign]
    healthy_step(trainer, batches)


def never() -> Iterator[Any]:
    """A loader that does not return."""
    time.sleep(3600)
    yield


def fail() -> None:
    """Does what goes wrong in the middle of a step."""
    if KIND == "raise":
        raise RuntimeError("a planted fault")
    if KIND == "memory":
        torch.empty(2**50, dtype=torch.uint8)
    if KIND == "deadlock":
        comm.sum_(torch.ones(1), name="only here")


Trainer.train_step = faulty_step  # type: ignore[method-assign]
spec = importlib.util.spec_from_file_location("train", Path(__file__).resolve().parents[2] / "train.py")
assert spec
assert spec.loader
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)

if __name__ == "__main__":
    sys.exit(train.main())
