"""train.py with a rank 1 that sleeps in each forward pass."""

import runpy
import sys
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(PROJECT))

from horovod_megdet import comm  # noqa: E402
from horovod_megdet.data.loader import Batch  # noqa: E402
from horovod_megdet.engine.trainer import Trainer  # noqa: E402

SECONDS = 0.5

forward = Trainer.forward


def sleep_and_forward(self: Trainer, batch: Batch) -> Any:
    if comm.rank() == 1:
        time.sleep(SECONDS)
    return forward(self, batch)


if __name__ == "__main__":
    Trainer.forward = sleep_and_forward  # type: ignore[method-assign]
    sys.argv[0] = str(PROJECT / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
