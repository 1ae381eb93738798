"""Checkpoints are whole or not there, and a damaged one is found."""

import errno
import json
import math
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from horovod_megdet.config import Config
from horovod_megdet.engine import checkpoint, random_state, run_folder, startup
from horovod_megdet.engine.checkpoint import Position, RunDescription, TrainingState
from horovod_megdet.errors import EXIT_NOT_SAVED, NotFiniteError, NotSavedError, UserError
from horovod_megdet.models.detector import build_detector
from horovod_megdet.run_files import DESCRIPTION_FILE
from horovod_megdet.solver.gradient_noise import NoiseAverages
from horovod_megdet.solver.optimizer import build_optimizer

WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.count": torch.tensor(3)}


def write(run_dir: Path, step: int, **changes: Any) -> Path:
    state = TrainingState(optimizer={}, scaler={}, position=Position(step, 8 * step), random=[])
    run = RunDescription(Config().model_dump(mode="json"), ["a"], [1], "fingerprint", {"torch": "2"})
    return checkpoint.save(run_dir, WEIGHTS, replace(state, **changes), run, epoch=step / 10)


def test_the_position_of_version_0_1_is_read(tmp_path: Path) -> None:
    saved = checkpoint.read(write(tmp_path, 5))
    state = torch.load(saved.path / checkpoint.STATE_FILE, weights_only=True)
    state["position"] = {"step": 5, "images_seen": 40, "best_ap": 0.25, "best_checkpoint": "step_00000004"}
    torch.save(state, saved.path / checkpoint.STATE_FILE)
    assert saved.state().position == Position(5, 40, "AP", 0.25, "step_00000004", 0)


def test_the_noise_of_version_0_1_is_measured_anew(tmp_path: Path) -> None:
    saved = checkpoint.read(write(tmp_path, 5))
    state = torch.load(saved.path / checkpoint.STATE_FILE, weights_only=True)
    state["noise"] = {"weight": 0.02, "variance": {"all": 1.0}, "signal": {"all": 2.0}, "next_step": 7}
    torch.save(state, saved.path / checkpoint.STATE_FILE)
    assert saved.state().noise == NoiseAverages()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path, 5, optimizer={"momentum": torch.ones(3)})
    saved = checkpoint.read(path)
    assert path == tmp_path / "checkpoints" / "step_00000005"
    assert saved.config == Config()
    assert torch.equal(saved.weights()["layer.weight"], WEIGHTS["layer.weight"])
    assert (saved.step, saved.images_seen, saved.epoch, saved.run.class_names) == (5, 40, 0.5, ["a"])
    assert torch.equal(saved.state().optimizer["momentum"], torch.ones(3))
    assert saved.state().position == Position(5, 40)
    assert checkpoint.read(tmp_path).path == path, "a run directory stands for its newest checkpoint"


def test_equal_states_have_equal_bytes(tmp_path: Path) -> None:
    """Also where strings and tuples that were one object have become two, as in a state that was read."""
    name, betas = "backbone", (0.9, 0.999)
    one = [{"module": name, "betas": betas}, {"module": name, "betas": betas}]
    two = [{"module": "".join(name), "betas": tuple(beta for beta in betas)} for _ in range(2)]
    assert one == two
    assert two[0]["module"] is not two[1]["module"]
    paths = [write(tmp_path / str(i), 3, optimizer={"groups": groups}) for i, groups in enumerate((one, two))]
    assert checkpoint.read(paths[0]).bits() == checkpoint.read(paths[1]).bits()


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "checkpoint.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_taken(tmp_path: Path, file: str, damage: str) -> None:
    good, broken = write(tmp_path, 1), write(tmp_path, 2)
    content = bytearray((broken / file).read_bytes())
    if damage == "remove":
        (broken / file).unlink()
    elif damage == "truncate":
        (broken / file).write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0xFF
        (broken / file).write_bytes(content)
    reports: list[str] = []
    assert checkpoint.newest(tmp_path, reports.append).path == good
    assert len(reports) == 1
    assert "step_00000002" in reports[0]
    with pytest.raises(UserError, match="step_00000002"):
        checkpoint.read(broken)


