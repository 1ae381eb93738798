"""A run's curves as one picture."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, NullLocator

from horovod_megdet.errors import UserError
from horovod_megdet.evaluation.metrics import DRAWN_METRICS
from horovod_megdet.files import atomic_write
from horovod_megdet.report.rows import Rows, column, read_metrics, smoothed
from horovod_megdet.run_files import CURVES_FILE, METRICS_FILE

# Colors of Okabe and Ito, which color-blind readers can tell apart.
INK, BLUE, ORANGE, GREEN, PURPLE = "#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7"

LOSS_STYLES = {
    "loss": ("sum", INK),
    "loss_classifier": ("class", BLUE),
    "loss_box_reg": ("box", ORANGE),
    "loss_objectness": ("objectness", GREEN),
    "loss_rpn_box_reg": ("proposal box", PURPLE),
}
"""Key in metrics.jsonl: its name in the picture and its color."""

METRIC_COLORS = dict(zip(DRAWN_METRICS, (BLUE, ORANGE, GREEN, PURPLE), strict=False))
"""Key in metrics.jsonl: its color."""


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
    """Panels over epochs: losses, metrics, learning rate, images per second and, if measured, the noise scale."""
    train = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    noise_is_measured = bool(np.isfinite(column(train, "noise_scale")).any())
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    figure = Figure(figsize=(15 if noise_is_measured else 12, 7.5), layout=layout, facecolor="white")
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK)
    panels = figure.subplot_mosaic("LLM;RSN" if noise_is_measured else "LM;RS")
    _draw_losses(panels["L"], train, evaluations)
    _draw_metrics(panels["M"], evaluations)
    _draw_learning_rate(panels["R"], train)
    _draw_throughput(panels["S"], train)
    if noise_is_measured:
        _draw_noise_scale(panels["N"], train)
    end = max([row["epoch"] for row in rows])
    for panel in panels.values():
        panel.set_xlim(0, end * 1.02 or 1)
        style(panel, "epoch")
    return figure


def _draw_losses(panel: Axes, train: Rows, evaluations: Rows) -> None:
    panel.set_title("Loss")
    epochs = column(train, "epoch")
    top = 0.0
    for key, (name, color) in LOSS_STYLES.items():
        values = column(train, key)
        if not np.isfinite(values).any():
            continue
        smooth = smoothed(values)
        panel.plot(epochs, values, color=color, alpha=0.2, linewidth=0.8)
        panel.plot(epochs, smooth, color=color, label=name, linewidth=1.8, marker=_marker(smooth))
        # Without a limit, spikes in the first steps would flatten everything after them.
        top = max(top, float(np.nanpercentile(values, 99)))
    validation = column(evaluations, "loss")
    if np.isfinite(validation).any():
        panel.plot(column(evaluations, "epoch"), validation, "o--", color=INK, label="sum, validation", linewidth=1.2)
        top = max(top, float(np.nanpercentile(validation, 99)))
    if top:
        panel.set_ylim(0, 1.1 * top)
        panel.legend(frameon=False, ncols=2, fontsize=9)
    else:
        _write_note(panel, "no training steps yet")


def _draw_metrics(panel: Axes, evaluations: Rows) -> None:
    panel.set_title("Average precision on the validation images")
    panel.set_ylabel("%")
    epochs = column(evaluations, "epoch")
    highest = 0.0
    for key, color in METRIC_COLORS.items():
        values = 100 * column(evaluations, key)
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
    rates = column(train, "lr")
    panel.plot(column(train, "epoch"), rates, color=BLUE, linewidth=1.8, marker=_marker(rates))
    panel.set_ylim(bottom=0)


def _draw_throughput(panel: Axes, train: Rows) -> None:
    panel.set_title("Images per second, all ranks")
    speeds = column(train, "images_per_second")
    panel.plot(column(train, "epoch"), speeds, color=GREEN, linewidth=1.2, marker=_marker(speeds))
    if np.isfinite(speeds).any():
        median = float(np.nanmedian(speeds))
        panel.axhline(median, color=INK, linewidth=1, linestyle="--", label=f"median {median:.3g}")
        panel.legend(frameon=False, loc="lower right", fontsize=9)
    panel.set_ylim(bottom=0)


def _draw_noise_scale(panel: Axes, train: Rows) -> None:
    panel.set_title("Noise scale of the gradient, in images")
    epochs, scales, mini_batch = (column(train, key) for key in ("epoch", "noise_scale", "mini_batch"))
    panel.plot(epochs, scales, color=PURPLE, linewidth=1.8, marker=_marker(scales), label="noise scale")
    panel.plot(epochs, mini_batch, color=INK, linewidth=1, linestyle="--", label="mini-batch")
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())
    panel.legend(frameon=False, loc="upper left", fontsize=9)


def style(panel: Axes, x_title: str) -> None:
    """Makes a panel look like all others."""
    panel.set_xlabel(x_title)
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
