"""The multi-scale test at the end of a training, and of its checkpoint."""

import json
from pathlib import Path
from typing import Any

import launching
import pytest

from horovod_megdet.engine import checkpoint
from horovod_megdet.report.rows import read_metrics

VIEWS = ["evaluation.scales=[48,64,80]", "evaluation.flip=true", "evaluation.merge=soft_nms"]


def rows(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == kind]


def test_the_last_evaluation_is_followed_by_one_at_all_scales(data: Path, tmp_path: Path) -> None:
    for name, settings in (("plain", []), ("views", VIEWS)):
        arguments = launching.tiny(tmp_path / name, "solver.epochs=1", "solver.milestones=[0.9]", *settings, data=data)
        code, output = launching.run("mpirun", 2, arguments, tmp_path)
        assert code == 0, output
    plain, views = tmp_path / "plain", tmp_path / "views"
    assert launching.final_hashes(plain) == launching.final_hashes(views), "it changes nothing in training"
    assert rows(plain, "evaluation") == rows(views, "evaluation"), "nor in the other evaluations"
    assert rows(plain, "multi_scale") == []
    [last] = rows(views, "multi_scale")
    assert last["step"] == rows(views, "evaluation")[-1]["step"]
    summary = json.loads((views / "summary.json").read_text())
    assert summary["multi_scale"]["AP"] == last["AP"]
    assert "multi-scale test" in output
    assert "multi-scale test" in (views / "validation.html").read_text()

    newest = checkpoint.newest(views, report=pytest.fail)
    in_run = json.loads((views / "evaluation" / f"{newest.path.name}_multi_scale.json").read_text())
    arguments = ["--config", str(views / "config.yaml"), "--run-dir", str(views), "--eval-only"]
    code, output = launching.run("python", 1, arguments, tmp_path)
    assert code == 0, output
    assert json.loads((newest.path / "detections.json").read_text()) == in_run, "on one rank as on two"
