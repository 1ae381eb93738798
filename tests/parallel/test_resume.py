"""Stopping at any moment and going on: nothing is lost, and on the same ranks not a bit differs."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import launching
import pytest
import torch
from launching import Job

from horovod_megdet.engine import checkpoint
from horovod_megdet.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from horovod_megdet.report.rows import read_metrics

KILLS = int(os.environ.get("MEGDET_TEST_KILLS", "4"))
"""How often the job is killed; set it higher to look harder, up to half the number of its checkpoints."""

SETTINGS = [
    "solver.epochs=4",
    "solver.milestones=[3]",
    "output.evaluate_every_epochs=2",
    "output.checkpoint_every_epochs=0.17",
    "solver.lr_modulation=agvm",
    "solver.ema=0.5",
    "data.repeat_factor=0.6",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run of two ranks that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, output = launching.run("mpirun", 2, launching.tiny(folder / "run", *SETTINGS, data=data), folder)
    assert code == 0, output
    assert "images of the 24: repeated are the images of" in " ".join(output.split())
    state = checkpoint.newest(folder / "run", report=pytest.fail).state()
    assert max(abs(factor - 1) for factor in state.agvm.factors.values()) > 0.001
    assert state.weights is not None
    averages = launching.final_weights(folder / "run")
    assert all(
        not torch.equal(averages[name], state.weights[name])
        for name in averages
        if ".bn1." in name and "num" not in name
    )
    return folder / "run"


def test_killed_at_random_moments_and_resumed_is_bit_identical(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    chance = random.Random(os.environ.get("MEGDET_TEST_SEED", "1"))
    run_dir = tmp_path / "run"
    arguments = launching.tiny(run_dir, *SETTINGS, data=data)
    for kill in range(KILLS):
        job = Job("mpirun", 2, [*arguments, *(["--resume"] if kill else [])], tmp_path)
        start = newest_step(run_dir)
        # Alternately: a random moment after the next checkpoint, and in the middle of writing one.
        assert job.wait_for(lambda start=start: newest_step(run_dir) > start), job.output
        if kill % 2:
            assert job.wait_for(lambda: any(checkpoint.folder(run_dir).glob(".writing-*"))), job.output
        else:
            time.sleep(chance.uniform(0, 0.5))
        assert job.process.poll() is None, f"ended before it was killed:\n{job.output}"
        job.kill()
    code, output = launching.run("mpirun", 2, [*arguments, "--resume"], tmp_path)
    assert code == 0, output
    assert launching.final_hashes(run_dir) == launching.final_hashes(undisturbed)
    assert results(run_dir) == results(undisturbed), "every row of metrics is there once"
    assert not list(checkpoint.folder(run_dir).glob(".writing-*"))


def newest_step(run_dir: Path) -> str:
    return max((path.name for path in checkpoint.folder(run_dir).glob("step_*")), default="")


def results(run_dir: Path) -> list[tuple[int, float | None]]:
    """Step and AP of every row of metrics; the training rows' means start anew with a resumed run."""
    return [(row["step"], row.get("AP")) for row in read_metrics(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("launcher", "number"), [("python", signal.SIGINT), ("mpirun", signal.SIGUSR1), ("gloo", signal.SIGTERM)]
)
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(
    data: Path, tmp_path: Path, launcher: str, number: signal.Signals
) -> None:
    ranks = 1 if launcher == "python" else 2
    arguments = launching.tiny(tmp_path / "run", "solver.epochs=50", data=data)
    job = Job(launcher, ranks, arguments, tmp_path)
    job.wait_for_output("step 8 ")
    os.kill(job.ranks()[-1], number)
    assert job.wait(20) == EXIT_STOPPED, job.output
    assert "Start again with --resume" in job.output
    assert ("noise is not measured" in job.output) == (ranks == 1)
    stopped = checkpoint.newest(tmp_path / "run", report=pytest.fail)
    assert stopped.step >= 8
    code, output = launching.run(
        launcher, ranks, [*arguments, "--resume", "--set", f"solver.epochs={stopped.epoch + 0.3}"], tmp_path
    )
    assert code == 0, output
    assert f"Resuming after step {stopped.step}," in output


def test_a_second_interrupt_stops_at_once(data: Path, tmp_path: Path) -> None:
    # A step of many passes, so that the first interrupt is still waiting for its end.
    arguments = launching.tiny(tmp_path / "run", "solver.accumulation=200", data=data)
    job = Job("python", 1, arguments, tmp_path)
    job.wait_for_output("learning rate")
    pid = job.ranks()[0]
    os.kill(pid, signal.SIGINT)
    job.wait_for_output("Press Ctrl-C again")
    os.kill(pid, signal.SIGINT)
    assert job.wait(5) == EXIT_INTERRUPTED
    assert not list(checkpoint.folder(tmp_path / "run").glob("*"))


@pytest.mark.parametrize("ranks", [1, 3])
def test_resuming_on_another_number_of_ranks_goes_on_at_the_same_image(
    undisturbed: Path, data: Path, tmp_path: Path, ranks: int
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    start = checkpoint.newest(run_dir, report=pytest.fail)
    launcher = "python" if ranks == 1 else "mpirun"
    settings = [*SETTINGS, "solver.epochs=5", "solver.lr_modulation=none"]
    arguments = [*launching.tiny(run_dir, *settings, data=data), "--resume"]
    code, output = launching.run(launcher, ranks, arguments, tmp_path)
    assert code == 0, output
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["step"] > start.step]
    assert rows[0]["images_seen"] > start.images_seen
    # the rate of the new mini-batch, after the milestone
    assert rows[-2]["lr"] == pytest.approx(0.01 * 2 * ranks / 4 * 0.1)
    end = checkpoint.newest(run_dir, report=pytest.fail)
    assert (end.images_seen - start.images_seen) % (2 * ranks) == 0
    groups = end.state().optimizer["param_groups"]
    assert {group["lr"] for group in groups} == {rows[-2]["lr"]}, "without AGVM its factors are gone"


def test_factors_of_agvm_are_those_saved_on_another_number_of_ranks(
    undisturbed: Path, data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    saved = checkpoint.newest(run_dir, report=pytest.fail).state().agvm
    # In the warm-up factors do not change.
    settings = [*SETTINGS, "solver.epochs=4.5", "solver.warmup_epochs=10"]
    code, output = launching.run("mpirun", 3, [*launching.tiny(run_dir, *settings, data=data), "--resume"], tmp_path)
    assert code == 0, output
    state = checkpoint.newest(run_dir, report=pytest.fail).state()
    assert state.agvm == saved
    row = next(row for row in reversed(read_metrics(run_dir / "metrics.jsonl")) if row["kind"] == "train")
    assert {module: row[f"lr_factor_{module}"] for module in saved.factors} == saved.factors
    for group in state.optimizer["param_groups"]:
        assert group["lr"] == row["lr"] * saved.factors[group["module"]]


def test_a_broken_checkpoint_is_passed_over(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    newest, before = sorted(checkpoint.folder(run_dir).glob("step_*"))[:-3:-1]
    weights = newest / checkpoint.MODEL_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    arguments = [*launching.tiny(run_dir, *SETTINGS, data=data), "--resume"]
    code, output = launching.run("mpirun", 2, arguments, tmp_path)
    assert code == 0, output
    assert f"{weights}: the checkpoint is damaged" in output
    assert f"Resuming after step {int(before.name.removeprefix('step_'))}," in output
    assert launching.final_hashes(run_dir) == launching.final_hashes(undisturbed)


def test_more_than_two_ranks_repeat_bit_for_bit_when_deterministic(data: Path, tmp_path: Path) -> None:
    weights = []
    for attempt in ("first", "second"):
        arguments = launching.tiny(tmp_path / attempt / "run", "runtime.deterministic=true", data=data)
        code, output = launching.run("mpirun", 4, arguments, tmp_path / attempt)
        assert code == 0, output
        weights.append(launching.final_weights(tmp_path / attempt / "run"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
