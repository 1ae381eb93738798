"""Checkpoints are whole or not there, and a damaged one is found."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from horovod_megdet.config import Config
from horovod_megdet.engine import checkpoint, random_state, startup
from horovod_megdet.errors import EXIT_NOT_SAVED, NotSavedError, UserError

WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.count": torch.tensor(3)}


def write(run_dir: Path, step: int, **state: Any) -> Path:
    description = {
        "step": step,
        "config": Config().model_dump(mode="json"),
        "class_names": ["a"],
        "category_ids": [1],
    }
    return checkpoint.save(run_dir, WEIGHTS, state, description)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path, 5, momentum=torch.ones(3))
    saved = checkpoint.read(path)
    assert path == tmp_path / "checkpoints" / "step_00000005"
    assert saved.config == Config()
    assert torch.equal(saved.weights()["layer.weight"], WEIGHTS["layer.weight"])
    assert torch.equal(saved.state()["momentum"], torch.ones(3))
    assert checkpoint.read(tmp_path).path == path, "a run directory stands for its newest checkpoint"


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "checkpoint.json"])
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


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no whole checkpoint to resume from"):
        checkpoint.newest(tmp_path, print)


def test_a_run_without_a_checkpoint_resumes_from_the_beginning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="there is no whole checkpoint to resume from"):
        startup.look_into(tmp_path, resume=True)
    startup.write_config(tmp_path, Config())
    assert startup.look_into(tmp_path, resume=True) is None
    assert "starts from the beginning" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"already holds a run\. Add --resume"):
        startup.look_into(tmp_path, resume=False)


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


def test_prune_keeps_the_newest_and_the_best_and_clears_what_a_kill_left(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / ".writing-killed").mkdir()
    checkpoint.prune(tmp_path, keep=2, best="step_00000002")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_00000002",
        "step_00000004",
        "step_00000005",
    ]


def test_random_states_survive_a_checkpoint(tmp_path: Path) -> None:
    random_state.seed(7)
    torch.rand(3)
    path = write(tmp_path, 1, random=[random_state.capture()])
    expected = draw()
    random_state.restore(checkpoint.read(path).state()["random"][0])
    assert draw() == expected


def draw() -> list[float]:
    import random

    import numpy as np

    return [random.random(), random.gauss(), float(np.random.rand()), float(np.random.randn()), torch.rand(1).item()]
