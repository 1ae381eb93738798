"""The linear rule, warm-up and milestones, all in images."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horovod_megdet.config import SolverConfig
from horovod_megdet.errors import UserError
from horovod_megdet.solver.schedule import Schedule, make_schedule

COCO_IMAGES = 117266


def schedule_of(ranks: int = 8, images_per_rank: int = 2, images: int = COCO_IMAGES, **values: object) -> Schedule:
    return make_schedule(SolverConfig.model_validate(values), images, ranks, images_per_rank)


@pytest.mark.parametrize(("ranks", "k"), [(1, 0.125), (8, 1), (128, 16)])
def test_linear_rule(ranks: int, k: float) -> None:
    schedule = schedule_of(ranks)
    assert schedule.k == k
    assert schedule.peak_lr == pytest.approx(0.02 * k)
    assert schedule.lr(schedule.images(2.0)) == pytest.approx(0.02 * k)


def test_warm_up_is_linear_from_the_reference_rate_to_the_scaled_one() -> None:
    schedule = schedule_of(ranks=128, warmup_epochs=1.0)
    step = schedule.mini_batch
    rates = [schedule.lr(position) for position in range(0, COCO_IMAGES, step)]
    assert rates[0] == pytest.approx(0.02)
    increments = [b - a for a, b in itertools.pairwise(rates)]
    assert increments == pytest.approx([step / COCO_IMAGES * (16 - 1) * 0.02] * len(increments))
    assert schedule.lr(COCO_IMAGES) == pytest.approx(0.32)


def test_warm_up_never_starts_above_a_peak_below_the_reference_rate() -> None:
    schedule = schedule_of(ranks=1, images_per_rank=2, warmup_start=0.5)
    assert schedule.lr(0) == pytest.approx(0.02 / 8 / 2)


def test_milestones_of_the_long_schedule() -> None:
    schedule = schedule_of(epochs=18, milestones=(11, 14, 17), gammas=(0.1, 0.1, 0.5))
    images = COCO_IMAGES
    assert schedule.lr(11 * images - 1) == pytest.approx(0.02)
    assert schedule.lr(11 * images) == pytest.approx(0.002)
    assert schedule.lr(14 * images) == pytest.approx(0.0002)
    assert schedule.lr(17 * images) == pytest.approx(0.0001)
    assert not schedule.finished(18 * images - 1)
    assert schedule.finished(18 * images)


@given(
    ranks=st.integers(1, 256),
    images_per_rank=st.integers(1, 8),
    images=st.integers(1, 10_000),
    epochs=st.floats(0.1, 20),
    every=st.integers(1, 5_000),
)
def test_every_period_comes_due_once_and_the_end_always(
    ranks: int, images_per_rank: int, images: int, epochs: float, every: int
) -> None:
    schedule = schedule_of(ranks, images_per_rank, images, epochs=epochs)
    positions = [number * schedule.mini_batch for number in range(schedule.total_steps + 1)]
    due = [after for before, after in itertools.pairwise(positions) if schedule.due(every, before, after)]
    assert len(positions) - 1 == math.ceil(schedule.total_images / schedule.mini_batch)
    assert due[-1] == positions[-1]
    assert schedule.finished(positions[-1])
    assert not schedule.finished(positions[-2])
    # each multiple of the period that is reached is answered by the first step at or after it
    expected = {
        -(-multiple // schedule.mini_batch) * schedule.mini_batch for multiple in range(every, positions[-1] + 1, every)
    }
    assert set(due) == expected | {positions[-1]}


def test_a_fixed_mini_batch_is_made_by_accumulation() -> None:
    for ranks, passes in [(1, 128), (8, 16), (128, 1)]:
        schedule = schedule_of(ranks, mini_batch=256)
        assert (schedule.accumulation, schedule.mini_batch, schedule.k) == (passes, 256, 16)


def test_a_mini_batch_that_does_not_fit_lists_the_ranks_that_do() -> None:
    with pytest.raises(UserError, match=r"solver.mini_batch = 16 .* 3 ranks x 2 images .*Use 1, 2, 4, 8 ranks"):
        schedule_of(ranks=3, mini_batch=16)
    with pytest.raises(UserError, match=r"Choose a multiple of data.images_per_rank = 2"):
        schedule_of(ranks=1, mini_batch=15)


def test_the_table_says_what_will_happen() -> None:
    table = dict(schedule_of(ranks=128).table())
    assert table["mini-batch"] == "256 images = 128 ranks x 2 images x 1 pass"
    assert table["learning rate"] == "0.32 = 16 x 0.02"
    assert table["epoch 8"] == "step 3665: x0.1 = 0.032"
    assert (
        table["total"] == f"{math.ceil(11 * COCO_IMAGES / 256)} steps = {11 * COCO_IMAGES} images = 11 epochs of 117266"
    )


@given(
    ranks=st.integers(1, 64),
    images=st.integers(10, 10_000),
    epochs=st.floats(0.5, 20),
    warmup=st.floats(0, 0.4),
    positions=st.lists(st.floats(0, 1.2), min_size=2, max_size=20),
)
def test_cosine(ranks: int, images: int, epochs: float, warmup: float, positions: list[float]) -> None:
    """From the peak at the end of the warm-up to 0, without rising, half of it in the middle; the same warm-up."""
    settings = {"epochs": epochs, "warmup_epochs": warmup}
    cosine = schedule_of(ranks, 2, images, schedule="cosine", **settings)
    steps = schedule_of(ranks, 2, images, milestones=[], gammas=[], **settings)
    start, end = cosine.images(warmup), cosine.total_images
    seen = sorted(round(part * end) for part in positions)
    rates = [cosine.lr(position) for position in seen]
    for position, rate in zip(seen, rates, strict=True):
        if position <= start:
            assert rate == steps.lr(position)
    falling = [rate for position, rate in zip(seen, rates, strict=True) if position >= start]
    assert all(after <= before for before, after in itertools.pairwise(falling))
    assert cosine.lr(start) == cosine.peak_lr
    assert cosine.lr(end) == pytest.approx(0, abs=1e-12)
    assert cosine.lr((start + end) // 2) == pytest.approx(cosine.peak_lr / 2, rel=4 / (end - start))
    assert cosine.lr(start + (end - start) // 3) == pytest.approx(0.75 * cosine.peak_lr, rel=4 / (end - start))


def test_the_table_of_a_cosine_has_no_milestones() -> None:
    table = dict(schedule_of(schedule="cosine").table())
    assert table["then"] == "half a cosine to 0"
    assert not any(name.startswith("epoch") for name in table)
