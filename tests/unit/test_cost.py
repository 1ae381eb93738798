"""The latency and bandwidth model of ``megdet plan``."""

import pytest
from torch import nn

from horovod_megdet.layers.cross_gpu_bn import convert_batch_norm
from horovod_megdet.solver.cost import MessageCost, communication_table

COST = MessageCost(latency=1e-4, bandwidth=1e9)


def test_one_rank_sends_nothing() -> None:
    assert COST.seconds(1, 1000) == 0
    assert COST.step(1, layers=10, channels=100, gradient_bytes=1000) == (0, 0)


def test_ring_and_tree() -> None:
    # 7 doublings; every rank sends and receives 127/128 of the message twice
    assert COST.seconds(128, 10**9) == pytest.approx(7e-4 + 2 * 127 / 128)


def test_fit_finds_the_constants_that_made_the_measurements() -> None:
    size = 1 << 24
    measured = [(ranks, COST.seconds(ranks, 0), COST.seconds(ranks, size)) for ranks in (2, 4, 8)]
    fitted = MessageCost.fitted(measured, size)
    assert fitted.latency == pytest.approx(COST.latency)
    assert fitted.bandwidth == pytest.approx(COST.bandwidth)


def test_table_counts_layers_weights_and_time() -> None:
    model = convert_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.BatchNorm2d(8)))
    rows = dict(communication_table(COST, model, ranks=2, step_seconds=1e-3))
    assert rows["CGBN"].startswith("2 layers, 4 messages a step: 0.4 ms")
    assert rows["step"] == "0.002 s, of which 33% is communication; 0.001 to 0.002 s to be expected"
    assert "nothing of it hidden" in rows["assumed"]
    assert "step" not in dict(communication_table(COST, model, ranks=2, step_seconds=None))
