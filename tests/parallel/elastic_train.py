"""train.py, with a log of the images of each step, and with ranks that end themselves at chosen moments.

The log is ``images.txt`` in the working directory: ``seen START RANKS SEED`` for each image before a forward pass,
``step START END RANKS`` for each step that was taken, ``evaluating`` and ``writing``, a checkpoint, when a rank begins
that. START and END are positions in the stream of images. :mod:`elastic_images` reads it.

With ``--ends``, rank 0 ends at its first evaluation and at a checkpoint. Steps of fewer than ``--full N`` ranks, 2 by
default, take a second longer: so lost ranks are back before the run ends. With ``--broken HOST`` ranks on that host end
before they meet the others.
"""

import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(PROJECT))


def taken(option: str, words: int) -> list[str]:
    """What follows an option on the command line, which is removed from there; empty without it."""
    if option not in sys.argv:
        return []
    place = sys.argv.index(option)
    found = sys.argv[place : place + words]
    del sys.argv[place : place + words]
    return found


if os.environ["HOROVOD_HOSTNAME"] in taken("--broken", 2):
    sys.exit("broken")

from horovod_megdet import comm  # noqa: E402
from horovod_megdet.data.loader import Batch  # noqa: E402
from horovod_megdet.engine.elastic import ElasticTrainer  # noqa: E402
from horovod_megdet.engine.trainer import Trainer  # noqa: E402

LOG = os.open("images.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
forward, train_step, evaluate, write = (
    Trainer.forward,
    ElasticTrainer.train_step,
    Trainer.evaluate,
    Trainer.write_checkpoint,
)


def note(*words: object) -> None:
    os.write(LOG, (" ".join(map(str, words)) + "\n").encode())


def forward_and_note(self: Trainer, batch: Batch) -> Any:
    for target in batch.targets:
        note("seen", self.position.images_seen, comm.size(), target["seed"])
    return forward(self, batch)


def step_and_note(self: ElasticTrainer, batches: Iterator[Batch]) -> None:
    before = self.position.images_seen
    train_step(self, batches)
    if comm.size() < FULL:
        time.sleep(1)
    note("step", before, self.position.images_seen, comm.size())


def end_once(moment: str) -> None:
    """Ends rank 0, if it has company, the first time that it comes to ``moment``."""
    marker = Path(f"ended_{moment}")
    if comm.is_main() and comm.size() > 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def evaluate_and_note(self: Trainer) -> Any:
    note("evaluating")
    if ENDS:
        end_once("evaluating")
    return evaluate(self)


def write_and_note(self: Trainer, random_states: Any) -> None:
    note("writing")
    if ENDS and self.position.images_seen > len(self.train_set):
        end_once("writing")
    write(self, random_states)


ENDS = bool(taken("--ends", 1))
FULL = int((taken("--full", 2) or "2")[-1])
Trainer.forward = forward_and_note  # type: ignore[method-assign]
Trainer.evaluate = evaluate_and_note  # type: ignore[method-assign]
Trainer.write_checkpoint = write_and_note  # type: ignore[method-assign]
ElasticTrainer.train_step = step_and_note  # type: ignore[method-assign]
sys.argv[0] = str(PROJECT / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
