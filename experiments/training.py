"""Making one run: starting or resuming its training under Horovod, and writing its line of results."""

import fcntl
import hashlib
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from experiments.cells import RANKS, Run
from experiments.results import Results, Row
from horovod_megdet.cluster.launch.launcher import find_program
from horovod_megdet.config import Config
from horovod_megdet.engine.precision import has_amx
from horovod_megdet.errors import EXIT_NOT_FINITE, UserError
from horovod_megdet.report.rows import read_metrics
from horovod_megdet.run_files import CONFIG_FILE, CURVES_FILE, METRICS_FILE
from horovod_megdet.versions import versions

PROJECT = Path(__file__).resolve().parent.parent
LOG = "log.txt"

KEPT = (CONFIG_FILE, METRICS_FILE, LOG, CURVES_FILE, "lock")
"""What stays of a run directory once the run has its line; checkpoints take 60 MB each."""

POLL_SECONDS = 2.0


class ProcessRunner:
    """Runs one process after the other. Ctrl-C, SIGTERM and SIGHUP are passed on to it, and it ends in good order."""

    def __init__(self) -> None:
        self.stop_requested = False
        self._process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = True
        if self._process:
            self._process.terminate()

    def run(
        self, command: list[str], log: Path, lock: BinaryIO | None = None, poll: Callable[[], None] = lambda: None
    ) -> int:
        """Runs a command with its output added to ``log``; calls ``poll`` meanwhile; returns the exit code.

        The command inherits the file ``lock`` and so keeps it locked, should this process be killed.
        """
        with log.open("ab") as output:
            # In a session of its own: Ctrl-C reaches it through this process only.
            self._process = subprocess.Popen(
                command,
                cwd=PROJECT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()] if lock else [],
            )
        if self.stop_requested:
            self._process.terminate()
        while True:
            try:
                return self._process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                poll()


class RunFailed(UserError):
    """Training ended in a way that is no result."""


