"""CGBN on several ranks equals one process with the whole batch; without CGBN they differ.

Starting ranks takes seconds, so each launch measures everything once and the tests check the numbers.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest

LAUNCHES = [("mpi", 2), ("mpi", 3), ("mpi", 4), ("gloo", 2)]
TOLERANCE, HALF_TOLERANCE = 1e-5, 1e-2

Measured = dict[str, Any]


def _launches(*launches: tuple[str, int], of: str = "layer") -> Callable[..., Any]:
    return pytest.mark.parametrize(
        of, launches, indirect=True, ids=lambda launch: f"{launch[1]}-{launch[0]}", scope="module"
    )


_detector_launches = _launches(("mpi", 2), ("mpi", 4), ("gloo", 2), of="detector")


@pytest.fixture(scope="module")
def layer(
    request: pytest.FixtureRequest, run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Measured:
    """The numbers of cgbn_layer.py under one launch."""
    return _measured("cgbn_layer.py", request.param, run_ranks, tmp_path_factory)


@pytest.fixture(scope="module")
def detector(
    request: pytest.FixtureRequest, run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Measured:
    """The numbers of cgbn_detector.py under one launch."""
    return _measured("cgbn_detector.py", request.param, run_ranks, tmp_path_factory)


def _measured(
    script: str, launch: tuple[str, int], run_ranks: Callable[..., Any], folders: pytest.TempPathFactory
) -> Measured:
    controller, ranks = launch
    result = folders.mktemp("measured") / "result.json"
    run_ranks(script, ranks, str(result), controller=controller)
    return json.loads(result.read_text())


@_launches(*LAUNCHES)
def test_outputs_gradients_and_statistics_equal_those_of_one_process(layer: Measured) -> None:
    wrong = {
        (group, case, name): error
        for group, cases in layer["exactness"].items()
        for case, errors in cases.items()
        for name, error in errors.items()
        if error > (HALF_TOLERANCE if "half" in case else TOLERANCE)
    }
    assert not wrong


@_launches(*LAUNCHES)
def test_four_ranks_compare_groups_of_two_as_well(layer: Measured) -> None:
    assert layer["exactness"].keys() == ({"world", "pairs"} if layer["ranks"] == 4 else {"world"})


@_launches(*LAUNCHES)
def test_number_of_messages(layer: Measured) -> None:
    # forward, backward, backward with recomputation (nothing of the forward pass again), evaluation
    assert layer["messages"] == {"one_pass": [1, 1, 1, 0], "two_pass": [2, 1, 1, 0]}


@_launches(*LAUNCHES)
def test_a_layer_can_be_used_twice(layer: Measured) -> None:
    assert max(layer["reuse"].values()) < TOLERANCE


@_launches(*LAUNCHES)
def test_ten_training_steps_give_the_weights_of_one_process_only_with_cgbn(layer: Measured) -> None:
    assert layer["training"]["synchronized"] < TOLERANCE
    assert layer["training"]["local"] > 100 * TOLERANCE, "a test that local statistics pass would be too weak"


@_launches(*LAUNCHES)
def test_averaged_running_variance_includes_the_variance_of_the_means(layer: Measured) -> None:
    errors = layer["averaged statistics"]
    assert errors.pop("between ranks") == 0
    assert max(errors.values()) < TOLERANCE


@_detector_launches
def test_detector_gradients_equal_those_of_one_process(detector: Measured) -> None:
    assert detector["float32, RPN"] < TOLERANCE
    assert detector["float64"] < 1e-9


@_detector_launches
def test_messages_have_the_same_order_on_all_ranks(detector: Measured) -> None:
    assert all(detector["order"].values()), detector["order"]


@_detector_launches
@pytest.mark.parametrize("kind", ["stages", "blocks"])
def test_recomputation_changes_no_bit_and_sends_no_message(detector: Measured, kind: str) -> None:
    assert all(detector["recomputation"][kind].values()), detector["recomputation"]
