"""What the boxes of a data set mean for the anchors and the size of the images: `megdet anchors`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from rich.table import Table

from horovod_megdet.config import Config
from horovod_megdet.data.coco import CocoDataset
from horovod_megdet.files import atomic_write
from horovod_megdet.models.anchor_fit import ResizedBoxes, best_sizes, resized_boxes
from horovod_megdet.models.detector import SIZE_DIVISIBLE
from horovod_megdet.report.curves import BLUE, INK, ORANGE, style

THIN = 8
"""Pixels, two cells of P2: what is thinner at the network's input hardly leaves a trace."""

MANY = 0.05
"""Part of the objects that may be thinner, before larger images are suggested."""

MOST_ENLARGED = 2.0
"""Images are suggested at most so much larger than configured: pixels, and time, grow with its square."""

WORTH_IT = 0.01
"""Gain of recall at an IoU of 0.5, or of the best IoU, below which other anchor sizes are not suggested."""

SIZES = {"small": (0, 32), "medium": (32, 96), "large": (96, np.inf)}
"""COCO's sizes of objects: bounds of the square root of the area, here in pixels of the network's input."""


@dataclass(frozen=True)
class Fit:
    """How the anchors of some settings cover the objects."""

    anchor_sizes: tuple[int, ...]
    shorter_sides: tuple[int, ...]
    longer_side: int
    objects: ResizedBoxes
    iou: NDArray[np.float64]
    """(n,): the best of each object."""

    @classmethod
    def of(cls, config: Config, dataset: CocoDataset, factor: float, anchor_sizes: Sequence[int] | None) -> "Fit":
        """With images larger by a factor, and the best sizes of anchors if none are given."""
        sides, longer = config.data.shorter_side_train, config.data.longer_side_train
        if factor > 1:
            sides, longer = tuple(_padded(factor * side) for side in sides), _padded(factor * longer)
        ratios = config.model.anchor_aspect_ratios
        objects = resized_boxes(dataset, sides, longer)
        sizes = tuple(anchor_sizes or best_sizes(objects, ratios))
        return cls(sizes, sides, longer, objects, objects.best_iou(sizes, ratios))

    def mean_iou(self) -> float:
        """The mean over classes of the objects' best IoU."""
        return self.objects.class_mean(self.iou)

    def class_recall(self) -> float:
        """The mean over classes of the recall at an IoU of 0.5."""
        return self.objects.class_mean(self.iou >= 0.5)

    def recall(self, threshold: float, size: str | None = None) -> float:
        """Part of the objects, NaN if there are none, whose best IoU is at least the threshold."""
        low, high = SIZES[size] if size else (0, np.inf)
        sides = self.objects.sides()
        chosen = self.iou[(sides >= low) & (sides < high)]
        return float((chosen >= threshold).mean()) if len(chosen) else float("nan")


