"""The solver on several ranks: gradient noise against single images and a known covariance, and other optimizers.

Starting ranks takes seconds, so that each launch measures everything, and the tests look at the numbers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Measured = dict[str, Any]


@pytest.fixture(scope="module", params=[2, 4], ids=lambda ranks: f"{ranks}-ranks")
def measured(
    request: pytest.FixtureRequest, run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Measured:
    """The numbers of solver_noise.py."""
    result = tmp_path_factory.mktemp("measured") / "result.json"
    run_ranks("solver_noise.py", request.param, str(result), timeout=240)
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def trained_folder(run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What solver_trainer.py writes on two ranks."""
    folder = tmp_path_factory.mktemp("trained")
    run_ranks("solver_trainer.py", 2, str(folder / "result.json"), timeout=480)
    return folder


@pytest.fixture(scope="module")
def trained(trained_folder: Path) -> Measured:
    """The numbers of solver_trainer.py on two ranks."""
    return json.loads((trained_folder / "result.json").read_text())


def test_a_detector_has_the_variance_of_its_single_images(measured: Measured) -> None:
    errors = measured["single images"]
    assert errors.pop("fp16", 0.0) < 0.01, "the mean was rounded to float16"
    assert max(errors.values()) < 1e-6


def test_under_cgbn_the_gradients_of_passes_and_ranks_are_compared(measured: Measured) -> None:
    assert measured["cgbn"] < 1e-6


def test_the_loss_scale_makes_no_difference(measured: Measured) -> None:
    assert measured["loss scale"] < 1e-6


def test_the_estimates_are_unbiased(measured: Measured) -> None:
    for modules in measured["known covariance"].values():
        assert modules.keys() == {"backbone", "fpn", "rpn", "box_head", "all"}
        for name, (variance_error, signal_error, *deviations) in modules.items():
            assert max(abs(variance_error), abs(signal_error)) < 5, f"{name}: more than 5 standard errors off"
            assert max(deviations) < 0.02, "a bias of 10 % would show"


def test_steps_that_say_nothing_do_not_count(measured: Measured) -> None:
    assert measured["bad input"] == {
        "good": 5,
        "image skipped on one rank": 0,
        "nan in one module of one rank": 0,
        "zero": {name: [0.0, 0.0] for name in ("backbone", "fpn", "rpn", "box_head", "all")},
    }


def test_all_ranks_agree(measured: Measured) -> None:
    assert measured["agreement"] == {"the same": True, "not in every step": True}


def test_a_measured_step_has_one_message_more_and_no_other_step_has(trained: Measured) -> None:
    without, measured = trained["messages"]["never"], trained["messages"]["3"]
    assert len(without) == len(measured) == 6
    for step, (plain, names) in enumerate(zip(without, measured, strict=True)):
        assert names == plain + ["gradient_noise"] * (step % 3 == 0)


def test_the_noise_is_that_of_gradients_that_are_not_clipped(trained: Measured) -> None:
    noise = {name: step["noise"] for name, step in trained["clipping"].items()}
    assert noise["half"] == noise["no limit"]
    assert noise["half"]["variance"]["all"] > 0


def test_averaged_gradients_are_clipped_to_the_limit(trained: Measured) -> None:
    """Where each rank clipped its own, the average would be shorter than the limit."""
    lengths = {name: step["length"] for name, step in trained["clipping"].items()}
    assert lengths["half"] == pytest.approx(lengths["no limit"] / 2, rel=1e-4)
    assert lengths["twice"] == lengths["no limit"] > 0


def test_passes_of_one_process_have_the_gradients_of_as_many_ranks(
    trained_folder: Path, run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    run_ranks("solver_trainer.py", 1, str(tmp_path / "result.json"), "gradients")
    of_passes, of_ranks = (torch.load(folder / "gradients.pt") for folder in (tmp_path, trained_folder))
    assert of_passes.keys() == of_ranks.keys()
    differences = {name: float((of_passes[name] - of_ranks[name]).norm()) for name in of_ranks}
    assert not {name for name, difference in differences.items() if not difference <= 1e-5 * of_ranks[name].norm()}


@pytest.mark.parametrize("name", ["lars", "adamw", "sgd, channels last"])
def test_an_optimizer_takes_the_same_steps_under_horovod(trained: Measured, name: str) -> None:
    assert trained["optimizers"][name]


@pytest.mark.parametrize("name", ["float32", "float16 messages"])
def test_gradients_with_channels_last_are_averaged_as_others(trained: Measured, name: str) -> None:
    """In float32 the convolutions of both layouts round differently, in float64 they agree (unit/test_detector.py)."""
    assert 0 < trained["layouts"][name] < 0.02


def test_a_step_with_an_image_that_cannot_be_read_does_not_count(trained: Measured) -> None:
    assert trained["steps that count"] == 5


def test_steps_of_the_warm_up_count_until_it_ends(trained: Measured) -> None:
    assert trained["steps after the warm-up"] == 3
