"""``make experiments QUICK=1``: tiny runs under the real launcher, from the pre-training to the page."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import PROJECT, QUICK_START

from experiments.__main__ import QUICK
from experiments.cells import CELLS
from experiments.results import Row

CELL = """
base: {base}
model: {{backbone_norm: frozen, fpn_norm: none}}
data: {{images_per_rank: 2}}
solver: {{base_lr: {rate}}}
"""
SECONDS = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two cells: one that trains in many small steps and one that diverges."""
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "cells").mkdir()
    for name, rate in (("k01_frozen", 0.01), ("k08_frozen", 1e6)):
        (folder / "cells" / f"{name}.yaml").write_text(CELL.format(base=CELLS.parent / "base.yaml", rate=rate))
    return folder


@contextlib.contextmanager
def driver(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The driver, started; whatever happens, it and what it started are ended."""
    command = [sys.executable, "-m", "experiments", "--quick", "--only", "*", "--folder", str(folder / "lab")]
    process = subprocess.Popen(
        [*command, "--cells", str(folder / "cells")],
        cwd=PROJECT,
        env=QUICK_START | {"PYTHONPATH": f"{QUICK_START['PYTHONPATH']}{os.pathsep}{PROJECT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        while process.poll() is None:
            process.terminate()
            time.sleep(1)


def results(folder: Path) -> list[Row]:
    path = folder / "lab" / "results.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def run_dir(folder: Path, cell: str) -> Path:
    (found,) = (folder / "lab").glob(f"{cell}-*")
    return found


@dataclass(frozen=True)
class Ended:
    """What a driver leaves."""

    code: int
    output: str
    rows: list[Row]
    log: str
    """Of the first cell's run."""


def end_of(process: subprocess.Popen[str], folder: Path) -> Ended:
    output, _ = process.communicate(timeout=SECONDS)
    return Ended(process.returncode, output, results(folder), (run_dir(folder, "k01_frozen") / "log.txt").read_text())


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Ended:
    """A driver that is stopped in its first cell."""
    deadline = time.monotonic() + SECONDS
    with driver(folder) as process:
        while not list((folder / "lab").glob("k01_frozen-*/checkpoints/step_*")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        return end_of(process, folder)


@pytest.fixture(scope="module")
def finished(folder: Path, stopped: Ended) -> Ended:
    """The next driver, which comes to the end."""
    with driver(folder) as process:
        return end_of(process, folder)


def test_a_stopped_driver_leaves_a_checkpoint(stopped: Ended) -> None:
    assert stopped.code == 85, stopped.output
    assert "k01_frozen, seed 0: stopped, or another driver has made it or makes it now" in stopped.output
    assert stopped.rows == []
    assert "the checkpoint is written" in stopped.log


def test_the_next_start_goes_on_and_comes_to_the_end(folder: Path, finished: Ended) -> None:
    assert finished.code == 0, finished.output
    assert "Pre-training" not in finished.output
    assert "Resuming after step" in finished.log
    trained, diverged = finished.rows
    assert (trained["cell"], trained["outcome"], len(trained["evaluations"])) == ("k01_frozen", "finished", 2)
    assert trained["training"][-1]["gradient_variance"] > 0
    assert (diverged["cell"], diverged["outcome"], diverged["evaluations"]) == ("k08_frozen", "diverged", [])
    assert 1 <= diverged["diverged_at_step"] <= 3
    assert not (run_dir(folder, "k01_frozen") / "checkpoints").exists()
    page = (folder / "lab" / "findings.md").read_text()
    assert f"| 8 | 64 | 0.08 | diverged at step {diverged['diverged_at_step']} (1) | not run yet |" in page
    assert (folder / "lab" / "figures" / "batch-norm.svg").exists()


def test_nothing_is_made_twice(folder: Path, finished: Ended) -> None:
    with driver(folder) as process:
        again = end_of(process, folder)
    assert again.code == 0, again.output
    assert "starts" not in again.output
    assert again.rows == finished.rows


@pytest.mark.usefixtures("finished")
def test_a_mini_batch_on_all_ranks_has_the_gradients_of_one_process(folder: Path) -> None:
    """With the weights of the pre-training."""
    settings = [*QUICK, f"model.weights={folder}/lab/backbone.pth", f"data.synthetic_root={folder}/lab/data"]
    settings += ["batch_norm.bn_size=world", "data.images_per_rank=2", "solver.epochs=0.5"]
    settings += ["solver.milestones=[]", "solver.gammas=[]"]
    command = [sys.executable, "-m", "experiments.mini_batch_256", "--ranks", "2", "--folder", str(folder / "lab")]
    command += ["--result", str(folder / "one.json"), *(word for setting in settings for word in ("--set", setting))]
    path = f"{QUICK_START['PYTHONPATH']}{os.pathsep}{PROJECT}"
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env=QUICK_START | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((folder / "one.json").read_text())
    assert result["gradient_norm"] > 0
    assert result["gradient_difference"] < 1e-5
    assert result["steps"]
