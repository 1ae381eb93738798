"""Two ranks on one GPU: cross-GPU BN equals one process on the CPU in float64, and the ranks stay together.

NCCL refuses two ranks on one GPU, so the messages go through the host, with Gloo (``comm.gpu_is_shared``).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cgbn_layer
import pytest
import torch

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module")
def measured(device: torch.device, run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The numbers of two_ranks.py."""
    result = tmp_path_factory.mktemp("measured") / "result.json"
    run("gloo", 2, SCRIPT, result, device)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def test_layers_equal_those_of_one_process(measured: dict[str, Any]) -> None:
    assert len(measured["layers"]) == 2 * len(cgbn_layer.CASES), "each case with both algorithms"
    wrong = {
        (case, name): (error, bound)
        for case, errors in measured["layers"].items()
        for name, (error, bound) in errors.items()
        if not error <= bound
    }
    assert not wrong


def test_the_gradient_of_the_detector_equals_that_of_one_process(measured: dict[str, Any]) -> None:
    assert measured["detector, float64"] < 1e-9


@pytest.mark.parametrize("name", ["float32", "bfloat16, recomputation", "float16 messages"])
def test_ranks_train_together(measured: dict[str, Any], device: torch.device, name: str) -> None:
    assert measured["training"][name] == {"device": device.type, "same": True, "moved": True, "finite": True}


def test_an_overflow_on_one_rank_makes_all_skip_the_step(measured: dict[str, Any]) -> None:
    scales = [step.pop("scales") for step in measured["overflow"]]
    assert scales == [[64.0, 64.0], [32.0, 32.0], [32.0, 32.0]]
    assert measured["overflow"] == [{"same": True, "moved": moved, "finite": True} for moved in (True, False, True)]
