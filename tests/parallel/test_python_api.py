"""``megdet.train`` and ``megdet.evaluate``: in one process, and inside a Horovod program."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import launching
import pytest
import yaml

from horovod_megdet.engine import checkpoint
from horovod_megdet.report.rows import read_metrics

Run = Callable[..., CompletedProcess[str]]

ALONE = """
import logging, random, signal, sys
from pathlib import Path
import horovod_megdet as megdet
data, folder, tiny = sys.argv[1:]
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
config = {"base": tiny, "data": {"synthetic_root": data}}
config["solver"] = {"epochs": 1, "mini_batch": 4, "milestones": [], "gammas": []}
run_dir = Path(folder) / "run"
result = megdet.train(config | {"output": {"run_dir": run_dir}})
assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
assert result.run_dir == run_dir
evaluation = megdet.evaluate(result.best_checkpoint)
assert repr(evaluation.metrics) == repr(result.metrics), (evaluation.metrics, result.metrics)
assert repr(evaluation.per_class) == repr(result.per_class)
none = megdet.evaluate(run_dir, {"model": {"score_threshold": 1.0}})
assert len(none.detections.scores) == 0 < len(evaluation.detections.scores)
evaluation.write_detections(Path(folder) / "detections.json")
finished = megdet.train(megdet.Config.model_validate(megdet.load(run_dir).config), resume=True)
assert repr(finished) == repr(result)
longer = megdet.train(run_dir / "config.yaml", resume=True)
assert longer.best_checkpoint == result.best_checkpoint
for bad, sentence in [
    (config | {"output": {"run_dir": run_dir}}, "already holds a run"),
    ({"base": tiny, "solver": {"lr": 1}}, "the configuration: unknown key `solver.lr`"),
    ({"solver": {"epochs": "many"}}, "the configuration: `solver.epochs`"),
    ("nowhere.yaml", "nowhere.yaml: no such configuration file"),
]:
    try:
        megdet.train(bad)
    except megdet.UserError as error:
        assert sentence in str(error), error
    else:
        raise AssertionError(sentence)
try:
    megdet.evaluate(run_dir, {"data": {"val_annotation": "x"}})
except megdet.UserError as error:
    assert "did you mean `data.val_annotations`?" in str(error), error
"""


def run_alone(program: str, *arguments: str, folder: Path) -> CompletedProcess[str]:
    environment = launching.ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(map(str, [launching.PROJECT]))}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_in_one_process_nothing_is_printed(data: Path, tmp_path: Path) -> None:
    done = run_alone(ALONE, str(data), str(tmp_path), str(launching.TINY), folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    newest = checkpoint.newest(tmp_path / "run", report=pytest.fail)
    assert newest.images_seen == 24
    assert (newest.path / "README.md").exists()
    assert json.loads((tmp_path / "detections.json").read_text())


WARNED = """
import sys
import horovod_megdet as megdet
data, tiny = sys.argv[1:]
config = {"base": tiny, "data": {"synthetic_root": data}, "output": {"run_dir": "run", "loggers": ["wandb"]}}
config["solver"] = {"epochs": 0.2, "milestones": [], "gammas": []}
sys.modules["wandb"] = None  # as if it were not installed
megdet.train(config)
print("---")
config["output"]["run_dir"] = "printed"
megdet.train(config, verbose=True)
"""


def test_warnings_go_to_logging_and_the_rest_is_printed_when_asked_for(data: Path, tmp_path: Path) -> None:
    done = run_alone(WARNED, str(data), str(launching.TINY), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    quiet, verbose = done.stdout.split("---\n")
    assert quiet == ""
    assert "Schedule" in verbose
    assert "Finished after" in verbose
    first, second = done.stderr.splitlines()
    assert first.startswith("output.loggers: wandb cannot be imported")
    assert second == f"warning: {first}"


def reports(folder: Path) -> list[dict[str, Any]]:
    """What the ranks of ``python_api.py`` have written, by rank."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json"))]


@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_inside_a_horovod_program(run_ranks: Run, data: Path, tmp_path: Path, controller: str) -> None:
    """On two ranks, which raise the same errors and go on; the numbers are those of train.py, bit for bit."""
    output = run_ranks("python_api.py", 2, str(data), str(tmp_path), "train", controller=controller).stdout
    assert "Schedule" not in output
    report, second = reports(tmp_path)
    assert json.dumps(report) == json.dumps(second)
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert {name: value for name, value in report["metrics"].items() if value == value} == {
        name: row[name] for name in report["metrics"] if row[name] is not None
    }
    assert json.dumps(report["again"]) == json.dumps(report["metrics"])
    sentences = ["already holds a run", "configuration differs", "unknown key `solver.lr`", "missing.yaml: no such"]
    for error, sentence in zip(report["errors"], sentences, strict=True):
        assert sentence in error
    assert "(rank 1 on " in report["errors"][-1]
    if controller == "mpi":
        arguments = launching.tiny(tmp_path / "cli", "solver.mini_batch=4", data=data)
        code, output = launching.run("mpirun", 2, arguments, tmp_path / "cli_log")
        assert code == 0, output
        ours, theirs = (checkpoint.newest(tmp_path / name, report=pytest.fail).weights() for name in ("run", "cli"))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours)


def test_groups_need_a_horovod_that_was_started_for_them(run_ranks: Run, data: Path, tmp_path: Path) -> None:
    run_ranks("python_api.py", 4, str(data), str(tmp_path), "groups")
    found = reports(tmp_path)
    assert len(found) == 4
    for report in found:
        for error, setting in zip(report["errors"], ["DYNAMIC_PROCESS_SETS=1", "FUSION_THRESHOLD=0"], strict=True):
            assert f"set HOROVOD_{setting} before it is started" in error


def test_the_example(run_ranks: Run, data: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(launching.TINY.read_text())
    config["data"]["synthetic_root"] = str(data)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    example = str(launching.PROJECT / "examples" / "train.py")
    output = run_ranks(example, 2, str(tmp_path / "tiny.yaml"), str(tmp_path / "run")).stdout
    assert output.count("AP ") == 1, output
    assert f"The best checkpoint: {tmp_path}/run/checkpoints/step_00000006" in output
