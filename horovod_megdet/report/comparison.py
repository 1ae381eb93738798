"""One page about a run, or about several runs side by side."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from horovod_megdet.evaluation.metrics import MAIN_METRIC, METRICS, is_loss, percent
from horovod_megdet.files import atomic_write
from horovod_megdet.report.charts import GEOMETRY, Chart, Line, chart, number
from horovod_megdet.report.page import VALIDATION_PAGE, render
from horovod_megdet.report.rows import column, finite, noise_at_full_rate, smoothed
from horovod_megdet.report.runs import Run, read_runs
from horovod_megdet.run_files import CURVES_FILE
from horovod_megdet.wording import count

REPORT_FILE = "report.html"

LIGHT = ("#1d66d1", "#e06b0c", "#0b6f4d", "#c967a6", "#1c2024", "#7e1e1d", "#1f9bd4", "#5a2a9a")
DARK = ("#4c9bff", "#f38c25", "#11997b", "#e899c1", "#f4f6f8", "#daca3a", "#7fe0f5", "#8963e3")
"""Colors of the runs on a light and a dark page, in the same order. The ninth run has the first color again, but other
dashes. In simulations of color blindness (Machado et al. 2009) they stay at least 0.085 apart in OKLab."""

LIGHT_PAGE, DARK_PAGE = "#ffffff", "#161b22"
"""What the charts are drawn on."""

STYLES = 16
"""Kinds of lines: eight colors, each with two kinds of dashes."""

NONE = "–"


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    link: str | None = None
    emphasis: bool = False


Table = list[tuple[str, list[Cell]]]
"""Rows: what the row is about, and a cell for each run."""


def write_comparison(run_dirs: Sequence[Path], output: Path) -> Path:
    """Writes a self-contained HTML page about the runs of these folders and returns its path.

    Raises :class:`UserError` for a folder that is not a run's, and if there is nothing to draw yet.
    """
    runs = read_runs(list(run_dirs))
    names = [run.name for run in runs]
    settings = settings_table(runs)

    def differs(cells: list[Cell]) -> bool:
        return len({cell.text for cell, run in zip(cells, runs, strict=True) if run.settings is not None}) > 1

    html = render(
        "comparison.html",
        title=names[0] if len(runs) == 1 else count(len(runs), "run"),
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        names=names,
        notes=notes(runs),
        overview=overview_table(runs, output.resolve().parent),
        metric_charts=metric_charts(runs),
        training_charts=training_charts(runs),
        metrics=metrics_table(runs),
        differing=[row for row in settings if differs(row[1])],
        common=[row for row in settings if not differs(row[1])],
        colors={"light": LIGHT, "dark": DARK},
        pages={"light": LIGHT_PAGE, "dark": DARK_PAGE},
        **GEOMETRY,
    )
    with atomic_write(output) as file:
        file.write(html)
    return output


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader has to know before comparing the runs."""
    found = [f"{run.name} has no metrics yet." for run in runs if not run.rows]
    found += [f"{run.name} has no config.yaml: its settings are unknown." for run in runs if run.settings is None]
    if groups := _groups(runs, _training_sets(runs)):
        found.append(f"These runs train on different images, so their losses and epochs cannot be compared: {groups}.")
    if groups := _validation_sets(runs):
        found.append(f"These runs are evaluated on different images, so their metrics cannot be compared: {groups}.")
    if len(runs) > STYLES:
        found.append(f"There are {STYLES} kinds of lines: run {STYLES + 1} looks like run 1, and so on.")
    return found


def _groups(runs: Sequence[Run], keys: Sequence[str | None]) -> str:
    """The names of the runs with each key, such as `a, b / c`; empty if there is one key only. None is unknown."""
    groups: dict[str, list[str]] = {}
    for run, key in zip(runs, keys, strict=True):
        if key is not None:
            groups.setdefault(key, []).append(run.name)
    return " / ".join(", ".join(names) for names in groups.values()) if len(groups) > 1 else ""


def _training_sets(runs: Sequence[Run]) -> list[str | None]:
    """What tells training sets apart: the fingerprint, or the files if some run has no checkpoint yet."""
    if all(run.training_data for run in runs):
        return [run.training_data for run in runs]
    empty = [run.settings and run.settings["data.keep_empty_images"] for run in runs]
    return [files and f"{files} {kept}" for files, kept in zip(_files(runs, "train"), empty, strict=True)]


def _validation_sets(runs: Sequence[Run]) -> str:
    """The runs by validation set, as :func:`_groups` names them: by files and, as far as known, by classes."""
    return _groups(runs, _files(runs, "val")) or _groups(
        runs, [str(run.classes) if run.classes else None for run in runs]
    )


