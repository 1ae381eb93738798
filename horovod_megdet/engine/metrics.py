"""Metrics of a run: averages on every rank; rank 0 writes them to the terminal or log and to a file."""

import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from horovod_megdet.evaluation.table import loss_in_words
from horovod_megdet.files import atomic_write
from horovod_megdet.report.rows import read_metrics
from horovod_megdet.report.tables import console
from horovod_megdet.run_files import METRICS_FILE
from horovod_megdet.solver.gradient_noise import gain_in_words


class Window:
    """Sums since the last row of metrics."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        self.steps = self.images = 0
        self.lr = self._step_seconds = self._work_seconds = self._data_seconds = 0.0

    def add_losses(self, losses: dict[str, float]) -> None:
        """Adds the losses of a step."""
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value

    def add_step(self, lr: float, images: int, seconds: float, collective_seconds: float, data_seconds: float) -> None:
        """Adds one optimizer step, with the time of it that this rank spent in collectives and waited for images."""
        self.lr = lr
        self.steps += 1
        self.images += images
        self._step_seconds += seconds
        self._work_seconds += seconds - collective_seconds
        self._data_seconds += data_seconds

    @property
    def step_seconds(self) -> float:
        """Mean time of a step on this rank."""
        return self._step_seconds / self.steps

    @property
    def work_seconds(self) -> float:
        """Mean time of a step that this rank spent outside collectives."""
        return self._work_seconds / self.steps

    @property
    def data_seconds(self) -> float:
        """Mean time of a step that this rank waited for images."""
        return self._data_seconds / self.steps

    def row(self) -> dict[str, float]:
        """Mean losses, the last learning rate and the throughput."""
        losses = {name: value / self.steps for name, value in self.losses.items()}
        rate = self.images / self._step_seconds
        return {"lr": self.lr, "loss": math.fsum(losses.values()), **losses, "images_per_second": rate}


class MetricsLog:
    """Writes rows of metrics, on rank 0. A resumed run first drops the rows that lie behind its checkpoint."""

    def __init__(self, run_dir: Path, total_images: int, images_seen: int, step: int, repeats: bool = False) -> None:
        """With ``repeats``, an evaluation at ``step`` is dropped, too: it will be done again."""
        self.console = console()
        self.total_images = total_images
        path = run_dir / METRICS_FILE
        rows = read_metrics(path) if path.exists() else []
        kept = [row for row in rows if row["step"] <= step - (repeats and row["kind"] in ("evaluation", "multi_scale"))]
        with atomic_write(path) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in kept)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=total_images, completed=images_seen)
        self._progress.start()

    def train(self, row: dict[str, Any]) -> None:
        """Writes one row of training metrics, the means since the row before."""
        self._write(row)
        self._progress.update(self._task, completed=row["images_seen"])
        remaining = round(max(0, self.total_images - row["images_seen"]) / row["images_per_second"])
        self.console.print(
            f"step {row['step']}  epoch {row['epoch']:.2f}  {loss_in_words(row)}  lr {row['lr']:.4g}  "
            f"{row['images_per_second']:.1f} images/s  step {row['step_seconds']:.2f} s "
            f"(work of a rank {row['work_seconds_min']:.2f} to {row['work_seconds_max']:.2f})  "
            f"data {row['data_seconds']:.2f} s  memory {row['memory_mb']:.0f} MB  "
            + (f"{gain_in_words(row['noise_scale'], row['mini_batch'])}  " if "noise_scale" in row else "")
            + f"ETA {timedelta(seconds=remaining)}"
        )

    def evaluation(self, row: dict[str, Any], table: Table) -> None:
        """Writes one row of evaluation metrics and prints its table."""
        self._write(row)
        self.console.print(table)
        if "loss" in row:
            self.console.print(f"step {row['step']}  epoch {row['epoch']:.2f}  validation {loss_in_words(row)}")

    def change(self, row: dict[str, Any]) -> None:
        """Writes one row about a change of the ranks, and says it in a sentence."""
        self._write(row)
        self.console.print(describe_change(row))

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Ends the progress bar and flushes the file."""
        self._progress.stop()
        self._file.close()


def describe_change(row: dict[str, Any]) -> str:
    """``12 -> 8 ranks at epoch 3.2 (lost: 4 on node03): mini-batch 24 -> 16, learning rate 0.03 -> 0.02``."""
    hosts = {name: row[f"hosts_{name}"] for name in ("lost", "joined")}
    parts = [
        f"{name}: " + ", ".join(f"{n} on {host}" for host, n in ranks.items()) for name, ranks in hosts.items() if ranks
    ]
    return (
        f"{row['ranks_before']} -> {row['ranks']} ranks at epoch {row['epoch']:.2f}"
        + (f" ({'; '.join(parts)})" if parts else "")
        + f": mini-batch {row['mini_batch_before']} -> {row['mini_batch']}, "
        f"learning rate {row['lr_before']:.4g} -> {row['lr']:.4g}"
    )