@dataclass(frozen=True)
class Laboratory:
    """Where runs are made and their results kept."""

    runs: Path
    """Scratch: the backbone, the data set and the run directories."""
    processes: ProcessRunner
    say: Callable[[str], None]

    def pretrain(self, weights: Path, arguments: list[str]) -> None:
        """Makes the pre-trained backbone unless it is there. Another driver that needs it too waits meanwhile."""
        self.runs.mkdir(parents=True, exist_ok=True)
        with (self.runs / "backbone.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if weights.exists():
                return
            self.say(f"Pre-training the backbone, two minutes with AMX and eight without: {weights}")
            log = self.runs / "backbone.log"
            command = [sys.executable, "-m", "experiments.pretraining", str(weights), *arguments]
            if self.processes.run(command, log, lock) and not self.processes.stop_requested:
                raise RunFailed(f"The backbone was not made; the end of {log}: {_last_line(log)}")

    def make(self, run: Run, results: Results, progress: Callable[[Row], None]) -> Row | None:
        """Trains, or goes on training, and writes the line of results.

        Returns None where another driver has the run, has finished it, or where a signal asked to stop. Calls
        ``progress`` with each new row of metrics that is an evaluation. Raises :class:`RunFailed`.
        """
        run_dir = self.runs / run.folder
        with _locked(run_dir) as lock:
            if lock is None or any((row["hash"], row["seed"]) == run.key for row in results.rows()):
                return None
            resumes = (run_dir / CONFIG_FILE).exists()
            started = time.monotonic()
            log = run_dir / LOG
            settings = [*run.cell.overrides, f"runtime.seed={run.seed}"]
            command = launch(RANKS, PROJECT / "train.py", run.cell.path, run_dir, settings)
            command += ["--resume"] if resumes else []
            exit_code = self.processes.run(command, log, lock, _news(run_dir, progress))
            if exit_code not in (0, EXIT_NOT_FINITE):
                if self.processes.stop_requested:
                    return None
                raise RunFailed(
                    f"{run}: exit code {exit_code}; the end of {run_dir / LOG}: {_last_line(run_dir / LOG)}"
                )
            row = describe(run, run_dir, exit_code, None if resumes else time.monotonic() - started)
            results.append(row)
            prune(run_dir)
            return row


@contextmanager
def _locked(run_dir: Path) -> Iterator[BinaryIO | None]:
    """Gives the open lock file, None where another process holds the lock; the kernel gives it back in any case."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file


def launch(ranks: int, program: Path, config: Path, run_dir: Path, settings: list[str]) -> list[str]:
    """The command that runs a program with a configuration on so many ranks of this machine."""
    megdet = find_program("megdet")
    if megdet is None:
        raise UserError("megdet is not installed in this environment: make setup installs it.")
    arguments = ["--config", str(config), "--run-dir", str(run_dir)]
    for setting in settings:
        arguments += ["--set", setting]
    return [str(megdet), "launch", "--ranks", str(ranks), "--", sys.executable, str(program), *arguments]


def _news(run_dir: Path, progress: Callable[[Row], None]) -> Callable[[], None]:
    """A function that hands each evaluation on that came since its last call."""
    path = run_dir / METRICS_FILE
    seen = -1 if not path.exists() else sum(row["kind"] == "evaluation" for row in read_metrics(path))

    def look() -> None:
        nonlocal seen
        if path.exists():
            evaluations = [row for row in read_metrics(path) if row["kind"] == "evaluation"]
            for row in evaluations[max(seen, 0) :]:
                progress(row)
            seen = len(evaluations)

    return look


def describe(run: Run, run_dir: Path, exit_code: int, seconds: float | None) -> Row:
    """The line of results of a run that ended: what was run, where, and what came out."""
    config = run.cell.config
    metrics = read_metrics(run_dir / METRICS_FILE) if (run_dir / METRICS_FILE).exists() else []
    training = [row for row in metrics if row["kind"] == "train"]
    evaluations = [row for row in metrics if row["kind"] == "evaluation"]
    row = {
        "cell": run.cell.name,
        "seed": run.seed,
        "hash": run.cell.hash,
        "outcome": "diverged" if exit_code == EXIT_NOT_FINITE else "finished",
        "diverged_at_step": _diverged_at(run_dir / LOG) if exit_code == EXIT_NOT_FINITE else None,
        "ranks": RANKS,
        "mini_batch": config.solver.mini_batch or RANKS * config.data.images_per_rank * config.solver.accumulation,
        "evaluations": [_some(row, EVALUATED) for row in evaluations],
        "training": [_some(row, MEASURED, OF_MODULES) for row in _last_before(training, evaluations)],
        "images_per_second": statistics.median(row["images_per_second"] for row in training) if training else None,
        "memory_mb": max((row["memory_mb"] for row in training), default=None),
        "seconds": seconds,
        **made_with(config),
        "config": config.model_dump(mode="json", exclude_unset=True),
    }
    return _without_nan(row)


def made_with(config: Config) -> Row:
    """What a result may depend on besides its configuration."""
    return {
        "weights": hashlib.sha256(Path(config.model.weights).read_bytes()).hexdigest()[:12],
        "versions": versions(("horovod", "torch", "torchvision")),
        "commit": _commit(),
        "processor": f"{os.cpu_count()} x {_processor()}{', with AMX' if has_amx() else ''}",
        "date": time.strftime("%Y-%m-%d"),
    }


EVALUATED = ("epoch", "step", "AP", "AP50", "AP75", "AP_small", "AP_medium", "AR_100")
MEASURED = ("epoch", "step", "lr", "loss", "gradient_variance", "squared_gradient", "noise_scale", "noise_measurements")
OF_MODULES = ("noise_scale_", "lr_factor_")
"""What the keys begin with that have a value for each module."""


def _some(row: Row, keys: tuple[str, ...], prefixes: tuple[str, ...] = ()) -> Row:
    return {key: value for key, value in row.items() if key in keys or key.startswith(prefixes)}


def _last_before(training: list[Row], evaluations: list[Row]) -> list[Row]:
    """The last row of training of each epoch, and of the run."""
    steps = [row["step"] for row in evaluations] + [math.inf]
    found = [[row for row in training if row["step"] <= step][-1:] for step in steps]
    return list({row["step"]: row for rows in found for row in rows}.values())


def _diverged_at(log: Path) -> int | None:
    found = re.findall(r"not finite .*?step (\d+)", log.read_text(errors="replace"))
    return int(found[-1]) if found else None


def prune(run_dir: Path) -> None:
    """Leaves of a run directory what a report needs."""
    for path in run_dir.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["it is empty"])[-1]


def _processor() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    return found[1] if found else platform.machine()


def _commit() -> str | None:
    """The commit of this checkout; None without git. Results and the page change while runs are made."""
    git = find_program("git")
    if git is None:
        return None
    done = subprocess.run([git, "rev-parse", "--short", "HEAD"], cwd=PROJECT, capture_output=True, text=True)
    return done.stdout.strip() or None


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: None instead."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