def _files(runs: Sequence[Run], split: str) -> list[str | None]:
    """What tells the annotations of the runs apart: their path below the root, since another machine has another root.

    Absolute paths are those of other runs if they lead to the same place.
    """
    found: list[str | None] = [None] * len(runs)
    names: dict[Path, str] = {}
    known = [(place, run.settings) for place, run in enumerate(runs) if run.settings is not None]
    for place, settings in sorted(
        known, key=lambda pair: Path(str(pair[1][f"data.{split}_annotations"])).is_absolute()
    ):
        name = str(settings[f"data.{split}_annotations"])
        if name.startswith("synthetic:"):
            found[place] = f"{name} {settings[f'data.synthetic_{split}_images']}"
        else:
            found[place] = names.setdefault(Path(str(settings["data.root"]), name), name)
    return found


def overview_table(runs: Sequence[Run], base: Path) -> Table:
    """How far the runs came, and what to open next; links are relative to ``base``."""
    decided = [_best(run, run.best_metric) for run in runs]
    rows = [
        ("epochs", [Cell(_progress(run)) for run in runs]),
        ("mini-batch, in images", [Cell(_mini_batch(run)) for run in runs]),
        ("time of training", [Cell(_duration(run)) for run in runs]),
        ("images per second, median", [Cell(_median(run, "images_per_second")) for run in runs]),
        ("noise scale at the full rate, in images", [Cell(_noise_scale(run)) for run in runs]),
        (f"best {MAIN_METRIC}", [_best(run, MAIN_METRIC) for run in runs]),
        *([("best by output.best_metric", decided)] if any(run.best_metric != MAIN_METRIC for run in runs) else []),
        ("best checkpoint", [_best_checkpoint(run, base) for run in runs]),
        (f"{MAIN_METRIC} of the multi-scale test", [Cell(_multi_scale(run)) for run in runs]),
        ("validation page", [_file(run.path / VALIDATION_PAGE, base) for run in runs]),
        ("curves", [_file(run.path / CURVES_FILE, base) for run in runs]),
        ("folder", [_file(run.path, base) for run in runs]),
    ]
    return [(title, cells) for title, cells in rows if any(cell.text != NONE for cell in cells)]


def _progress(run: Run) -> str:
    if not run.rows:
        return NONE
    epoch, planned = max(row["epoch"] for row in run.rows), (run.settings or {}).get("solver.epochs")
    if not isinstance(planned, int | float):
        return f"{epoch:.1f}"
    return f"{planned:g}" if epoch >= planned else f"{epoch:.1f} of {planned:g}"


def _duration(run: Run) -> str:
    hours = run.hours(run.rows[-1:])
    return str(timedelta(seconds=round(3600 * float(hours[0])))) if np.isfinite(hours).any() else NONE


def _median(run: Run, key: str) -> str:
    values = column(run.train, key)
    return f"{np.nanmedian(values):.1f}" if np.isfinite(values).any() else NONE


def _mini_batch(run: Run) -> str:
    value = run.train[-1].get("mini_batch") if run.train else None
    return NONE if value is None else number(value)


def _noise_scale(run: Run) -> str:
    row = noise_at_full_rate(run.train)
    return number(row["noise_scale"]) if row else NONE


def _best(run: Run, metric: str) -> Cell:
    best = run.best_by(metric)
    if best is None:
        return Cell(NONE)
    value, row = best
    text = number(value) if is_loss(metric) else percent(value)
    return Cell(f"{'' if metric == MAIN_METRIC else f'{metric} '}{text} (epoch {row['epoch']:.1f})")


def _best_checkpoint(run: Run, base: Path) -> Cell:
    best = run.best_by(run.best_metric)
    if best is None:
        return Cell(NONE)
    path = run.checkpoint_of(best[1])
    return _file(path, base) if path else Cell(f"step {best[1]['step']}, not kept")


def _multi_scale(run: Run) -> str:
    rows = [row for row in run.rows if row["kind"] == "multi_scale"]
    return percent(finite(rows[-1].get(MAIN_METRIC))) if rows else NONE


def _file(path: Path, base: Path) -> Cell:
    return Cell(path.name, quote(os.path.relpath(path, base))) if path.exists() else Cell(NONE)


