"""What the folder of a run says about it, whether the run is finished, stopped or still in progress."""

import contextlib
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from horovod_megdet.config import Config, by_dotted_key
from horovod_megdet.errors import UserError
from horovod_megdet.evaluation.metrics import MAIN_METRIC, is_loss
from horovod_megdet.report.rows import Rows, column, read_metrics
from horovod_megdet.run_files import CONFIG_FILE, DESCRIPTION_FILE, METRICS_FILE, checkpoint_folders


@dataclass(frozen=True)
class Run:
    """A run as its folder shows it."""

    path: Path
    name: str
    rows: Rows
    """All rows of metrics.jsonl."""
    settings: dict[str, Any] | None
    """Values by dotted key, such as ``solver.base_lr``, with defaults for keys newer than the run; None without a
    configuration."""
    training_data: str | None
    """Fingerprint of the training set, from a checkpoint; None before the first one."""

    @functools.cached_property
    def train(self) -> Rows:
        """The rows of training."""
        return [row for row in self.rows if row["kind"] == "train"]

    @functools.cached_property
    def evaluations(self) -> Rows:
        """The rows of evaluations."""
        return [row for row in self.rows if row["kind"] == "evaluation"]

    @property
    def classes(self) -> list[str]:
        """Names of the classes that were evaluated; empty before the first evaluation."""
        return list(self.evaluations[-1].get("per_class", {})) if self.evaluations else []

    @property
    def best_metric(self) -> str:
        """What decides which of its checkpoints is the best."""
        return str((self.settings or {}).get("output.best_metric", MAIN_METRIC))

    def best_by(self, metric: str) -> tuple[float, dict[str, Any]] | None:
        """The best value of a metric that ``output.best_metric`` can name, and its evaluation, the first of equals."""
        class_name = metric.removeprefix("AP of ")
        if class_name == metric:
            values = column(self.evaluations, metric)
        else:
            values = column([row.get("per_class", {}) for row in self.evaluations], class_name)
        if not np.isfinite(values).any():
            return None
        best = int(np.nanargmin(values) if is_loss(metric) else np.nanargmax(values))
        return float(values[best]), self.evaluations[best]

    def checkpoint_of(self, row: dict[str, Any]) -> Path | None:
        """The checkpoint of the row's step; None if it is not kept."""
        found = {path.name.removeprefix("step_"): path for path in checkpoint_folders(self.path)}
        return next((path for digits, path in found.items() if digits.isdigit() and int(digits) == row["step"]), None)

    def hours(self, rows: Rows) -> np.ndarray:
        """Hours spent in training steps up to each of the rows, from images and throughput; NaN if unknown.

        Starting, evaluating and writing checkpoints do not count.
        """
        speeds = column(self.train, "images_per_second")
        if not np.isfinite(speeds).any():
            return np.full(len(rows), np.nan)
        speeds = np.where(np.isfinite(speeds), speeds, np.nanmedian(speeds))
        seen = np.concatenate([[0.0], column(self.train, "images_seen")])
        ends = np.concatenate([[0.0], np.cumsum(np.diff(seen) / speeds)])
        images = column(rows, "images_seen")
        after_last_row = np.maximum(0.0, images - seen[-1]) / speeds[-1]
        return (np.interp(images, seen, ends) + after_last_row) / 3600


def read_runs(paths: list[Path]) -> list[Run]:
    """The runs of these folders, each one once, with names that differ.

    Raises :class:`UserError` for a folder that is not a run's, and if no run has a row yet.
    """
    folders = dict.fromkeys(path.resolve() for path in paths)
    runs = [_read(folder, name) for folder, name in zip(folders, _names(list(folders)), strict=True)]
    if not any(run.rows for run in runs):
        raise UserError(f"{paths[0] / METRICS_FILE}: it has no rows to draw yet.")
    return runs


def _names(folders: list[Path]) -> list[str]:
    """The folders' names, with as many of their parents as it takes to tell them apart."""
    for length in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read(folder: Path, name: str) -> Run:
    settings, path = _settings(folder), folder / METRICS_FILE
    rows = read_metrics(path) if path.exists() or settings is None else []
    return Run(folder, name, rows, settings, _training_data(folder))


def _settings(folder: Path) -> dict[str, Any] | None:
    """The values of config.yaml. They are not validated, so that runs of other versions can be compared, too.

    A key that a run does not know has its default: it stands for what runs did before there was the key.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        return None
    try:
        return by_dotted_key(Config().model_dump(mode="json")) | by_dotted_key(
            yaml.safe_load(path.read_text(encoding="utf-8"))
        )
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{path}: not the configuration of a run ({' '.join(str(error).split())}).") from None


def _training_data(folder: Path) -> str | None:
    for path in (checkpoint / DESCRIPTION_FILE for checkpoint in reversed(checkpoint_folders(folder))):
        with contextlib.suppress(FileNotFoundError):  # a run in progress removes its older checkpoints
            try:
                return str(json.loads(path.read_text(encoding="utf-8"))["training_data"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: not the description of a checkpoint ({error}).") from None
    return None
