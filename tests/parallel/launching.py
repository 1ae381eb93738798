"""Starts train.py under each launcher, for the tests."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from horovod_megdet.engine import checkpoint

PROJECT = Path(__file__).resolve().parent.parent.parent
TINY = Path(__file__).with_name("tiny.yaml")
BIN = Path(sys.executable).parent

_ELASTIC = [str(BIN / "horovodrun"), "--gloo", "--network-interfaces", "lo"]
_ELASTIC += ["--host-discovery-script", "./hosts.sh", "--blacklist-cooldown-range", "1", "1"]
LAUNCHERS = {
    "python": [],
    "mpirun": [str(BIN / "mpirun"), "--oversubscribe", "--bind-to", "none", "-np"],
    "horovodrun": [str(BIN / "horovodrun"), "-np"],
    "gloo": [str(BIN / "horovodrun"), "--gloo", "-np"],
    # This machine under two names: two hosts for Horovod, each with a local rank 0.
    "two_hosts": [str(BIN / "horovodrun"), "--gloo", "-H", "localhost:1,127.0.0.1:1", "-np"],
    # Likewise, with the hosts that the program hosts.sh prints; one that was lost is tried again after a second.
    "elastic": [*_ELASTIC, "--min-np", "1", "-np"],
    "elastic_pair": [*_ELASTIC, "--min-np", "2", "-np"],
}
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMP_NUM_THREADS": "1",
    "OMPI_MCA_btl": "^ofi",  # sleeps for a second in MPI_Finalize, and is for one-sided messages only
}
QUICK_START = ENVIRONMENT | {"PYTHONPATH": str(PROJECT / "tests" / "quick_start")}
"""Without torch's compiler (see tests/quick_start), for trainings whose result or message is looked at. Scripts that
compare numbers with a reference, and test_training.py, run in :data:`ENVIRONMENT`, with the torch that users have."""


class Job:
    """A running training job with all its processes in one session, its output in a file."""

    started_by_test: ClassVar[list["Job"]] = []
    """The jobs that the running test has started."""

    def __init__(
        self,
        launcher: str,
        ranks: int,
        arguments: list[str],
        folder: Path,
        script: Path | None = None,
        environment: Mapping[str, str] = QUICK_START,
    ) -> None:
        prefix = [*LAUNCHERS[launcher], str(ranks)] if launcher != "python" else []
        program = [sys.executable, str(script or PROJECT / "train.py"), *arguments]
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*prefix, *program],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started = time.monotonic()
        self.started_by_test.append(self)

    @property
    def output(self) -> str:
        """What the job has printed so far."""
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float = 240) -> int:
        """Waits for the launcher's exit code; kills whatever still runs after ``timeout`` seconds."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.output}") from None

    def wait_for(self, condition: Callable[[], Any], timeout: float = 60) -> bool:
        """Polls until ``condition()`` holds (True) or the job has ended (False)."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, f"waited {timeout} s in vain:\n{self.output}"
            time.sleep(0.002)
        return True

    def wait_for_output(self, text: str, timeout: float = 60) -> None:
        """Polls until the job has printed ``text``; it must not end before."""
        assert self.wait_for(lambda: text in self.output, timeout), f"ended without {text!r}:\n{self.output}"

    def ranks(self) -> list[int]:
        """Process ids of the ranks: the session's processes that run the script, without loader workers."""
        children = _parents()
        tree = [self.process.pid, *_descendants(self.process.pid, children)]
        running = [pid for pid in tree if _is_rank(pid)]
        return [pid for pid in running if children.get(pid) not in running]

    def kill(self) -> None:
        """Sends SIGKILL to the launcher and all processes below it, unless it has ended."""
        if self.process.poll() is not None:
            return  # its process id may be another's
        for pid in [self.process.pid, *_descendants(self.process.pid, _parents())]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


def run(
    launcher: str,
    ranks: int,
    arguments: list[str],
    folder: Path,
    timeout: float = 240,
    environment: Mapping[str, str] = QUICK_START,
) -> tuple[int, str]:
    """Runs train.py to its end; returns exit code and output."""
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(launcher, ranks, arguments, folder, environment=environment)
    code = job.wait(timeout)
    return code, job.output


def tiny(run_dir: Path, *settings: str, data: Path) -> list[str]:
    """Arguments of train.py for the tiny configuration, with its data in the folder ``data``."""
    arguments = ["--config", str(TINY), "--run-dir", str(run_dir), "--set", f"data.synthetic_root={data}"]
    for setting in settings:
        arguments += ["--set", setting]
    return arguments


def final_hashes(run_dir: Path) -> dict[str, str]:
    """SHA-256 of weights and training state in the newest checkpoint: equal only if every bit is."""
    newest = checkpoint.newest(run_dir, report=print)
    return {"name": newest.path.name, **newest.bits()}


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights in the newest checkpoint."""
    return checkpoint.newest(run_dir, report=print).weights()


def _parents() -> dict[int, int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    return parents


def _descendants(root: int, parents: dict[int, int]) -> list[int]:
    found, frontier = [], [root]
    while frontier:
        frontier = [pid for pid, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def _is_rank(pid: int) -> bool:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return arguments[0].endswith(b"python") and any(argument.endswith(b"train.py") for argument in arguments[1:2])
