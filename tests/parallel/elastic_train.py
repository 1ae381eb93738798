"""train.py, with a log of the images of each step, and with ranks that end themselves at chosen moments.

The log is ``images.txt`` in the working directory: ``seen START RANKS SEED`` for each image before a forward pass, and
``step START END RANKS`` for each step that was taken. START and END are positions in the stream of images.
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

from horovod_megdet import comm  # noqa: E402
from horovod_megdet.data.loader import Batch  # noqa: E402
from horovod_megdet.engine.elastic import ElasticTrainer  # noqa: E402
from horovod_megdet.engine.trainer import Trainer  # noqa: E402

LOG = os.open("images.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
forward, train_step, evaluate, write = (
    Trainer.forward,
    ElasticTrainer.train_step,
    Trainer.evaluate,
    Trainer._write_checkpoint,
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
    if comm.size() == 1:
        time.sleep(1)  # so that a lost rank is back before the run ends
    note("step", before, self.position.images_seen, comm.size())


def end_once(moment: str) -> None:
    """Ends rank 0, if it has company, the first time that it comes to ``moment``."""
    marker = Path(f"ended_{moment}")
    if comm.is_main() and comm.size() > 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def evaluate_after_end(self: Trainer) -> Any:
    end_once("evaluating")
    return evaluate(self)


def write_after_end(self: Trainer, random_states: Any) -> None:
    if self.position.images_seen > len(self.train_set):
        end_once("writing")
    write(self, random_states)


Trainer.forward = forward_and_note  # type: ignore[method-assign]
ElasticTrainer.train_step = step_and_note  # type: ignore[method-assign]
if "--ends" in sys.argv:
    sys.argv.remove("--ends")
    Trainer.evaluate = evaluate_after_end  # type: ignore[method-assign]
    Trainer._write_checkpoint = write_after_end  # type: ignore[method-assign]
sys.argv[0] = str(PROJECT / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
