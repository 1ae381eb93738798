"""One page about a run, or about several runs side by side."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from horovod_megdet.evaluation.metrics import MAIN_METRIC, METRICS, percent
from horovod_megdet.files import atomic_write
from horovod_megdet.report.charts import GEOMETRY, Chart, Line, chart, number
from horovod_megdet.report.curves import CURVES_FILE
from horovod_megdet.report.page import VALIDATION_PAGE, render
from horovod_megdet.report.rows import column, noise_at_full_rate, smoothed
from horovod_megdet.report.runs import Run, read_runs
from horovod_megdet.wording import count

REPORT_FILE = "report.html"

LIGHT = ("#1d66d1", "#e06b0c", "#0b6f4d", "#c967a6", "#1c2024", "#7e1e1d", "#1f9bd4", "#5a2a9a")
DARK = ("#4c9bff", "#f38c25", "#11997b", "#e899c1", "#f4f6f8", "#daca3a", "#7fe0f5", "#8963e3")
"""Colors of the runs on a light and a dark page, in the same order. The ninth run has the first color again, but other
dashes. In simulations of color blindness (Machado et al. 2009) they stay at least 0.085 apart in OKLab."""

LIGHT_PAGE, DARK_PAGE = "#ffffff", "#161b22"
"""What the charts are drawn on."""

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
        differing=[row for row in settings if len({cell.text for cell in row[1]}) > 1],
        common=[row for row in settings if len({cell.text for cell in row[1]}) == 1],
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
    if groups := _groups(runs, [_training_set(run, runs) for run in runs]):
        found.append(f"These runs train on different images, so their losses and epochs do not compare: {groups}.")
    if groups := _validation_sets(runs):
        found.append(f"These runs are evaluated on different images, so their metrics do not compare: {groups}.")
    return found


def _groups(runs: Sequence[Run], keys: Sequence[str | None]) -> str:
    """The names of the runs with each key, such as `a, b / c`; empty if there is one key only. None is unknown."""
    groups: dict[str, list[str]] = {}
    for run, key in zip(runs, keys, strict=True):
        if key is not None:
            groups.setdefault(key, []).append(run.name)
    return " / ".join(", ".join(names) for names in groups.values()) if len(groups) > 1 else ""


def _training_set(run: Run, runs: Sequence[Run]) -> str | None:
    """What tells training sets apart: the fingerprint, or the settings if some run has no checkpoint yet."""
    if all(other.training_data for other in runs):
        return run.training_data
    return _values(run, ("train_annotations", "train_images", "synthetic_train_images", "keep_empty_images"))


def _validation_sets(runs: Sequence[Run]) -> str:
    """The runs by validation set, as :func:`_groups` names them: by files and, as far as known, by classes.

    Their root does not count: on another machine the same files are in another place.
    """
    files = [_values(run, ("val_annotations", "val_images", "synthetic_val_images")) for run in runs]
    return _groups(runs, files) or _groups(runs, [str(run.classes) if run.classes else None for run in runs])


def _values(run: Run, keys: Iterable[str]) -> str | None:
    return json.dumps([run.settings.get(f"data.{key}") for key in keys]) if run.settings is not None else None


def overview_table(runs: Sequence[Run], base: Path) -> Table:
    """How far the runs came, and what to open next; links are relative to ``base``."""
    return [
        ("epochs", [Cell(_progress(run)) for run in runs]),
        ("mini-batch, in images", [Cell(_mini_batch(run)) for run in runs]),
        ("time of training", [Cell(_duration(run)) for run in runs]),
        ("images per second, median", [Cell(_median(run, "images_per_second")) for run in runs]),
        ("noise scale at the full rate, in images", [Cell(_noise_scale(run)) for run in runs]),
        (f"best {MAIN_METRIC}", [_best(run) for run in runs]),
        (f"checkpoint of best {MAIN_METRIC}", [_best_checkpoint(run, base) for run in runs]),
        ("validation page", [_file(run.path / VALIDATION_PAGE, base) for run in runs]),
        ("curves", [_file(run.path / CURVES_FILE, base) for run in runs]),
        ("folder", [_file(run.path, base) for run in runs]),
    ]


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


def _best(run: Run) -> Cell:
    return Cell(f"{percent(run.best[MAIN_METRIC])} (epoch {run.best['epoch']:.1f})" if run.best else NONE)


def _best_checkpoint(run: Run, base: Path) -> Cell:
    if run.best is None:
        return Cell(NONE)
    path = run.checkpoint_of(run.best)
    return _file(path, base) if path else Cell(f"step {run.best['step']}, not kept")


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
    texts = [percent(np.nan if value is None else value) for value in values]
    known = [value for value in values if value is not None]
    best = percent(max(known)) if comparable and len(values) > 1 and known else ""
    return [Cell(text, emphasis=text == best) for text in texts]


def settings_table(runs: Sequence[Run]) -> Table:
    """All settings of the runs but their folder, as YAML would have them."""
    keys = dict.fromkeys(key for run in runs for key in run.settings or {} if key != "output.run_dir")
    return [(key, [Cell(_setting(run, key)) for run in runs]) for key in keys]


def _setting(run: Run, key: str) -> str:
    if run.settings is None or key not in run.settings:
        return NONE
    value = run.settings[key]
    return value if isinstance(value, str) and value else json.dumps(value)
