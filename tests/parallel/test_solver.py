"""The solver on several ranks: gradient noise against single images and a known covariance, and other optimizers.

Starting ranks takes seconds, so that each launch measures everything, and the tests look at the numbers.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.parallel

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
def trained(run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """The numbers of solver_trainer.py on two ranks."""
    result = tmp_path_factory.mktemp("trained") / "result.json"
    run_ranks("solver_trainer.py", 2, str(result))
    return json.loads(result.read_text())


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
    assert trained["clipped"] == trained["not clipped"]
    assert trained["clipped"]["variance"]["all"] > 0


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
