"""CGBN on several ranks against one process with the whole batch (1 = 3), and without it (1 != 2).

Starting ranks takes seconds, so that each launch measures everything, and the tests look at the numbers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.parallel

LAUNCHES = [("mpi", 2), ("mpi", 3), ("mpi", 4), ("gloo", 2), ("gloo", 4)]
TOLERANCE, HALF_TOLERANCE = 1e-5, 1e-2

Measured = dict[str, Any]


def _launches(*launches: tuple[str, int]) -> Callable[..., Any]:
    return pytest.mark.parametrize("layer", launches, indirect=True, ids=lambda launch: f"{launch[1]}-{launch[0]}")


@pytest.fixture(scope="module")
def measurements() -> dict[tuple[Any, ...], Measured]:
    """What has been measured so far."""
    return {}


@pytest.fixture
def layer(
    request: pytest.FixtureRequest,
    run_ranks: Callable[..., Any],
    measurements: dict[tuple[Any, ...], Measured],
    tmp_path: Path,
) -> Measured:
    """The numbers of cgbn_layer.py under one launch."""
    controller, ranks = request.param
    if request.param not in measurements:
        run_ranks("cgbn_layer.py", ranks, str(tmp_path / "result.json"), controller=controller)
        measurements[request.param] = json.loads((tmp_path / "result.json").read_text())
    return measurements[request.param]


@pytest.fixture(scope="module")
def detector(run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Measured]:
    """The numbers of cgbn_detector.py on two and on four ranks."""
    folder = tmp_path_factory.mktemp("detector")
    for ranks in (2, 4):
        run_ranks("cgbn_detector.py", ranks, str(folder / f"{ranks}.json"))
    return {ranks: json.loads((folder / f"{ranks}.json").read_text()) for ranks in (2, 4)}


@_launches(*LAUNCHES)
def test_outputs_gradients_and_statistics_are_those_of_one_process(layer: Measured) -> None:
    wrong = {
        (group, case, name): error
        for group, cases in layer["exactness"].items()
        for case, errors in cases.items()
        for name, error in errors.items()
        if error > (HALF_TOLERANCE if "half" in case else TOLERANCE)
    }
    assert not wrong


@_launches(("mpi", 4))
def test_groups_of_two_were_compared(layer: Measured) -> None:
    assert layer["exactness"].keys() == {"world", "pairs"}


@_launches(*LAUNCHES)
def test_number_of_messages(layer: Measured) -> None:
    # forward, backward, backward with recomputation (nothing of the forward pass again), evaluation
    assert layer["messages"] == {"one_pass": [1, 1, 1, 0], "two_pass": [2, 1, 1, 0]}


@_launches(*LAUNCHES)
def test_a_layer_can_be_used_twice(layer: Measured) -> None:
    assert max(layer["reuse"].values()) < TOLERANCE


@_launches(*LAUNCHES)
def test_ten_training_steps_give_the_weights_of_one_process_only_with_cgbn(layer: Measured) -> None:
    assert layer["training"]["synchronised"] < TOLERANCE
    assert layer["training"]["local"] > 100 * TOLERANCE, "statistics of each rank alone must not pass"


@_launches(*LAUNCHES)
def test_averaging_running_statistics_includes_the_spread_of_the_means(layer: Measured) -> None:
    errors = layer["averaged statistics"]
    assert errors.pop("between ranks") == 0
    assert max(errors.values()) < TOLERANCE


@pytest.mark.parametrize("ranks", [2, 4])
def test_detector_gradients_are_those_of_one_process(detector: dict[int, Measured], ranks: int) -> None:
    assert detector[ranks]["float32, RPN"] < TOLERANCE
    assert detector[ranks]["float64"] < 1e-9


@pytest.mark.parametrize("ranks", [2, 4])
def test_messages_have_one_order_on_all_ranks(detector: dict[int, Measured], ranks: int) -> None:
    assert all(detector[ranks]["order"].values()), detector[ranks]["order"]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["stages", "blocks"])
def test_recomputation_changes_no_bit_and_sends_nothing(detector: dict[int, Measured], ranks: int, kind: str) -> None:
    assert all(detector[ranks]["recomputation"][kind].values()), detector[ranks]["recomputation"]
