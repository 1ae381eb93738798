"""A rank that is slower than the rest is noticed when it stays so, and described with its reason."""

from horovod_megdet.engine.slow_rank import ROWS, STEPS, SlowRank, describe_slow_rank


def test_a_rank_that_stays_slow_is_reported_once() -> None:
    slow_rank = SlowRank()
    rows = [[1.0, 1.4, 1.1, 1.0]] * (ROWS + 3)
    assert [slow_rank.update(row, STEPS) for row in rows] == [number == ROWS - 1 for number in range(len(rows))]
    assert slow_rank.rank == 1


def test_a_rank_that_was_slow_once_is_not_reported() -> None:
    slow_rank = SlowRank()
    slow, equal = [1.0, 2.0], [1.0, 1.0]
    assert not any(slow_rank.update(row, STEPS) for row in [slow, equal] * 4)
    assert [slow_rank.update(row, STEPS) for row in [slow, slow, equal, slow, slow]] == [
        False,
        True,
        False,
        False,
        True,
    ]


def test_a_few_steps_are_no_reason_to_report() -> None:
    slow_rank = SlowRank()
    assert [slow_rank.update([1.0, 2.0], STEPS // 4) for _ in range(6)] == [False, False, False, True, False, False]


def test_the_slow_rank_may_change() -> None:
    slow_rank = SlowRank()
    rows = [[3.0, 1.0, 1.0], [1.0, 3.0, 1.0], [1.0, 3.0, 1.0]]
    assert [slow_rank.update(row, STEPS) for row in rows] == [False, False, True]
    assert slow_rank.rank == 1


def test_half_of_the_ranks_may_be_slow_hosts_without_one_to_blame() -> None:
    slow_rank = SlowRank()
    assert not any(slow_rank.update([1.0, 2.0, 2.1, 2.2], STEPS) for _ in range(4))


def test_one_rank_waits_for_nobody() -> None:
    slow_rank = SlowRank()
    assert not any(slow_rank.update([5.0], STEPS) for _ in range(4))


def test_the_sentence_says_what_the_rank_does() -> None:
    work = [0.6, 0.61, 0.84, 0.59]
    assert describe_slow_rank(2, "node05", work, data=0.01) == (
        "rank 2 on node05 is 1.4 times slower than the others, which wait for it: it works for 0.84 s of each step; "
        "the others work for 0.60 s."
    )
    waiting = describe_slow_rank(2, "node05", work, data=0.2)
    assert "0.84 s of each step, 0.20 s of that waiting for images; the others" in waiting