def test_a_run_directory_stands_for_its_newest_whole_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the broken newer ones lack is said: who asked for the newest gets an older one."""
    good, *broken = (write(tmp_path, step) for step in (1, 2, 3))
    for path in broken:
        (path / checkpoint.STATE_FILE).write_bytes(b"damaged")
    assert checkpoint.read(tmp_path).path == good
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 2
    for path, warning in zip(reversed(broken), warnings, strict=True):
        assert warning.startswith(f"warning: {path / checkpoint.STATE_FILE}: the checkpoint is damaged")
        assert warning.endswith("Taking the one before it.")


def test_every_flipped_bit_of_the_description_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    file = path / DESCRIPTION_FILE
    content = file.read_bytes()
    for place in range(0, len(content), 97):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match="step_00000001"):
            checkpoint.read(path)


def test_the_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    checked = subprocess.run(["sha256sum", "--check", checkpoint.SUMS_FILE], cwd=path, capture_output=True, text=True)
    assert checked.returncode == 0
    assert checked.stdout.count(": OK") == 3


def test_a_checkpoint_of_version_0_1_is_read(tmp_path: Path) -> None:
    """Its digests are in its description."""
    path = write(tmp_path, 3)
    digests = checkpoint.read(path).digests
    file = path / DESCRIPTION_FILE
    of_files = {name: digests[name] for name in (checkpoint.MODEL_FILE, checkpoint.STATE_FILE)}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sha256": of_files}))
    (path / checkpoint.SUMS_FILE).unlink()
    assert checkpoint.read(path).step == 3
    (path / checkpoint.STATE_FILE).write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read(path)


@pytest.mark.parametrize("solver", [{}, {"momentum": 0.0}, {"optimizer": "adamw"}, {"ema": 1.0}], ids=str)
def test_the_expected_size_is_that_of_a_checkpoint(solver: dict[str, Any], tmp_path: Path) -> None:
    values = yaml.safe_load((Path(__file__).parents[1] / "parallel" / "tiny.yaml").read_text())
    values["solver"] |= solver
    config = Config.model_validate(values)
    with torch.device("meta"):
        expected = checkpoint.expected_bytes(build_detector(config.model, config.batch_norm, 80), config.solver)
    detector = build_detector(config.model, config.batch_norm, 80)
    optimizer = build_optimizer(detector, config.solver)
    for parameter in detector.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weights = detector.state_dict()
    state = TrainingState(
        optimizer.state_dict(), {}, Position(), [], weights=weights if config.solver.ema is not None else None
    )
    run = RunDescription(config.model_dump(mode="json"), ["a"], [1], "fingerprint", {})
    path = checkpoint.save(tmp_path, weights, state, run, epoch=1.0)
    assert sum(file.stat().st_size for file in path.iterdir()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("config", "training_data", "sentence"),
    [
        ({"solver": {"optimizer": "adamw"}}, "fingerprint", "solver.optimizer: sgd, which adamw cannot continue"),
        ({"data": {"train_annotations": "b.json"}}, "other", "b.json is not the training data that this checkpoint"),
        ({"data": {"repeat_factor": 0.25}}, "fingerprint", "data.repeat_factor: 0, so with 0.25 its position"),
    ],
    ids=["optimizer", "training data", "repeat factor"],
)
def test_what_does_not_fit_the_state_cannot_be_continued(
    tmp_path: Path, config: dict[str, Any], training_data: str, sentence: str
) -> None:
    trainer: Any = SimpleNamespace(
        config=Config.model_validate(config), train_set=SimpleNamespace(fingerprint=training_data)
    )
    with pytest.raises(UserError, match=f"step_00000001: .*{re.escape(sentence)}"):
        startup.resume_from(trainer, checkpoint.read(write(tmp_path, 1)))


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        checkpoint.newest(tmp_path, print)
    assert str(caught.value) == f"{tmp_path}: there is no whole checkpoint."


def test_a_run_without_a_checkpoint_resumes_from_the_beginning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"no whole checkpoint\. Start without --resume, or check output\.run_dir\.$"):
        run_folder.find_checkpoint(tmp_path, resume=True)
    run_folder.write_config(tmp_path, Config())
    assert run_folder.find_checkpoint(tmp_path, resume=True) is None
    assert "starts from the beginning" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"already holds a run\. Add --resume"):
        run_folder.find_checkpoint(tmp_path, resume=False)


@pytest.mark.parametrize("moment", ["safetensors", "state", "flush", "rename"])
def test_a_failure_while_writing_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    old = write(tmp_path, 1)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {
        "safetensors": (checkpoint, "save_file"),
        "state": (torch, "save"),
        "flush": (os, "fsync"),
        "rename": (Path, "rename"),
    }[moment]
    with monkeypatch.context() as patched:
        patched.setattr(*target, full)
        with pytest.raises(NotSavedError, match="No space left on device") as caught:
            write(tmp_path, 2)
    assert caught.value.exit_code == EXIT_NOT_SAVED
    assert list((tmp_path / "checkpoints").iterdir()) == [old]
    checkpoint.read(old)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_written(tmp_path: Path, value: float) -> None:
    """Neither those that are evaluated, nor with averaged weights those that train."""
    old = write(tmp_path, 1, weights=WEIGHTS)
    bad = {"layer.weight": torch.tensor([1.0, value])}
    with pytest.raises(NotFiniteError, match="The weights are not finite after step 2"):
        write(tmp_path, 2, weights=bad)
    with mock.patch.dict(WEIGHTS, bad), pytest.raises(NotFiniteError):
        write(tmp_path, 2)
    assert list((tmp_path / "checkpoints").iterdir()) == [old]


def test_prune_keeps_the_newest_and_the_best_and_clears_what_a_kill_left(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / ".writing-killed").mkdir()
    checkpoint.prune(tmp_path, keep=2, best="step_00000002", written="step_00000005")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_00000002",
        "step_00000004",
        "step_00000005",
    ]


def test_prune_keeps_what_was_just_written_and_removes_broken_ones_that_were_passed_over(tmp_path: Path) -> None:
    for step in (100, 150, 200):
        write(tmp_path, step)
    (tmp_path / "checkpoints/step_00000200" / checkpoint.STATE_FILE).write_bytes(b"")
    checkpoint.prune(tmp_path, keep=1, best=None, written="step_00000150")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000150"]


@pytest.mark.parametrize("fails", [1, 2])
def test_a_step_that_is_written_again_is_there_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    write(tmp_path, 1, optimizer={"first": 1})
    rename, calls = Path.rename, []

    def sometimes(path: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == fails:
            raise OSError(errno.EIO, "planted")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", sometimes)
        with pytest.raises(NotSavedError, match="planted"):
            write(tmp_path, 1, optimizer={"second": 2})
    (path,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.read(path).state().optimizer == {"first": 1}
    write(tmp_path, 1, optimizer={"second": 2})
    (path,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.read(path).state().optimizer == {"second": 2}


def test_random_states_survive_a_checkpoint(tmp_path: Path) -> None:
    random_state.seed(7)
    torch.rand(3)
    path = write(tmp_path, 1, random=[random_state.capture()])
    expected = draw()
    random_state.restore(checkpoint.read(path).state().random[0])
    assert draw() == expected


def draw() -> list[float]:
    import random

    import numpy as np

    return [random.random(), random.gauss(), float(np.random.rand()), float(np.random.randn()), torch.rand(1).item()]
