"""The latency and bandwidth model of ``megdet plan``."""

from dataclasses import replace

import pytest

from horovod_megdet.config import DEMO, load_config
from horovod_megdet.models.detector import build_detector
from horovod_megdet.solver.cost import MessageCost, Traffic, communication_table
from horovod_megdet.solver.schedule import make_schedule

COST = MessageCost(latency=1e-4, bandwidth=1e9)


def test_one_rank_sends_nothing() -> None:
    assert COST.seconds(1, 1000) == 0
    assert COST.step(1, Traffic(layers=10, channels=100, gradient_bytes=1000, group=1)) == (0, 0)


def test_ring_and_tree() -> None:
    # 7 doublings; every rank sends and receives 127/128 of the message twice
    assert COST.seconds(128, 10**9) == pytest.approx(7e-4 + 2 * 127 / 128)


def test_fit_finds_the_constants_that_made_the_measurements() -> None:
    size = 1 << 24
    measured = [(ranks, COST.seconds(ranks, 0), COST.seconds(ranks, size)) for ranks in (2, 4, 8)]
    fitted = MessageCost.fitted(measured, size)
    assert fitted.latency == pytest.approx(COST.latency)
    assert fitted.bandwidth == pytest.approx(COST.bandwidth)


def traffic_of(ranks: int, *settings: str) -> Traffic:
    given = ["model.backbone=resnet18", "model.weights=none", "data.images_per_rank=2", *settings]
    config = load_config(DEMO, given)
    schedule = make_schedule(config.solver, 1000, ranks, config.data.images_per_rank)
    return Traffic.of(build_detector(config.model, config.batch_norm, 6), config, schedule)


def test_what_a_step_sends_follows_the_configuration() -> None:
    all_cgbn = ["model.backbone_norm=cgbn", "model.fpn_norm=cgbn", "model.box_head_norm=none", "solver.mini_batch=null"]
    every = traffic_of(8, *all_cgbn)
    assert (every.group, every.passes) == (8, 1)
    assert traffic_of(8, *all_cgbn, "model.fpn_norm=local").layers == 20, "those of the backbone"
    local = traffic_of(8, "model.backbone_norm=local", "model.fpn_norm=local", "model.box_head_norm=local")
    assert (local.layers, COST.step(8, local)[0]) == (0, 0)
    assert traffic_of(8, *all_cgbn, "solver.mini_batch=64").passes == 4
    assert traffic_of(8, *all_cgbn, "batch_norm.bn_size=4").group == 2
    half = traffic_of(8, *all_cgbn, "solver.compression=fp16")
    assert 2 * half.gradient_bytes == every.gradient_bytes > 40e6


def test_passes_and_groups_cost_time() -> None:
    one = Traffic(layers=10, channels=100, gradient_bytes=10**6, group=8)
    messages, gradients = COST.step(8, one)
    assert messages == pytest.approx(2 * 10 * 3 * 1e-4, rel=0.01)
    assert COST.step(8, replace(one, passes=4)) == (4 * messages, gradients)
    assert COST.step(8, replace(one, layer_messages=3))[0] == pytest.approx(1.5 * messages, rel=0.01)
    assert COST.step(8, replace(one, group=2))[0] == pytest.approx(messages / 3, rel=0.01)


def test_table_counts_layers_weights_and_time() -> None:
    traffic = Traffic(layers=2, channels=16, gradient_bytes=10**5, group=2)
    rows = dict(communication_table(COST, traffic, ranks=2, step_seconds=1e-3))
    assert rows["CGBN"].startswith("2 layers, 4 messages a step: 0.4 ms")
    assert rows["step"] == "0.002 s, of which 38% is communication; expect 0.001 to 0.002 s"
    assert "none of it overlapped" in rows["assumed"]
    assert "step" not in dict(communication_table(COST, traffic, ranks=2, step_seconds=None))
    alone = replace(traffic, group=1)
    assert dict(communication_table(COST, alone, ranks=2, step_seconds=None))["CGBN"].startswith("2 layers, 0 messages")
