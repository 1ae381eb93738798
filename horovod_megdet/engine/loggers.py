"""Where the numbers of a run go, in addition to its own files: TensorBoard, MLflow, Weights & Biases.

Training needs none of them. Each works in a thread of its own on rank 0, so that neither an import, a database nor a
network holds up a step; one that is not installed, raises or does not keep up is a warning, once, and is left out from
then on.
"""

import json
import logging
import math
import os
import queue
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import numpy as np
from PIL import Image

from horovod_megdet.config import Config, by_dotted_key
from horovod_megdet.files import atomic_write
from horovod_megdet.printing import warn
from horovod_megdet.run_files import CONFIG_FILE

LONGEST_QUEUE = 1000
"""Rows that wait for a slow logger; with more it is given up."""

PATIENCE = 30.0
"""Seconds at the end of a run for the loggers to write what is left."""

PROJECT = "megdet"
"""Name of MLflow's experiment and of W&B's project, where their environment variables do not give another."""

Pictures = dict[str, Image.Image]
"""By the name of the validation image: its ground truth beside the detections."""


class Logger(Protocol):
    """What a logger takes. Its constructor takes the configuration and the step that a run is resumed at, or 0."""

    def row(self, row: dict[str, Any]) -> None:
        """Takes a row of metrics as in metrics.jsonl."""

    def checkpoint(self, path: str) -> None:
        """Takes the path of a checkpoint that has been written."""

    def pictures(self, pictures: Pictures, step: int) -> None:
        """Takes the pictures of the validation page."""

    def close(self, finished: bool) -> None:
        """Writes everything. A run that is not ``finished`` was stopped and may be resumed."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run directory. Steps that a resumed run makes again replace the old."""

    def __init__(self, config: Config, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(config.output.run_dir) / "tensorboard"
        self.step = step
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        self.writer.add_text(CONFIG_FILE, _as_code(config.to_yaml()), step)

    def row(self, row: dict[str, Any]) -> None:
        self.step = row["step"]
        for key, value in scalars(row).items():
            self.writer.add_scalar(key, value, self.step)

    def checkpoint(self, path: str) -> None:
        self.writer.add_text("checkpoint", _as_code(path), self.step)

    def pictures(self, pictures: Pictures, step: int) -> None:
        for name, picture in pictures.items():
            self.writer.add_image(f"validation/{name}", np.asarray(picture), step, dataformats="HWC")

    def close(self, finished: bool) -> None:
        self.writer.close()


class MLflow:
    """A run in the store of ``MLFLOW_TRACKING_URI``, or in a database in ``mlflow/`` of the run directory.

    The configuration becomes parameters and the artifact ``config.yaml``. A resumed run goes on in the same MLflow run,
    where the store still has it.
    """

    def __init__(self, config: Config, step: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # training contacts no server that nobody has named
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it reports each table that it creates
        folder = Path(config.output.run_dir).resolve() / "mlflow"
        folder.mkdir(exist_ok=True)
        server = os.environ.get("MLFLOW_TRACKING_URI")
        self.client = MlflowClient(server or f"sqlite:///{folder / 'mlflow.db'}")
        experiment = self._experiment(None if server else (folder / "artifacts").as_uri())
        remembered = folder / "run_id"
        if found := self._resumed(remembered):
            self.run_id = found
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id = self.client.create_run(experiment, run_name=Path(config.output.run_dir).name).info.run_id
            _remember(remembered, self.run_id)
            parameters = [
                Param(key, json.dumps(value)) for key, value in by_dotted_key(config.model_dump(mode="json")).items()
            ]
            for start in range(0, len(parameters), 100):  # the most that a server takes at once
                self.client.log_batch(self.run_id, params=parameters[start : start + 100])
        self.client.log_text(self.run_id, config.to_yaml(), CONFIG_FILE)

    def _experiment(self, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        if found := self.client.get_experiment_by_name(name):
            return found.experiment_id
        try:
            return self.client.create_experiment(name, artifacts)
        except MlflowException:  # another run was faster
            if found := self.client.get_experiment_by_name(name):
                return found.experiment_id
            raise

    def _resumed(self, remembered: Path) -> str | None:
        from mlflow.exceptions import MlflowException

        if not remembered.exists():
            return None
        run_id = remembered.read_text(encoding="utf-8")
        try:
            return str(self.client.get_run(run_id).info.run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def row(self, row: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(key, value, now, row["step"]) for key, value in scalars(row).items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def checkpoint(self, path: str) -> None:
        self.client.set_tag(self.run_id, "checkpoint", path)

    def pictures(self, pictures: Pictures, step: int) -> None:
        for number, (name, picture) in enumerate(pictures.items(), start=1):
            self.client.log_image(self.run_id, picture, f"validation/{number}_{Path(name).stem}.png")

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")


class WandB:
    """A W&B run in ``wandb/`` of the run directory; offline unless ``WANDB_MODE`` says otherwise.

    A resumed run keeps its id: online it goes on in the same run; offline it writes another folder of it.
    """

    def __init__(self, config: Config, step: int) -> None:
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # would call its makers
        import wandb

        run_dir = Path(config.output.run_dir)
        remembered = run_dir / "wandb" / "run_id"
        run_id = remembered.read_text(encoding="utf-8") if remembered.exists() else secrets.token_hex(4)
        _remember(remembered, run_id)
        self.image = wandb.Image
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_dir.name,
            dir=run_dir,
            mode=mode,
            id=run_id,
            resume="allow" if mode == "online" else None,
            config=config.model_dump(mode="json"),
            # Nobody is there to type a key; and without its server, W&B holds up the end of the process as well.
            settings=wandb.Settings(silent=True, console="off", login_timeout=1, init_timeout=PATIENCE),
        )

    def row(self, row: dict[str, Any]) -> None:
        self.run.log(scalars(row), step=row["step"])

    def checkpoint(self, path: str) -> None:
        self.run.summary["checkpoint"] = path

    def pictures(self, pictures: Pictures, step: int) -> None:
        self.run.log({f"validation/{name}": self.image(picture) for name, picture in pictures.items()}, step=step)

    def close(self, finished: bool) -> None:
        self.run.finish()


LOGGERS: dict[str, Callable[[Config, int], Logger]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


class Background:
    """A logger in a thread of its own, which takes calls in their order and never raises or waits."""

    def __init__(self, name: str, config: Config, step: int) -> None:
        self.name = name
        self._given_up = False
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(LONGEST_QUEUE)
        # A daemon: the process may end while it hangs.
        self._thread = Thread(target=self._work, args=(config, step), name=f"logger {name}", daemon=True)
        self._thread.start()

    def call(self, method: str, *arguments: Any) -> None:
        """Calls a method of :class:`Logger` when all calls before it are done."""
        if self._given_up:
            return
        try:
            self._calls.put_nowait((method, arguments))
        except queue.Full:
            self._give_up(f"does not keep up: {LONGEST_QUEUE} entries wait for it")

    def join(self, deadline: float) -> None:
        """Waits for the last call, ``close``, until ``time.monotonic()`` reaches ``deadline``."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._give_up(f"has not written everything within {PATIENCE:g} s")

    def _work(self, config: Config, step: int) -> None:
        try:
            logger = LOGGERS[self.name](config, step)
            method = ""
            while method != "close" and not self._given_up:
                method, arguments = self._calls.get()
                getattr(logger, method)(*arguments)
        except ImportError as error:
            self._give_up(f"cannot be imported: {error}. Install it with: pip install 'horovod-megdet[{self.name}]'")
        except Exception as error:
            # Whatever these packages raise, W&B's and MLflow's own errors among them: no reason to end a training.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self._give_up(f"fails: {_without_password(lines[0])}")

    def _give_up(self, sentence: str) -> None:
        if not self._given_up:
            self._given_up = True
            warn(f"output.loggers: {self.name} {sentence.rstrip('.')}. Training goes on without it.")


def _without_password(sentence: str) -> str:
    """What stands before the host in an address may be a name and a password."""
    return re.sub(r"://[^/@\s]+@", "://***@", sentence)


class Loggers:
    """All loggers of a run, on rank 0."""

    def __init__(self, config: Config, step: int) -> None:
        self._loggers = [Background(name, config, step) for name in dict.fromkeys(config.output.loggers)]

    def call(self, method: str, *arguments: Any) -> None:
        """Calls a method of every :class:`Logger`, without waiting."""
        for logger in self._loggers:
            logger.call(method, *arguments)

    def close(self, finished: bool) -> None:
        """Waits until everything is written, :data:`PATIENCE` seconds at most."""
        self.call("close", finished)
        deadline = time.monotonic() + PATIENCE
        for logger in self._loggers:
            logger.join(deadline)


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row, by names such as ``train/loss``."""
    return {
        f"{row['kind']}/{key}": value
        for key, value in row.items()
        if isinstance(value, int | float) and key not in ("step", "images_seen") and not math.isnan(value)
    }


def _remember(path: Path, run_id: str) -> None:
    with atomic_write(path) as file:
        file.write(run_id.encode())


def _as_code(text: str) -> str:
    """Markdown that shows the text as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())
