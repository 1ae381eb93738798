"""Training and evaluation for Python programs, in one process or on all ranks of a Horovod program."""

import contextlib
import gc
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from horovod_megdet import comm, launched
from horovod_megdet.config import Config, as_config, merge
from horovod_megdet.engine import checkpoint as checkpoints
from horovod_megdet.engine.startup import build_for_evaluation, build_trainer, start_horovod
from horovod_megdet.engine.validation import evaluate_detector
from horovod_megdet.evaluation.coco import Evaluation
from horovod_megdet.evaluation.metrics import METRICS
from horovod_megdet.printing import quietly
from horovod_megdet.report.rows import finite, read_metrics
from horovod_megdet.run_files import METRICS_FILE


@dataclass(frozen=True)
class TrainingResult:
    """What a finished training left behind; equal on all ranks."""

    run_dir: Path
    """Folder of the run."""

    best_checkpoint: Path
    """Folder of the best checkpoint, for :func:`horovod_megdet.load`."""

    metrics: dict[str, float]
    """COCO's metrics in the last evaluation, such as ``AP`` and ``AP50``, between 0 and 1; NaN without ground truth (of
    that size)."""

    per_class: dict[str, float] = field(repr=False)
    """AP of each class in the last evaluation; NaN for a class without ground truth."""


def train(
    config: Config | Mapping[str, Any] | str | Path, *, resume: bool = False, verbose: bool = False
) -> TrainingResult:
    """Trains a detector as ``train.py`` does, to the end. Collective: every rank of a Horovod program calls it.

    Horovod is started if it does not run yet, and keeps running. With ``data.workers`` above 0, loader processes import
    the main script again: call this below ``if __name__ == "__main__":``.

    There is neither a watchdog nor a handler of signals: the program, or its launcher, decides what ends it. The random
    generators of torch, NumPy and Python are seeded, and the process is set up as ``train.py`` sets up its own: cores
    (``runtime.bind_cores``), threads and GPU of the rank, precision of matrix products, how glibc keeps memory.

    Args:
        config: the path of a YAML file; a dict with the same sections, which may have a file as its ``base``; or a
            :class:`Config`.
        resume: go on from the newest checkpoint in ``output.run_dir``, which must be new otherwise.
        verbose: print what ``train.py`` prints. Otherwise warnings go to the logger ``horovod_megdet`` of ``logging``.

    Raises :class:`UserError` for what the user can change (configuration, data, checkpoints, a loss that is not
    finite); what all ranks agree on is raised by all of them. Raises ``comm.LostRankError`` if another rank is gone.
    """
    with _printing(verbose):
        launched.check_srun()
        started = start_horovod(lambda: as_config(config))
        trainer = build_trainer(started, resume)
        try:
            trainer.train()
        finally:
            trainer.run_folder.close()
            gc.unfreeze()  # what the trainer has frozen
        return _result(Path(started.output.run_dir), trainer.position)


def evaluate(checkpoint: str | Path, override: Mapping[str, Any] | None = None, *, verbose: bool = False) -> Evaluation:
    """COCO's metrics of a checkpoint on a validation set. Collective: every rank of a Horovod program calls it.

    Args:
        checkpoint: a checkpoint folder, or a run directory for its newest checkpoint.
        override: values that differ from the configuration of the run, in its form:
            ``{"data": {"val_annotations": "test.json"}}``.
        verbose: see :func:`train`.

    Returns the metrics and the AP of each class, equal on all ranks; rank 0 also has the detections, which
    ``write_detections`` writes as COCO's results. Raises like :func:`train`.
    """
    with _printing(verbose):
        launched.check_srun()
        config = start_horovod(lambda: merge(checkpoints.read(checkpoint, lambda _: None).config, override or {}))
        built = build_for_evaluation(config, Path(checkpoint))
        return evaluate_detector(built.config, built.detector, built.val_set, built.device)


def _printing(verbose: bool) -> AbstractContextManager[None]:
    return contextlib.nullcontext() if verbose else quietly()


def _result(run_dir: Path, position: checkpoints.Position) -> TrainingResult:
    """From the run's files, because a training that was finished before it was resumed has made no evaluation."""
    with comm.agreement("result"):
        rows = read_metrics(run_dir / METRICS_FILE) if comm.is_main() else []
    found = next((row for row in reversed(rows) if row["kind"] == "evaluation"), None)
    row = comm.broadcast_object(found, "result") or {}
    return TrainingResult(
        run_dir,
        checkpoints.folder(run_dir) / str(position.best_checkpoint),
        {name: finite(row.get(name)) for name in METRICS},
        {name: finite(value) for name, value in row.get("per_class", {}).items()},
    )
