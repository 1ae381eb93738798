"""Line charts of several runs on shared axes: the geometry, which ``templates/charts.html`` turns into SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 40.0, 338.0, 10.0, 194.0
"""Edges of the area between the axes, in a drawing of WIDTH x HEIGHT. To its right are the labels of the lines."""

GEOMETRY = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
"""The same for the template."""

MOST_POINTS = 400
"""Points of a line; more are not visible."""

LABEL_HEIGHT = 11.0
FAR = 9999.0


@dataclass(frozen=True)
class Line:
    """The values of one run."""

    run: int
    """Number of the run, from 0."""
    x: np.ndarray
    y: np.ndarray
    """(points,), not finite where there is no value."""
    style: str = "main"
    """``main`` has a label and values under the pointer; ``faint`` and ``reference`` are thin lines without."""


@dataclass(frozen=True)
class Axis:
    """An axis from ``low`` to ``high``, drawn from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def places(self, values: np.ndarray) -> np.ndarray:
        """Where values are drawn; those far outside at a distance that renderers of single precision can handle."""
        low, high = self.low, self.high
        if self.logarithmic:
            values, low, high = np.log(values), float(np.log(low)), float(np.log(high))
        return np.clip(self.start + (values - low) / (high - low) * (self.end - self.start), -FAR, FAR)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts of three to seven round values."""
        few_decades = self.high / self.low < 300 if self.logarithmic else False
        locator = (
            LogLocator(subs=(1, 2, 5) if few_decades else (1,))
            if self.logarithmic
            else MaxNLocator(6, steps=[1, 2, 5, 10])
        )
        values = np.array([v for v in locator.tick_values(self.low, self.high) if self.low <= v <= self.high])
        return [(round(float(place), 1), number(v)) for place, v in zip(self.places(values), values, strict=True)]


@dataclass(frozen=True)
class Chart:
    """A chart that is ready to be drawn."""

    title: str
    x_title: str
    summary: str
    """For those who cannot see it."""
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    paths: list[tuple[Line, str]]
    """Lines and their SVG paths, the faint ones first."""
    markers: list[tuple[int, float, float]]
    """Run, x and y."""
    labels: list[tuple[int, float, float]]
    """Run, x and y of the number at the end of its line."""
    points: list[dict[str, Any]]
    """What the pointer finds: run, places and values of the main lines."""


def chart(
    title: str,
    x_title: str,
    lines: Sequence[Line],
    names: Sequence[str],
    *,
    top: float = 0.0,
    logarithmic: bool = False,
    markers: bool = False,
) -> Chart | None:
    """The chart of these lines, None if no value of the main ones is finite.

    ``names`` are those of the runs. The x axis begins at 0, and so does the y axis unless it is logarithmic; ``top`` is
    where it ends, if not at the highest value. ``markers`` are dots at the points.
    """
    lines = [_drawable(line, logarithmic) for line in lines]
    main = [line for line in lines if line.style == "main" and np.isfinite(line.y).any()]
    if not main:
        return None
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
    low = float(values.min()) / 1.3 if logarithmic else min(0.0, float(values.min()))
    high = float(values.max()) * 1.3 if logarithmic else (top or 1.06 * float(values.max()) or 1.0)
    x_axis = Axis(0.0, 1.01 * max(float(line.x.max()) for line in main) or 1.0, LEFT, RIGHT)
    y_axis = Axis(low, high, BOTTOM, TOP, logarithmic)
    order = sorted(lines, key=lambda line: line.style == "main")
    return Chart(
        title,
        x_title,
        f"{title}{'' if title.endswith(x_title) else f' over {x_title}'}, last: "
        + ", ".join(f"{names[line.run]} {number(_last(line.y))}" for line in main),
        x_axis.ticks(),
        y_axis.ticks(),
        [(line, _path(x_axis.places(line.x), y_axis.places(line.y))) for line in order],
        _markers(main, x_axis, y_axis) if markers else [],
        _spread([(line.run, *_end(line, x_axis, y_axis)) for line in main]) if len(names) > 1 else [],
        [_points(line, x_axis, y_axis) for line in main],
    )


def number(value: float) -> str:
    """A short number: ``0.02``, ``3.5``, ``12k``."""
    return EngFormatter(sep="")(value) if abs(value) >= 10_000 else f"{value:.4g}"


def _drawable(line: Line, logarithmic: bool) -> Line:
    """The line with at most :data:`MOST_POINTS`, and without what its axis does not have."""
    kept = np.unique(np.linspace(0, len(line.x) - 1, min(len(line.x), MOST_POINTS)).round().astype(int))
    x, y = line.x[kept], line.y[kept]
    missing = ~np.isfinite(x) | ~np.isfinite(y) | (logarithmic & ~(y > 0))
    return Line(line.run, np.where(missing, 0.0, x), np.where(missing, np.nan, y), line.style)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """The SVG path through the points, interrupted where there is no value. A single point is a line of length 0."""
    commands, pen_down = [], False
    for point_x, point_y in zip(x, y, strict=True):
        if np.isfinite(point_y):
            commands.append(f"{'L' if pen_down else 'M'}{point_x:.1f} {point_y:.1f}" + ("" if pen_down else "h0"))
        pen_down = bool(np.isfinite(point_y))
    return "".join(commands)


def _markers(lines: Sequence[Line], x_axis: Axis, y_axis: Axis) -> list[tuple[int, float, float]]:
    return [
        (line.run, round(float(x), 1), round(float(y), 1))
        for line in lines
        for x, y in zip(x_axis.places(line.x), y_axis.places(line.y), strict=True)
        if np.isfinite(y)
    ]


def _end(line: Line, x_axis: Axis, y_axis: Axis) -> tuple[float, float]:
    last = np.flatnonzero(np.isfinite(line.y))[-1]
    y = float(y_axis.places(line.y)[last])
    return float(x_axis.places(line.x)[last]) + 6, min(max(y, TOP + 4), BOTTOM - 4)


def _spread(labels: list[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """Moves labels up or down, as little as it takes, so that none covers another one; closer where there are many."""
    height = LABEL_HEIGHT
    while (placed := _placed(labels, height)) is None:
        height *= 0.8
    return placed


def _placed(labels: list[tuple[int, float, float]], height: float) -> list[tuple[int, float, float]] | None:
    """The labels where they are at least ``height`` apart; None if that takes more room than there is."""
    placed: list[tuple[int, float, float]] = []
    for run, x, y in sorted(labels, key=lambda label: label[2]):
        taken = [other_y for _, other_x, other_y in placed if abs(other_x - x) < LABEL_HEIGHT]
        quarters = range(1, round(4 * (BOTTOM - TOP) / height))
        steps = [0.0, *(sign * height / 4 * step for step in quarters for sign in (1, -1))]
        free = (
            y + step
            for step in steps
            if TOP <= y + step <= BOTTOM and all(abs(y + step - other) >= height for other in taken)
        )
        if (place := next(free, None)) is None:
            return None
        placed.append((run, round(x, 1), round(place, 1)))
    return placed


def _last(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)][-1])


def _points(line: Line, x_axis: Axis, y_axis: Axis) -> dict[str, Any]:
    finite = np.isfinite(line.y)
    x, y = line.x[finite], line.y[finite]
    rounded = {"px": x_axis.places(x).round(1), "py": y_axis.places(y).round(1)}
    return {"run": line.run, "x": [number(v) for v in x], "y": [number(v) for v in y]} | {
        key: values.tolist() for key, values in rounded.items()
    }
