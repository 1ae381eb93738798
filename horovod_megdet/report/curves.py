"""A run's curves as one picture."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from horovod_megdet.errors import UserError
from horovod_megdet.evaluation.metrics import DRAWN_METRICS
from horovod_megdet.files import atomic_write
from horovod_megdet.report.rows import METRICS_FILE, read_metrics

CURVES_FILE = "curves.png"

# Colors of Okabe and Ito, which color-blind readers can tell apart.
INK, BLUE, ORANGE, GREEN, PURPLE = "#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7"

LOSSES = {
    "loss": ("sum", INK),
    "loss_classifier": ("class", BLUE),
    "loss_box_reg": ("box", ORANGE),
    "loss_objectness": ("objectness", GREEN),
    "loss_rpn_box_reg": ("proposal box", PURPLE),
}
"""Key in metrics.jsonl: its name in the picture and its color."""

METRIC_COLORS = dict(zip(DRAWN_METRICS, (BLUE, ORANGE, GREEN, PURPLE), strict=False))
"""Key in metrics.jsonl: its color."""

Rows = list[dict[str, Any]]


def write_curves(run_dir: str | Path) -> Path:
    """Draws losses, AP, learning rate and throughput of ``run_dir/metrics.jsonl`` over epochs into ``curves.png``.

    Returns the path of the picture. Raises :class:`UserError` if there are no metrics (yet) or they are damaged.
    """
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir / METRICS_FILE)
    if not rows:
        raise UserError(f"{run_dir / METRICS_FILE}: it has no rows to draw yet.")
    figure = draw_curves(rows, run_dir.resolve().name)
    with atomic_write(run_dir / CURVES_FILE) as file:
        figure.savefig(file, format="png", dpi=120)
    return run_dir / CURVES_FILE


def draw_curves(rows: Rows, title: str) -> Figure:
    """Four panels over epochs: losses, AP and AP50, learning rate, images per second."""
    train = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    figure = Figure(figsize=(12, 7.5), layout=layout, facecolor="white")
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK)
    panels = figure.subplots(2, 2)
    _draw_losses(panels[0, 0], train)
    _draw_precision(panels[0, 1], evaluations)
    _draw_learning_rate(panels[1, 0], train)
    _draw_throughput(panels[1, 1], train)
    end = max([row["epoch"] for row in rows])
    for panel in panels.flat:
        panel.set_xlim(0, end * 1.02 or 1)
        _style(panel)
    return figure


def _draw_losses(panel: Axes, train: Rows) -> None:
    panel.set_title("Loss")
    epochs = _column(train, "epoch")
    top = 0.0
    for key, (name, color) in LOSSES.items():
        values = _column(train, key)
        if not np.isfinite(values).any():
            continue
        smooth = running_mean(values, _window(len(values)))
        panel.plot(epochs, values, color=color, alpha=0.2, linewidth=0.8)
        panel.plot(epochs, smooth, color=color, label=name, linewidth=1.8, marker=_marker(smooth))
        # Without a limit, spikes in the first steps would flatten everything after them.
        top = max(top, float(np.nanpercentile(values, 99)))
    if top:
        panel.set_ylim(0, 1.1 * top)
        panel.legend(frameon=False, ncols=2, fontsize=9)
    else:
        _write_note(panel, "no training steps yet")


def _draw_precision(panel: Axes, evaluations: Rows) -> None:
    panel.set_title("Average precision on the validation images")
    panel.set_ylabel("%")
    epochs = _column(evaluations, "epoch")
    highest = 0.0
    for key, color in METRIC_COLORS.items():
        values = 100 * _column(evaluations, key)
        if not np.isfinite(values).any():
            continue
        panel.plot(epochs, values, color=color, label=key, linewidth=1.8, marker="o", markersize=4)
        best = int(np.nanargmax(values))
        panel.annotate(
            f"{values[best]:.1f}",
            (epochs[best], values[best]),
            (0, 6),
            textcoords="offset points",
            ha="center",
            color=color,
        )
        highest = max(highest, float(values[best]))
    if panel.lines:
        panel.set_ylim(0, min(110, max(10.0, 1.2 * highest)))
        panel.legend(frameon=False, loc="upper left", fontsize=9)  # rising curves leave that corner free
    else:
        _write_note(panel, "no evaluation yet")


def _draw_learning_rate(panel: Axes, train: Rows) -> None:
    panel.set_title("Learning rate")
    rates = _column(train, "lr")
    panel.plot(_column(train, "epoch"), rates, color=BLUE, linewidth=1.8, marker=_marker(rates))
    panel.set_ylim(bottom=0)


def _draw_throughput(panel: Axes, train: Rows) -> None:
    panel.set_title("Images per second, all ranks")
    speeds = _column(train, "images_per_second")
    panel.plot(_column(train, "epoch"), speeds, color=GREEN, linewidth=1.2, marker=_marker(speeds))
    if np.isfinite(speeds).any():
        median = float(np.nanmedian(speeds))
        panel.axhline(median, color=INK, linewidth=1, linestyle="--", label=f"median {median:.3g}")
        panel.legend(frameon=False, loc="lower right", fontsize=9)
    panel.set_ylim(bottom=0)


def _style(panel: Axes) -> None:
    panel.set_xlabel("epoch")
    panel.title.set(fontsize=11, color=INK)
    panel.grid(True, color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#888888")
    panel.tick_params(colors="#444444", labelsize=9)


def _write_note(panel: Axes, text: str) -> None:
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color="#888888")


def _marker(values: np.ndarray) -> str:
    """Dots if there are too few points for a visible line."""
    return "o" if len(values) < 3 else ""


def _column(rows: Rows, key: str) -> np.ndarray:
    """The values of a key as float64 (rows,), NaN if a row has none."""
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], np.float64)


def _window(count: int) -> int:
    return max(1, count // 40)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and up to ``window - 1`` neighbors on either side, leaving out NaNs; same length."""
    if not len(values):
        return values
    finite = np.isfinite(values)
    kernel = np.ones(2 * window - 1)
    sums, counts = (
        np.convolve(terms, kernel)[window - 1 :][: len(values)] for terms in (np.where(finite, values, 0.0), finite)
    )
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