@dataclass(frozen=True)
class AnchorReport:
    """The configured settings and what is suggested in their place, which may be the same."""

    configured: Fit
    suggested: Fit
    aspect_ratios: tuple[float, ...]

    def table(self) -> Table:
        """Both, side by side."""
        table = Table(title="Anchors and objects, in pixels of the network's input", title_justify="left")
        table.add_column("")
        both = (self.configured, self.suggested)
        for name in ("configured", "suggested"):
            table.add_column(name, justify="right")
        for title, values in {
            "anchor_sizes": [_listed(fit.anchor_sizes) for fit in both],
            "shorter_side_train": [_listed(fit.shorter_sides) for fit in both],
            "best IoU of objects, mean over classes": [f"{fit.mean_iou():.3f}" for fit in both],
            "recall at IoU 0.5, mean over classes": [_percent(fit.class_recall()) for fit in both],
            "recall at IoU 0.5 of all objects": [_percent(fit.recall(0.5)) for fit in both],
            **{f"  of {size} objects": [_percent(fit.recall(0.5, size)) for fit in both] for size in SIZES},
            "recall at IoU 0.7 of all objects": [_percent(fit.recall(0.7)) for fit in both],
            "square root of area: 5 %, median, 95 %": [_quantiles(fit.objects.sides()) for fit in both],
            f"objects thinner than {THIN} pixels": [_percent(_thin(fit.objects)) for fit in both],
            "height / width: 5 %, median, 95 %": [_quantiles(fit.objects.aspect_ratios(), ".2g") for fit in both],
        }.items():
            table.add_row(title, *values)
        return table

    def advice(self) -> str:
        """A sentence for each setting, and the YAML lines of those to change."""
        sentences, lines = [], {}
        if self.suggested.shorter_sides == self.configured.shorter_sides:
            sentences.append(f"The images are large enough: {_percent(_thin(self.configured.objects))} of the objects")
            sentences[-1] += f" are thinner than {THIN} pixels."
        else:
            ratio = (self.suggested.shorter_sides[0] / self.configured.shorter_sides[0]) ** 2
            sentences.append(
                f"{_percent(_thin(self.configured.objects))} of the objects are thinner than {THIN} pixels; larger "
                f"images have {ratio:.1f} times the pixels, and a step takes about as much longer."
            )
            lines["data"] = {
                "shorter_side_train": list(self.suggested.shorter_sides),
                "longer_side_train": self.suggested.longer_side,
                "shorter_side_test": max(self.suggested.shorter_sides),
                "longer_side_test": self.suggested.longer_side,
            }
        if self.suggested.anchor_sizes == self.configured.anchor_sizes:
            sentences.append(f"Other anchor sizes would raise neither recall nor IoU by {WORTH_IT:g}.")
        else:
            old, new = self.configured, self.suggested
            sentences.append(
                f"With what is suggested, recall at IoU 0.5 goes from {_percent(old.class_recall())} to "
                f"{_percent(new.class_recall())} and the best IoU from {old.mean_iou():.3f} to {new.mean_iou():.3f}, "
                "means over classes."
            )
            lines["model"] = {"anchor_sizes": list(self.suggested.anchor_sizes)}
        return "\n".join(sentences) + (
            f"\n\n{yaml.safe_dump(lines, default_flow_style=None, sort_keys=False)}" if lines else ""
        )

    def write_plot(self, path: Path) -> None:
        """Draws the objects' sizes, the recall over IoU and the aspect ratios, as PNG, PDF or SVG."""
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
        figure = Figure(figsize=(15, 4.2), layout=layout, facecolor="white")
        sizes, recall, ratios = figure.subplots(1, 3)
        self._draw_sizes(sizes)
        self._draw_recall(recall)
        self._draw_ratios(ratios)
        with atomic_write(path) as file:
            figure.savefig(file, format=path.suffix.removeprefix(".") or "png", dpi=120)

    def _draw_sizes(self, panel: Axes) -> None:
        panel.set_title("Objects and anchors, dashed, by size")
        same_images = self.suggested.shorter_sides == self.configured.shorter_sides
        for fit, name, color in self._drawn():
            if fit is self.configured or not same_images:
                _histogram(panel, fit.objects.sides(), INK if same_images else color)
            for number, size in enumerate(fit.anchor_sizes):
                panel.axvline(size, color=color, linewidth=1.4, linestyle="--", label=None if number else name)
        panel.legend(fontsize=9, framealpha=0.9, edgecolor="white")
        style(panel, "square root of the area, in pixels of the network's input")

    def _draw_recall(self, panel: Axes) -> None:
        panel.set_title("Objects that an anchor covers, in %")
        thresholds = np.linspace(0.2, 1, 81)
        for fit, name, color in self._drawn():
            panel.plot(
                thresholds,
                [100 * fit.recall(threshold) for threshold in thresholds],
                color=color,
                linewidth=1.8,
                label=f"{name}: {_listed(fit.anchor_sizes)}",
            )
        panel.set_ylim(0, 102)
        panel.legend(frameon=False, fontsize=9, loc="lower left")
        style(panel, "lowest IoU")

    def _draw_ratios(self, panel: Axes) -> None:
        panel.set_title("Objects and anchors, dashed, by aspect ratio")
        _histogram(panel, self.configured.objects.aspect_ratios(), INK)
        for ratio in self.aspect_ratios:
            panel.axvline(ratio, color=BLUE, linewidth=1.2, linestyle="--")
        style(panel, "height / width")

    def _drawn(self) -> list[tuple[Fit, str, str]]:
        fits = [(self.configured, "configured", BLUE)]
        return fits if self.suggested is self.configured else [*fits, (self.suggested, "suggested", ORANGE)]


def fit_anchors(config: Config, dataset: CocoDataset) -> AnchorReport:
    """Compares the configured anchors and image sizes with the best ones for the objects of a training set."""
    ratios = config.model.anchor_aspect_ratios
    configured = Fit.of(config, dataset, 1.0, config.model.anchor_sizes)
    thin = float(np.quantile(configured.objects.shorter_sides(), MANY))
    factor = min(MOST_ENLARGED, max(1.0, THIN / thin))
    suggested = Fit.of(config, dataset, factor, None)
    kept = Fit.of(config, dataset, factor, configured.anchor_sizes) if factor > 1 else configured
    gains = suggested.class_recall() - kept.class_recall(), suggested.mean_iou() - kept.mean_iou()
    if max(gains) < WORTH_IT:
        suggested = kept
    return AnchorReport(configured, suggested, ratios)


def _padded(side: float) -> int:
    return int(np.ceil(side / SIZE_DIVISIBLE)) * SIZE_DIVISIBLE


def _thin(objects: ResizedBoxes) -> float:
    return float((objects.shorter_sides() < THIN).mean())


def _histogram(panel: Axes, values: NDArray[np.float64], color: str) -> None:
    edges = np.geomspace(values.min() * 0.99, values.max() * 1.01, 41)
    panel.hist(values, edges.tolist(), histtype="stepfilled", color=color, alpha=0.25)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _quantiles(values: NDArray[np.float64], form: str = ".0f") -> str:
    return ", ".join(f"{value:{form}}" for value in np.quantile(values, (0.05, 0.5, 0.95)))


def _percent(part: float) -> str:
    return "-" if np.isnan(part) else f"{100 * part:.1f} %"
