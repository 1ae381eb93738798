"""The result of an evaluation as a table for the terminal."""

import math

from rich.table import Table

from horovod_megdet.evaluation.coco import Evaluation

MEANINGS = {
    "AP": "IoU 0.50:0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "AP_small": "area < 32² px",
    "AP_medium": "32² to 96² px",
    "AP_large": "area > 96² px",
    "AR_1": "1 detection per image",
    "AR_10": "10 detections per image",
    "AR_100": "100 detections per image",
    "AR_small": "area < 32² px",
    "AR_medium": "32² to 96² px",
    "AR_large": "area > 96² px",
}


def render(evaluation: Evaluation) -> Table:
    """The twelve metrics and the AP of every class, in percent; a dash where there is no ground truth."""
    table = Table(title=f"COCO box metrics on {evaluation.images} images", title_justify="left")
    table.add_column("metric")
    table.add_column("over")
    table.add_column("%", justify="right")
    for name, value in evaluation.metrics.items():
        table.add_row(name, MEANINGS[name], _percent(value), style="bold" if name == "AP" else None)
    table.add_section()
    for name, value in evaluation.per_class.items():
        table.add_row("AP of", name, _percent(value))
    return table


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"
