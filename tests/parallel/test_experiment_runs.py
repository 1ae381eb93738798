"""``make experiments QUICK=1``: tiny runs under the real launcher, from the pre-training to the page."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import PROJECT, QUICK_START

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


@pytest.fixture
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
    yield process
    while process.poll() is None:
        process.terminate()
        time.sleep(1)


def results(folder: Path) -> list[Row]:
    path = folder / "lab" / "results.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def run_dir(folder: Path, cell: str) -> Path:
    (found,) = (folder / "lab").glob(f"{cell}-*")
    return found


def test_a_stopped_driver_leaves_a_checkpoint(folder: Path, driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not list((folder / "lab").glob("k01_frozen-*/checkpoints/step_*")):
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.send_signal(signal.SIGTERM)
    output, _ = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 85, output
    assert "k01_frozen, seed 0: left to another driver, or to the next start" in output
    assert results(folder) == []
    assert "the checkpoint is written" in (run_dir(folder, "k01_frozen") / "log.txt").read_text()


def test_the_next_start_goes_on_and_comes_to_the_end(folder: Path, driver: subprocess.Popen[str]) -> None:
    output, _ = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 0, output
    assert "Pre-training" not in output
    assert "Resuming after step" in (run_dir(folder, "k01_frozen") / "log.txt").read_text()
    trained, diverged = results(folder)
    assert (trained["cell"], trained["outcome"], len(trained["evaluations"])) == ("k01_frozen", "finished", 2)
    assert trained["training"][-1]["gradient_variance"] > 0
    assert (diverged["cell"], diverged["outcome"], diverged["evaluations"]) == ("k08_frozen", "diverged", [])
    assert 1 <= diverged["diverged_at_step"] <= 3
    assert not (run_dir(folder, "k01_frozen") / "checkpoints").exists()
    page = (folder / "lab" / "findings.md").read_text()
    assert f"| 8 | 64 | 0.08 | diverged at step {diverged['diverged_at_step']} (1) | not run yet |" in page
    assert (folder / "lab" / "figures" / "batch-norm.svg").exists()


def test_nothing_is_made_twice(folder: Path, driver: subprocess.Popen[str]) -> None:
    before = results(folder)
    output, _ = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 0
    assert "starts" not in output
    assert results(folder) == before
