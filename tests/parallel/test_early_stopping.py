"""Training ends when its patience does, on all ranks, and goes on when it is given more."""

from pathlib import Path
from typing import Any

import launching
import pytest
from launching import Job

from horovod_megdet.engine import checkpoint
from horovod_megdet.report.rows import read_metrics

SETTINGS = [
    "solver.epochs=30",
    "solver.patience=2",
    "solver.base_lr=1e-9",  # nothing gets better
    "output.evaluate_every_epochs=0.34",
    "output.checkpoint_every_epochs=100",
    "output.best_metric=loss_classifier",
    "evaluation.loss=true",
]


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "evaluation"]


def test_training_ends_without_a_better_evaluation_and_goes_on_with_more_patience(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = launching.tiny(run_dir, *SETTINGS, data=data)
    code, output = launching.run("mpirun", 2, arguments, tmp_path)
    assert code == 0, output
    rows = evaluations(run_dir)
    losses = [row["loss_classifier"] for row in rows]
    waits = [len(losses[:end]) - 1 - losses.index(min(losses[:end])) for end in range(1, len(losses) + 1)]
    assert waits.index(2) == len(waits) - 1, "it ended when two evaluations in a row were no better, and only then"
    stopped = checkpoint.newest(run_dir, report=pytest.fail)
    assert stopped.step == rows[-1]["step"], "the last weights are kept"
    best = rows[losses.index(min(losses))]["step"]
    assert {path.name for path in checkpoint.folder(run_dir).iterdir()} == {
        checkpoint.name(s) for s in (best, stopped.step)
    }
    sentence = (
        f"Stopped early, after {stopped.step} steps, at epoch {stopped.epoch:.2f}: 2 evaluations in a row without a "
        "better loss_classifier. To go on from here, use --resume and a solver.patience above 2, or 0."
    )
    assert sentence in " ".join(output.split())
    assert f"step {stopped.step}  epoch {stopped.epoch:.2f}  validation loss {rows[-1]['loss']:.3f} (" in output

    code, output = launching.run("mpirun", 2, [*arguments, "--resume"], tmp_path)
    assert code == 0, output
    assert sentence in " ".join(output.split())
    assert len(evaluations(run_dir)) == len(rows), "it did not go on"

    job = Job("mpirun", 2, [*arguments, "--resume", "--set", "solver.patience=3"], tmp_path)
    assert job.wait_for(lambda: len(evaluations(run_dir)) > len(rows)), job.output
    job.kill()
    assert [row["step"] for row in evaluations(run_dir)][: len(rows)] == [row["step"] for row in rows]
