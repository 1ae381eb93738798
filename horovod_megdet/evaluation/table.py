"""The result of an evaluation in words, for the terminal."""

import math
from typing import Any

from rich.table import Table

from horovod_megdet.evaluation.coco import Evaluation
from horovod_megdet.evaluation.metrics import METRICS, percent


def render(evaluation: Evaluation, multi_scale: bool = False) -> Table:
    """The twelve metrics and the AP of every class, in percent; a dash if there is no ground truth."""
    test = ", multi-scale test" if multi_scale else ""
    table = Table(title=f"COCO box metrics on {evaluation.images} images{test}", title_justify="left")
    table.add_column("metric")
    table.add_column("over")
    table.add_column("%", justify="right")
    for name, metric in METRICS.items():
        table.add_row(name, metric.meaning, percent(evaluation.metrics[name]), style="bold" if name == "AP" else None)
    table.add_section()
    for name, value in evaluation.per_class.items():
        table.add_row("AP of", name, percent(value))
    return table


def loss_in_words(row: dict[str, Any]) -> str:
    """`loss 1.2 (classifier 0.4 ...)`, of a row of metrics."""
    losses = {key: math.nan if value is None else value for key, value in row.items() if key.startswith("loss")}
    parts = " ".join(f"{key.removeprefix('loss_')} {value:.3f}" for key, value in losses.items() if key != "loss")
    return f"loss {losses['loss']:.3f} ({parts})"
