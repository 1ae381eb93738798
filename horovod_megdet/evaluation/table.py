"""The result of an evaluation as a table for the terminal."""

import math

from rich.table import Table

from horovod_megdet.evaluation.coco import METRICS, Evaluation


def render(evaluation: Evaluation) -> Table:
    """The twelve metrics and the AP of every class, in percent; a dash if there is no ground truth."""
    table = Table(title=f"COCO box metrics on {evaluation.images} images", title_justify="left")
    table.add_column("metric")
    table.add_column("over")
    table.add_column("%", justify="right")
    for name, meaning in METRICS.items():
        table.add_row(name, meaning, percent(evaluation.metrics[name]), style="bold" if name == "AP" else None)
    table.add_section()
    for name, value in evaluation.per_class.items():
        table.add_row("AP of", name, percent(value))
    return table


def percent(value: float) -> str:
    """A metric between 0 and 1 in percent, such as `43.2`; a dash for NaN."""
    return "–" if math.isnan(value) else f"{100 * value:.1f}"
