"""The files that a run writes while it goes on: whole or not there, whatever happens meanwhile."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from horovod_megdet.config import Config
from horovod_megdet.engine.checkpoint import Position
from horovod_megdet.engine.run_folder import RunFolder
from horovod_megdet.evaluation.coco import Evaluation
from horovod_megdet.evaluation.detections import Detections
from horovod_megdet.evaluation.metrics import METRICS
from horovod_megdet.report.rows import read_metrics

LIMIT = 30.0
"""Seconds until a test that waits in vain fails."""


def evaluation(count: int = 3) -> Evaluation:
    """One image with ``count`` detections."""
    boxes = np.tile(np.array([[1, 2, 11, 22]], np.float32), (count, 1))
    arrays = boxes, np.full(count, 0.5, np.float32), np.ones(count, np.int32)
    return Evaluation(dict.fromkeys(METRICS, 0.5), {"a": 0.5}, 1, [7], Detections.of_images([(1, arrays)]))


def config(run_dir: Path) -> Config:
    return Config.model_validate({"output": {"run_dir": str(run_dir), "pictures": 0, "loggers": []}})


def row(step: int) -> dict[str, float]:
    return {"step": step, "images_seen": 8 * step, "epoch": step / 10}


def detections_file(run_dir: Path, step: int) -> Path:
    return run_dir / "evaluation" / f"step_{step:08d}.json"


@pytest.fixture
def files(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder(config(tmp_path))
    folder.open_log(total_images=100, position=Position())
    yield folder
    folder.close()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds the writing of detections until this is set."""
    release, write = threading.Event(), Evaluation.write_detections

    def write_late(self: Evaluation, path: str | Path) -> None:
        assert release.wait(LIMIT)
        write(self, path)

    monkeypatch.setattr(Evaluation, "write_detections", write_late)
    yield release
    release.set()


def test_training_goes_on_while_detections_are_written(files: RunFolder, held: threading.Event, tmp_path: Path) -> None:
    files.log_evaluation(row(1), evaluation())
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1], "the row is there at once"
    assert not detections_file(tmp_path, 1).exists()
    held.set()
    files.close()
    assert len(json.loads(detections_file(tmp_path, 1).read_text())) == 3
    with Image.open(tmp_path / "curves.png") as curves:
        curves.load()


def test_the_next_evaluation_waits_for_the_files_of_the_last(
    files: RunFolder, held: threading.Event, tmp_path: Path
) -> None:
    """So that at most one evaluation's detections are held in memory for this, and in order."""
    files.log_evaluation(row(1), evaluation())
    following = threading.Thread(target=files.log_evaluation, args=(row(2), evaluation(4)))
    following.start()
    following.join(0.2)
    assert following.is_alive()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    held.set()
    following.join(LIMIT)
    files.close()
    assert [len(json.loads(detections_file(tmp_path, step).read_text())) for step in (1, 2)] == [3, 4]


def test_a_full_disk_is_a_warning_and_the_next_evaluation_tries_again(
    files: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        files.log_evaluation(row(1), evaluation())
        files.wait()
    error = capfd.readouterr().err
    assert f"{detections_file(tmp_path, 1)}: cannot be written: No space left on device. Training" in error
    assert list((tmp_path / "evaluation").iterdir()) == [], "no half file"
    files.log_evaluation(row(2), evaluation())
    files.close()
    assert detections_file(tmp_path, 2).exists()


def test_metrics_that_a_full_disk_refuses_are_a_warning_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    files = RunFolder(config(tmp_path))
    files.open_log(total_images=100, position=Position())
    log = files._log
    assert log is not None
    log._file.close()
    log._file = Path("/dev/full").open("a", encoding="utf-8", buffering=1)  # noqa: SIM115 - the run folder closes it
    files.log_evaluation(row(1), evaluation())
    files.close("Finished.")
    captured = capfd.readouterr()
    assert captured.err.count("warning: metrics could not be written: [Errno 28] No space left on device. ") == 2
    assert "Finished." in captured.out


def test_a_bug_in_the_thread_is_not_lost(files: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Evaluation, path: str | Path) -> None:
        raise ZeroDivisionError("planted")

    with monkeypatch.context() as patched:
        patched.setattr(Evaluation, "write_detections", wrong)
        files.log_evaluation(row(1), evaluation())
        with pytest.raises(ZeroDivisionError, match="planted"):
            files.log_evaluation(row(2), evaluation())
    files.log_evaluation(row(3), evaluation())


KILLED = """
import os, signal, sys
from pathlib import Path
import test_run_folder as tests
folder = tests.RunFolder(tests.config(Path(sys.argv[1])))
folder.open_log(total_images=100, position=tests.Position())
folder.log_evaluation(tests.row(1), tests.evaluation())
folder.wait()
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
folder.log_evaluation(tests.row(2), tests.evaluation())
folder.close()
"""


def test_a_kill_while_detections_are_written_leaves_no_half_file(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(json.loads(detections_file(tmp_path, 1).read_text())) == 3
    assert not detections_file(tmp_path, 2).exists()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
