"""Cores are divided among the ranks that share them, and nobody else's are taken."""

import os

import pytest

from horovod_megdet.engine import device


@pytest.fixture(autouse=True)
def _two_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose core numbers alternate between two sockets, and begin again for the second hardware threads."""
    monkeypatch.setattr(device, "_place_of_core", lambda core: (core % 2, core % 8, core))


def test_unbound_ranks_get_neighbouring_cores() -> None:
    masks = [("node01", list(range(16)))] * 4 + [("node02", list(range(16)))] * 2
    assert [device.own_cores(masks, rank) for rank in range(4)] == [
        {0, 8, 2, 10},
        {4, 12, 6, 14},
        {1, 9, 3, 11},
        {5, 13, 7, 15},
    ]
    assert device.own_cores(masks, 4) == set(range(0, 16, 2)), "each host is divided on its own"


def test_ranks_of_a_socket_divide_it() -> None:
    masks = [("node01", [0, 2, 4, 6])] * 2 + [("node01", [1, 3, 5, 7])] * 2
    assert [device.own_cores(masks, rank) for rank in range(4)] == [{0, 2}, {4, 6}, {1, 3}, {5, 7}]


@pytest.mark.parametrize(
    "masks",
    [
        pytest.param([("node01", [0]), ("node01", [1])], id="bound by the launcher"),
        pytest.param([("node01", [0, 1])] * 3, id="more ranks than cores"),
        pytest.param([("node01", [0, 1])], id="alone"),
    ],
)
def test_cores_are_kept(masks: list[tuple[str, list[int]]]) -> None:
    assert [device.own_cores(masks, rank) for rank in range(len(masks))] == [set(cores) for _, cores in masks]


def test_cores_that_do_not_divide_evenly_are_all_used() -> None:
    masks = [("node01", [0, 2, 4, 6, 8])] * 2
    assert [len(device.own_cores(masks, rank)) for rank in range(2)] == [2, 3]


def test_alone_nothing_changes() -> None:
    before = os.sched_getaffinity(0)
    device.bind_to_cores()
    assert os.sched_getaffinity(0) == before
