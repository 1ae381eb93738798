"""AGVM: the factors of the learning rates, from the same averages as the noise scale."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horovod_megdet.config import Config
from horovod_megdet.errors import UserError
from horovod_megdet.models.modules import MODULES
from horovod_megdet.solver.agvm import AGVM, check_agvm, dissimilarity
from horovod_megdet.solver.gradient_noise import NoiseAverages
from horovod_megdet.solver.schedule import make_schedule

OTHERS = ("fpn", "rpn", "box_head")


def averages(variance: dict[str, float], signal: dict[str, float]) -> NoiseAverages:
    found = NoiseAverages()
    found.add(dict.fromkeys(MODULES, 1.0) | variance, dict.fromkeys(MODULES, 1.0) | signal)
    return found


def test_dissimilarity_is_one_minus_the_expected_cosine_of_two_halves() -> None:
    # |mean of n/2 images|^2 = 4 + 24 / 6, and both halves share |g|^2 = 4
    assert dissimilarity(averages({"rpn": 24.0}, {"rpn": 4.0}), "rpn", mini_batch=12) == pytest.approx(1 - 4 / 8)


@pytest.mark.parametrize(
    ("variance", "signal", "expected"), [(1.0, -3.0, 1.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (-1.0, 1.0, 0.0)]
)
def test_dissimilarity_at_the_limits(variance: float, signal: float, expected: float) -> None:
    assert dissimilarity(averages({"rpn": variance}, {"rpn": signal}), "rpn", 16) == expected


def test_one_update_is_the_formula_of_the_paper() -> None:
    measured = averages({"backbone": 2.0, "fpn": 3.0}, {"rpn": 3.0, "box_head": 0.5})
    phi = {module: dissimilarity(measured, module, 64) for module in MODULES}
    agvm = AGVM()
    agvm.update(measured, 64, epochs_after_warmup=0.3)
    for module in OTHERS:
        ratio = (phi["backbone"] + 1e-6) / (phi[module] + 1e-6)
        assert 0.5 < ratio < 10
        assert agvm.factors[module] == pytest.approx(0.97 + 0.03 * ratio**0.5)
    assert agvm.factors["backbone"] == 1.0
    assert agvm.factors["fpn"] < 1 < agvm.factors["rpn"], "the noisier module becomes slower"


def test_factors_stay_within_the_square_roots_of_the_limits() -> None:
    agvm = AGVM()
    # phi of the backbone is near 1, of the RPN near 0; that of the box head is far above that of the backbone
    noisy = averages({"backbone": 100.0, "rpn": 0.0}, {"backbone": 1e-3})
    quiet = averages({"backbone": 0.0, "rpn": 100.0}, {"rpn": 1e-3})
    for measured, expected in ((noisy, 10**0.5), (quiet, 0.5**0.5)):
        for update in range(2000):
            agvm.update(measured, 8, (agvm.updated_at or 0.2) + 0.021 * (update + 1))
        assert agvm.factors["rpn"] == pytest.approx(expected)


def test_nothing_changes_before_its_time() -> None:
    agvm, measured = AGVM(), averages({"rpn": 50.0}, {})
    agvm.update(measured, 64, epochs_after_warmup=0.19)
    agvm.update(NoiseAverages(), 64, epochs_after_warmup=0.3)
    assert agvm == AGVM()
    agvm.update(measured, 64, epochs_after_warmup=0.3)
    moved = dict(agvm.factors)
    agvm.update(measured, 64, epochs_after_warmup=0.319)
    assert agvm.factors == moved != AGVM().factors


@given(steps=st.integers(1, 40))
def test_how_far_the_factors_move_depends_on_epochs_and_not_on_steps(steps: int) -> None:
    measured = averages({"rpn": 50.0}, {"box_head": 9.0})
    reference, agvm = AGVM(), AGVM()
    for updates, each in ((1, reference), (steps, agvm)):
        each.update(measured, 64, 0.3)
        for number in range(1, updates + 1):
            each.update(measured, 64, 0.3 + 0.9 * number / updates)
    assert agvm.factors == pytest.approx(reference.factors)


def test_where_noise_is_all_there_is_nothing_changes() -> None:
    agvm = AGVM()
    noise = averages(dict.fromkeys(MODULES, 1e6), dict.fromkeys(OTHERS, 1e-3))
    agvm.update(noise, 16, 0.5)
    assert agvm.factors == pytest.approx(AGVM().factors, abs=1e-3)


def check(ranks: int, **changes: Any) -> None:
    config = Config.model_validate({"solver": {"lr_modulation": "agvm"}, **changes})
    check_agvm(config, make_schedule(config.solver, 100, ranks, 2))


def test_agvm_needs_something_to_compare() -> None:
    check(ranks=2)
    check(ranks=1, solver={"lr_modulation": "agvm", "accumulation": 2})
    check(ranks=1, solver={"lr_modulation": "none"})
    with pytest.raises(UserError, match="one rank with one pass per step has nothing to compare"):
        check(ranks=1)
    with pytest.raises(UserError, match="trainable_stages: 0 freezes"):
        check(ranks=2, model={"trainable_stages": 0})
    check(ranks=2, model={"trainable_stages": 0, "weights": "none"})