def metric_charts(runs: Sequence[Run]) -> list[Chart]:
    """The main metric over epochs, images and time; empty before the first evaluation."""
    names = [run.name for run in runs]
    hours = [run.hours(run.evaluations) for run in runs]
    known = [values[np.isfinite(values)].max() for values in hours if np.isfinite(values).any()]
    unit, factor = ("minutes", 60) if known and max(known) < 2 else ("hours", 1)
    scales = {
        "epoch": [column(run.evaluations, "epoch") for run in runs],
        "images seen": [column(run.evaluations, "images_seen") for run in runs],
        f"{unit} of training": [factor * values for values in hours],
    }
    values = [100 * column(run.evaluations, MAIN_METRIC) for run in runs]
    charts = [
        chart(
            f"{MAIN_METRIC} in % by {title}",
            title,
            [Line(k, *xy) for k, xy in enumerate(zip(x, values, strict=True))],
            names,
            markers=True,
        )
        for title, x in scales.items()
    ]
    return [drawn for drawn in charts if drawn]


def training_charts(runs: Sequence[Run]) -> list[Chart]:
    """Loss, learning rate, noise scale, throughput and ranks over epochs, as far as there are values."""
    names = [run.name for run in runs]
    epochs = [column(run.train, "epoch") for run in runs]

    def lines(key: str, smooth: bool = False, style: str = "main") -> list[Line]:
        values = [column(run.train, key) for run in runs]
        return [
            Line(k, x, smoothed(y) if smooth else y, style) for k, (x, y) in enumerate(zip(epochs, values, strict=True))
        ]

    loss = lines("loss", smooth=True)
    raw = lines("loss", style="faint") if len(runs) == 1 else []
    noise = lines("noise_scale")
    mini_batches = lines("mini_batch", style="reference")
    charts = [
        chart("Loss", "epoch", [*raw, *loss], names, top=_top(loss)),
        chart("Learning rate", "epoch", lines("lr"), names),
        chart("Noise scale in images", "epoch", [*noise, *mini_batches], names, logarithmic=True),
        chart("Images per second", "epoch", lines("images_per_second", smooth=True), names),
    ]
    if any(row["kind"] == "ranks" for run in runs for row in run.rows):
        charts.append(chart("Ranks", "epoch", [_ranks(number, run) for number, run in enumerate(runs)], names))
    return [drawn for drawn in charts if drawn]


def _ranks(number: int, run: Run) -> Line:
    """The number of ranks over epochs, which changes at once in an elastic job."""
    points: list[tuple[float, float]] = []
    for row in run.rows:
        if row["kind"] == "ranks":
            points.append((row["epoch"], row["ranks_before"]))
        if "ranks" in row:
            points.append((row["epoch"], row["ranks"]))
    x, y = np.array(points, np.float64).reshape(-1, 2).T
    return Line(number, x, y)


def _top(losses: Sequence[Line]) -> float:
    """Where the axis of the losses ends, so that neither first steps nor a run that diverges flatten the rest."""
    tops = sorted(np.nanpercentile(line.y, 98) for line in losses if np.isfinite(line.y).any())
    return 1.1 * min(tops[-1], 2 * tops[(len(tops) - 1) // 2]) if tops else 0.0


def metrics_table(runs: Sequence[Run]) -> Table:
    """The last evaluation of each run, in percent: all metrics, and the main one of each class; best values marked."""
    last: list[dict[str, Any]] = [run.evaluations[-1] if run.evaluations else {} for run in runs]
    if not any(last):
        return []
    classes = dict.fromkeys(name for run in runs for name in run.classes)
    comparable = not _validation_sets(runs)
    rows = [("at epoch", [Cell(f"{row['epoch']:.1f}" if row else NONE) for row in last])]
    rows += [
        (f"{name}, {metric.meaning}", _percents([row.get(name) for row in last], comparable))
        for name, metric in METRICS.items()
    ]
    rows += [
        (f"{MAIN_METRIC} of {name}", _percents([row.get("per_class", {}).get(name) for row in last], comparable))
        for name in classes
    ]
    return rows


def _percents(values: Sequence[float | None], comparable: bool) -> list[Cell]:
    texts = [percent(finite(value)) for value in values]
    known = [text for text in texts if text != NONE]
    best = max(known, key=float) if comparable and len(values) > 1 and known else ""
    return [Cell(text, emphasis=text == best) for text in texts]


def settings_table(runs: Sequence[Run]) -> Table:
    """All settings of the runs but their folder, as YAML would have them."""
    keys = dict.fromkeys(key for run in runs for key in run.settings or {} if key != "output.run_dir")
    return [(key, [Cell(_setting(run, key)) for run in runs]) for key in keys]


def _setting(run: Run, key: str) -> str:
    if run.settings is None or key not in run.settings:
        return NONE
    value = run.settings[key]
    return value if isinstance(value, str) and value else json.dumps(value, default=str)
