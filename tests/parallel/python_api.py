"""Run on several ranks: ``megdet.train`` and ``megdet.evaluate`` inside a program that has started Horovod itself.

The arguments are the folders of the data and for the runs, and what to do: ``train`` or ``groups``. Every rank writes
what it got.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update({"OMPI_MCA_mpi_yield_when_idle": "1"})  # the test's ranks may have one core for all

import horovod.torch as hvd
import yaml

import horovod_megdet as megdet

TINY = yaml.safe_load(Path(__file__).with_name("tiny.yaml").read_text())


def config(data: str, run_dir: str, **solver: float) -> dict[str, Any]:
    values = {section: dict(keys) for section, keys in TINY.items()}
    values["data"]["synthetic_root"] = data
    values["solver"] |= {"mini_batch": 4, **solver}
    values["output"]["run_dir"] = run_dir
    return values


def train(data: str, folder: str) -> dict[str, Any]:
    result = megdet.train(config(data, f"{folder}/run"))
    again = megdet.evaluate(result.run_dir)
    assert (again.detections is not None) == (hvd.rank() == 0)
    return {
        "best": str(result.best_checkpoint),
        "metrics": result.metrics,
        "per_class": result.per_class,
        "again": again.metrics,
        "errors": [
            error(config(data, f"{folder}/run")),
            error(config(data, f"{folder}/other", base_lr=0.01 * (hvd.rank() + 1))),
            error({"solver": {"lr": 1}}),
            error({"base": "missing.yaml"} if hvd.rank() else config(data, f"{folder}/other")),
        ],
    }


def groups(data: str, folder: str) -> dict[str, Any]:
    values = config(data, f"{folder}/run", mini_batch=8)
    asked = [{"batch_norm": {"bn_size": 4}}, {"runtime": {"deterministic": True}}]
    return {"errors": [error(values | each) for each in asked]}


def error(values: dict[str, Any]) -> str:
    """What a training that cannot start says."""
    try:
        megdet.train(values)
    except megdet.UserError as raised:
        return str(raised)
    raise AssertionError(values)


if __name__ == "__main__":
    hvd.init()
    report = {"train": train, "groups": groups}[sys.argv[3]](*sys.argv[1:3])
    Path(sys.argv[2], f"rank_{hvd.rank()}.json").write_text(json.dumps(report))
