"""The figures of the findings, as small SVG files on a white ground, so that they read the same on a dark page."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.outcomes import Noise, Outcome, Outcomes
from experiments.verdicts import (
    ABOVE,
    BELOW,
    BEYOND,
    BN_SIZES,
    KS,
    SERIES,
    WARMUP_KS,
    cgbn,
    frozen,
    half_rate,
    no_warmup,
    noise_scale,
)
from horovod_megdet.files import atomic_write
from horovod_megdet.report.curves import BLUE, GREEN, INK, ORANGE, PURPLE
from horovod_megdet.wording import count

SKY = "#56B4E9"
BY_K = dict(zip(KS, (INK, BLUE, SKY, GREEN, ORANGE), strict=True))

SMALL: Any = {"textcoords": "offset points", "fontsize": 8}
"""Of annotations."""

# Text stays text; ids do not change from one call to the next.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "findings", "font.family": "sans-serif", "font.size": 10}


def write_figure(key: str, outcomes: Outcomes, path: Path) -> bool:
    """Draws the figure of a finding; False where there is nothing to draw yet."""
    with mpl.rc_context(STYLE):
        panels = PANELS[key]
        figure = Figure(figsize=(4.6 * len(panels), 3.2), layout="constrained", facecolor="white")
        for place, (draw, title) in enumerate(panels, start=1):
            panel = figure.add_subplot(1, len(panels), place)
            panel.set_title(title, fontsize=10)
            draw(panel, outcomes)
            _style(panel)
        if not any(panel.has_data() for panel in figure.axes):
            return False
        with atomic_write(path) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})
    return True


def draw_batch_norm(panel: Axes, outcomes: Outcomes) -> None:
    for label, cell, color in (("CGBN", cgbn, BLUE), ("BN frozen", frozen, ORANGE)):
        _series(panel, {8 * k: outcomes[cell(k)] for k in KS}, color, label)
    _by_images(panel)


def draw_warmup(panel: Axes, outcomes: Outcomes) -> None:
    _series(panel, {8 * k: outcomes[cgbn(k)] for k in WARMUP_KS}, BLUE, "warm-up of 1 epoch")
    _series(panel, {8 * k: outcomes[no_warmup(k)] for k in WARMUP_KS}, PURPLE, "no warm-up")
    _by_images(panel, [8 * k for k in WARMUP_KS])


def draw_bn_size(panel: Axes, outcomes: Outcomes) -> None:
    _series(panel, {size: outcomes[cell] for size, cell in BN_SIZES.items()}, BLUE, "64 images per step")
    _by_images(panel, list(BN_SIZES))
    panel.set_xlabel("images that share statistics")


def draw_first_epochs(panel: Axes, outcomes: Outcomes) -> None:
    for k in KS:
        epochs = outcomes[cgbn(k)].epochs
        means = [statistics.fmean(outcomes[cgbn(k)].ap_at(epoch)) for epoch in epochs]
        if epochs:
            panel.plot(epochs, means, color=BY_K[k], marker="o", markersize=3, label=f"{8 * k} images")
    panel.set_xlabel("epoch")
    panel.set_ylabel("AP")
    panel.set_ylim(bottom=0)


def draw_variance(panel: Axes, outcomes: Outcomes) -> None:
    _draw_noise(panel, outcomes, lambda noise: noise.variance)


def draw_product(panel: Axes, outcomes: Outcomes) -> None:
    _draw_noise(panel, outcomes, lambda noise: noise.per_image)


def draw_break(panel: Axes, outcomes: Outcomes) -> None:
    _series(panel, {8 * k: outcomes[cgbn(k)] for k in KS}, BLUE, "linear rate")
    _series(panel, {8 * k: outcomes[half_rate(k)] for k in (BELOW, ABOVE)}, PURPLE, "half of it")
    _by_images(panel)
    scale = noise_scale(outcomes)
    if scale is not None and math.isfinite(scale):
        panel.axvline(scale, color=INK, linestyle="--", linewidth=1, label=f"noise scale {scale:.3g}")
        panel.set_xlim(min(panel.get_xlim()[0], scale / 1.3), max(panel.get_xlim()[1], scale * 1.3))


def draw_beyond(panel: Axes, outcomes: Outcomes) -> None:
    for place, cell in enumerate(BEYOND.values()):
        if ap := outcomes[cell].ap:
            panel.plot(ap, [place] * len(ap), "o", color=BLUE, markersize=4, alpha=0.6)
            panel.plot([statistics.fmean(ap)], [place], "|", color=INK, markersize=14)
        if failed := outcomes[cell].failed:
            panel.plot([0], [place], "x", color=ORANGE)
            panel.annotate(count(len(failed), "run") + " failed", (0, place), (6, 4), **SMALL)
        if not outcomes[cell].rows:
            panel.annotate("not run yet", (0, place), (6, -3), color="#777777", **SMALL)
    panel.set_yticks(range(len(BEYOND)), list(BEYOND))
    panel.set_ylim(len(BEYOND) - 0.5, -0.5)
    panel.set_xlim(left=-0.01)
    panel.set_xlabel("final AP")


def draw_accuracy(panel: Axes, outcomes: Outcomes) -> None:
    _series(panel, {8 * k: outcomes[cgbn(k)] for k in KS}, BLUE, "CGBN")
    _by_images(panel)


PANELS: dict[str, list[tuple[Callable[[Axes, Outcomes], None], str]]] = {
    "batch-norm": [(draw_batch_norm, "Final AP at the linear rate")],
    "warm-up": [(draw_warmup, "Final AP, CGBN, at the linear rate")],
    "bn-size": [(draw_bn_size, "Final AP by BN size")],
    "first-epochs": [(draw_first_epochs, "AP by epoch, CGBN, mean of the seeds")],
    "variance": [(draw_variance, "tr(Sigma)"), (draw_product, "rate² tr(Sigma) / n²")],
    "linear-rule": [(draw_break, "Final AP and noise scale")],
    "beyond": [(draw_beyond, "128 images per step")],
    "accuracy": [(draw_accuracy, "Final AP by mini-batch")],
}
"""By the key of the finding: what is drawn, and its title."""


def _series(panel: Axes, outcomes: dict[int, Outcome], color: str, label: str) -> None:
    """The mean over the seeds as a line, each seed as a dot; a cross at 0 for each run that failed."""
    means = {x: statistics.fmean(outcome.ap) for x, outcome in outcomes.items() if outcome.ap}
    crosses = [x for x, outcome in outcomes.items() for _ in outcome.failed]
    if means:
        panel.plot(list(means), list(means.values()), color=color, label=label)
        seeds = [(x, ap) for x, outcome in outcomes.items() for ap in outcome.ap]
        panel.plot(*zip(*seeds, strict=True), "o", color=color, markersize=4, alpha=0.6)
    if crosses:
        panel.plot(crosses, [0] * len(crosses), "x", color=color, label=f"{label}: failed", clip_on=False)


def _draw_noise(panel: Axes, outcomes: Outcomes, value: Callable[[Noise], float]) -> None:
    for (label, cells), color in zip(SERIES.items(), (BLUE, PURPLE, ORANGE), strict=True):
        points = {8 * k: value(noise) for k, cell in cells.items() if (noise := outcomes[cell].noise)}
        if points:
            panel.plot(list(points), list(points.values()), "o-", color=color, markersize=4, label=label)
    _by_images(panel)
    panel.set_ylabel("")
    panel.set_ylim(bottom=0)


def _by_images(panel: Axes, ticks: list[int] | None = None) -> None:
    ticks = ticks or [8 * k for k in KS]
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
    panel.set_xlabel("mini-batch, images")
    panel.set_ylabel("AP")
    panel.set_ylim(bottom=0)


def _style(panel: Axes) -> None:
    panel.grid(True, color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False, fontsize=8)
