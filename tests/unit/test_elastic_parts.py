"""Parts of elastic jobs that need no ranks; tests/parallel/test_elastic.py runs some."""

import json
import os
from pathlib import Path

import pytest

from horovod_megdet import launched
from horovod_megdet.config import Config
from horovod_megdet.engine.elastic import check_elastic
from horovod_megdet.engine.metrics import MetricsLog, describe_change
from horovod_megdet.errors import UserError
from horovod_megdet.report.curves import write_curves
from horovod_megdet.report.rows import read_metrics

CHANGE = {
    "step": 7,
    "images_seen": 160,
    "epoch": 3.2,
    "ranks_before": 12,
    "ranks": 8,
    "mini_batch_before": 24,
    "mini_batch": 16,
    "lr_before": 0.03,
    "lr": 0.02,
    "hosts_lost": {"node03": 6},
    "hosts_joined": {"node07": 2},
}


def test_a_change_of_ranks_is_a_sentence() -> None:
    assert describe_change(CHANGE) == (
        "12 -> 8 ranks at epoch 3.20 (lost: 6 on node03; joined: 2 on node07): mini-batch 24 -> 16, "
        "learning rate 0.03 -> 0.02"
    )
    gone = CHANGE | {"hosts_lost": {}, "hosts_joined": {}}
    assert describe_change(gone).startswith("12 -> 8 ranks at epoch 3.20: mini-batch")


def test_a_change_of_ranks_is_a_row(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, total_images=200, images_seen=0, step=0)
    log.change({"kind": "ranks", **CHANGE})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "ranks", **CHANGE}]
    assert write_curves(tmp_path).exists()


def test_an_evaluation_that_is_done_again_leaves_one_row(tmp_path: Path) -> None:
    """The rows of training at the same step stay: they are not written again."""
    rows = [{"kind": kind, "step": step} for step in (6, 7) for kind in ("train", "evaluation")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    MetricsLog(tmp_path, total_images=200, images_seen=160, step=7).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == rows
    MetricsLog(tmp_path, total_images=200, images_seen=160, step=7, repeats=True).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == rows[:-1]


def test_bn_groups_that_horovod_would_not_survive_are_refused() -> None:
    for size in ("world", 2):
        check_elastic(Config.model_validate({"batch_norm": {"bn_size": size}, "data": {"images_per_rank": 2}}))
    with pytest.raises(UserError, match="bn_size: 4 does not work in an elastic job"):
        check_elastic(Config.model_validate({"batch_norm": {"bn_size": 4}, "data": {"images_per_rank": 2}}))


def test_a_process_moves_to_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"HOROVOD_RANK": "5", "HOROVOD_SIZE": "12", "HOROVOD_ELASTIC": "1"})
    assert launched.elastic()
    launched.move(3, 8, 1, 2, 0, 4)
    assert (launched.rank(), launched.size()) == (3, 8)
    assert os.environ["HOROVOD_CROSS_SIZE"] == "4"
