"""The trainer on the GPU: mixed precision, checkpoints, the same bits twice, and what the demo learns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from horovod_megdet.report.rows import read_metrics

PROJECT = Path(__file__).parent.parent.parent
SCRIPT = Path(__file__).with_name("one_rank.py")


@pytest.fixture(scope="module")
def measured(device: torch.device, run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one_rank.py found."""
    result = tmp_path_factory.mktemp("measured") / "result.json"
    run("python", 1, SCRIPT, result, device)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


@pytest.mark.parametrize("amp", ["float16", "bfloat16"])
def test_mixed_precision_trains(measured: dict[str, Any], amp: str) -> None:
    assert measured["mixed precision"][amp] == {"moved": True, "finite": True}


def test_a_checkpoint_goes_on_on_the_other_device(measured: dict[str, Any]) -> None:
    assert measured["change of device"]
    for found in measured["change of device"].values():
        assert found == {"arrived": True, "device": True, "moved": True, "finite": True}


def test_resumed_with_deterministic_kernels_is_bit_identical(measured: dict[str, Any], device: torch.device) -> None:
    on = device.type == "cuda"
    assert measured["deterministic"] == {"resumed after": 4, "steps": [8, 8], "same": True, "on": on}


def test_horovod_sums_with_nccl(measured: dict[str, Any]) -> None:
    if not measured["nccl"]:
        pytest.skip("Horovod was built without NCCL")
    assert set(measured["nccl"].values()) == {0.0}


@pytest.mark.slow
def test_the_demo_learns(device: torch.device, run: Callable[..., str], tmp_path: Path) -> None:
    """With the mini-batch of the two ranks of ``make demo``."""
    if device.type == "cpu":
        pytest.skip("`make demo` takes minutes on a CPU")
    settings = {
        "runtime.device": "cuda",
        "data.synthetic_root": tmp_path / "data",
        "data.images_per_rank": 8,
        "data.workers": 4,
        "output.evaluate_every_epochs": 10,
        "output.checkpoint_every_epochs": 10,
    }
    arguments = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    config = PROJECT / "configs" / "demo.yaml"
    run("python", 1, PROJECT / "train.py", "--config", config, "--run-dir", tmp_path / "run", *arguments)
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["kind"] == "evaluation"
    assert row["AP"] > 0.5
