"""The folder of a run: what makes it one, and what rank 0 writes into it besides the checkpoints.

config.yaml          the resolved configuration: from now on the folder holds a run
metrics.jsonl        one line per row of metrics; also drawn, in curves.png
tensorboard/         the same, for the loggers of the configuration; also mlflow/, wandb/
evaluation/          the detections of each evaluation
validation.html      the last one's beside the ground truth; its numbers are in summary.json
checkpoints/         see checkpoint.py; at the end, README.md of the best and the last one (model_card.py)
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovod_megdet import comm
from horovod_megdet.config import Config
from horovod_megdet.data.coco import CocoDataset
from horovod_megdet.engine import checkpoint
from horovod_megdet.engine.checkpoint import Position, RunDescription
from horovod_megdet.errors import UserError
from horovod_megdet.evaluation.coco import Evaluation
from horovod_megdet.evaluation.table import render
from horovod_megdet.files import atomic_write
from horovod_megdet.printing import warn
from horovod_megdet.progress import progress
from horovod_megdet.run_files import CONFIG_FILE, SUMMARY_FILE, checkpoint_folders
from horovod_megdet.solver.schedule import Schedule

if TYPE_CHECKING:
    from horovod_megdet.engine.loggers import Loggers
    from horovod_megdet.engine.metrics import MetricsLog


def find_checkpoint(run_dir: Path, resume: bool) -> checkpoint.Checkpoint | None:
    """On rank 0, finds the checkpoint to resume from, or makes sure that there is no run yet; other ranks return None.

    A run that ended before its first checkpoint resumes from the beginning: then rank 0 returns None, too. Raises
    :class:`UserError`.
    """
    if not comm.is_main():
        return None
    try:
        started, saved = (run_dir / CONFIG_FILE).exists(), checkpoint_folders(run_dir)
    except OSError as error:
        raise UserError(f"{run_dir}: the run directory cannot be used: {error.strerror or error}.") from None
    if resume and started and not saved:
        warn(f"{run_dir}: the run has no checkpoint yet and starts from the beginning.")
        return None
    if resume:
        return checkpoint.newest(run_dir, remedy="Start without --resume, or check output.run_dir.")
    if started or saved:
        raise UserError(
            f"{run_dir}: this folder already holds a run. Add --resume to go on with it, or give another folder with "
            "--run-dir."
        )
    return None


def write_config(run_dir: Path, config: Config) -> None:
    """Writes the resolved configuration, once all else is known to be good: from now on the folder holds a run."""
    try:
        with atomic_write(run_dir / CONFIG_FILE) as file:
            file.write(config.to_yaml().encode())
    except UserError as error:
        raise UserError(f"{error} Choose another run directory with --run-dir.") from None


class RunFolder:
    """What training writes as it goes on. Only rank 0 writes: on the other ranks every method returns at once.

    Training needs none of these files, so one that cannot be written while it runs is a warning. The detections and the
    curves of an evaluation are written by a thread while training goes on, until the next evaluation or :meth:`close`
    at the latest.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.output.run_dir)
        self._config = config
        self._log: MetricsLog | None = None
        self._loggers: Loggers | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._written: Future[None] | None = None

    def open_log(self, total_images: int, position: Position, repeats: bool = False) -> None:
        """Opens the log of metrics; rows behind ``position``, of a run that is resumed before its end, are dropped.

        So is an evaluation at it, if what is due there ``repeats``. Collective. Raises :class:`UserError` for a log
        that is damaged or cannot be opened.
        """
        with comm.agreement("metrics log"):
            if comm.is_main():
                # As what draws below, they take a second to import, for which all other ranks would wait.
                from horovod_megdet.engine.loggers import Loggers
                from horovod_megdet.engine.metrics import MetricsLog

                self._log = MetricsLog(self.path, total_images, position.images_seen, position.step, repeats)
                self._loggers = Loggers(self._config, position.step)

    def log_training(self, row: dict[str, Any]) -> None:
        """Writes a row of training metrics."""
        if self._log:
            self._write_row({"kind": "train", **row}, self._log.train)

    def log_change(self, row: dict[str, Any]) -> None:
        """Writes a row about a change of the ranks, in an elastic job."""
        if self._log:
            self._write_row({"kind": "ranks", **row}, self._log.change)

    def log_evaluation(self, row: dict[str, Any], evaluation: Evaluation, multi_scale: bool = False) -> None:
        """Writes a row of evaluation metrics, and begins to write the detections and the curves."""
        if self._log:
            self.wait()
            row = {"kind": "multi_scale" if multi_scale else "evaluation", **row, **evaluation.row()}
            self._write_row(row, partial(self._log.evaluation, table=render(evaluation, multi_scale)))
            name = checkpoint.name(row["step"]) + ("_multi_scale" if multi_scale else "")
            detections = self.path / "evaluation" / f"{name}.json"
            self._written = self._thread.submit(self._write_evaluation, detections, evaluation)

    def log_checkpoint(self, path: Path) -> None:
        """Tells the loggers where a checkpoint has been written."""
        if self._loggers:
            self._loggers.call("checkpoint", str(path.resolve()))

    def _write_row(self, row: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        with _warned("metrics"):
            write(row)
        if self._loggers:
            self._loggers.call("row", row)

    def _write_evaluation(self, detections: Path, evaluation: Evaluation) -> None:
        from horovod_megdet.report.curves import write_curves

        with _warned("detections and curves"):
            evaluation.write_detections(detections)
            write_curves(self.path)

    def wait(self) -> None:
        """Waits until the files of the last evaluation are written. Raises what their thread raised, which is a bug."""
        written, self._written = self._written, None
        if written:
            progress.set("writing the detections and curves of the last evaluation")
            written.result()

    def write_report(
        self,
        description: RunDescription,
        position: Position,
        epoch: float,
        val_set: CocoDataset,
        evaluation: Evaluation,
        multi_scale: Evaluation | None,
    ) -> None:
        """Writes the summary and the page of validation images, with the detections of the multi-scale test, if any."""
        if self._log and self._loggers:
            from horovod_megdet.report.page import VALIDATION_PAGE
            from horovod_megdet.report.pictures import write_validation_page

            with _warned("the report"):
                title = f"{self.path.name}, epoch {epoch:.2f}" + (", multi-scale test" if multi_scale else "")
                pictures = self._config.output.pictures
                cards = write_validation_page(
                    self.path / VALIDATION_PAGE, val_set, multi_scale or evaluation, count=pictures, title=title
                )
                self._loggers.call("pictures", {card.name: card.beside() for card in cards}, position.step)
                summary = asdict(description) | asdict(position) | evaluation.row()
                summary["best_value"] = position.best_value if math.isfinite(position.best_value) else None
                if multi_scale:
                    summary["multi_scale"] = multi_scale.row()
                with atomic_write(self.path / SUMMARY_FILE) as file:
                    file.write(json.dumps(summary, indent=1).encode())

    def write_model_cards(
        self,
        description: RunDescription,
        position: Position,
        schedule: Schedule,
        train_set: CocoDataset,
        val_set: CocoDataset,
    ) -> None:
        """Writes into the folders of the best and the last checkpoint what they are."""
        if self._log:
            from horovod_megdet.engine.model_card import write_model_cards

            self.wait()  # for the curves
            with _warned("the model card"):
                write_model_cards(self.path, description, position, schedule, train_set, val_set)

    def close(self, closing_line: str = "") -> None:
        """Ends the progress bar, completes the files, and prints the ``closing_line`` of a run that is finished.

        Nothing is written from then on.
        """
        if self._log and self._loggers:
            self.wait()
            if closing_line:
                self._log.console.print(closing_line)
            with _warned("metrics"):
                self._log.close()
            progress.set("waiting for output.loggers")
            self._loggers.close(finished=bool(closing_line))
            self._log = self._loggers = None


@contextlib.contextmanager
def _warned(what: str) -> Iterator[None]:
    """Turns a failure to write something that training does not need into a warning."""
    try:
        yield
    except (OSError, UserError) as error:
        reason = str(error).rstrip(".")
        warn(f"{what} could not be written: {reason}. Training does not depend on it.")
