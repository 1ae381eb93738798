"""What the lines of results say about each cell: means and spreads over its seeds."""

import statistics
from dataclasses import dataclass
from math import sqrt

from experiments.results import Row

TRAINS = 0.1
"""Final AP below which a run counts as failed, like one whose loss stopped being finite."""

FULL_RATE = 0.99
"""Part of the highest learning rate from which on a row counts as one at the full rate."""


@dataclass(frozen=True)
class Noise:
    """The gradient's noise at the full learning rate, averaged over rows and seeds."""

    variance: float
    """tr(Sigma), the variance of the gradient of a single image."""
    signal: float
    """|g|^2; can be negative."""
    lr: float
    images: int

    @property
    def scale(self) -> float | None:
        """B in images, None where |g|^2 cannot be told from the noise."""
        return self.variance / self.signal if self.signal > 0 else None

    @property
    def per_image(self) -> float:
        """lr^2 tr(Sigma) / n^2: the variance of the weights' update, per image seen."""
        return self.lr**2 * self.variance / self.images**2


@dataclass(frozen=True)
class Outcome:
    """All runs of a cell, by seed."""

    rows: tuple[Row, ...] = ()

    @property
    def ap(self) -> list[float]:
        """Final AP of the runs that did not diverge."""
        return [row["evaluations"][-1]["AP"] for row in self.rows if row["outcome"] == "finished"]

    @property
    def failed(self) -> list[Row]:
        """Runs that diverged, or ended below :data:`TRAINS`."""
        return [row for row in self.rows if row["outcome"] == "diverged" or row["evaluations"][-1]["AP"] < TRAINS]

    @property
    def diverged_at(self) -> list[int]:
        """The steps at which runs diverged."""
        return [row["diverged_at_step"] for row in self.rows if row["outcome"] == "diverged"]

    @property
    def mini_batch(self) -> int:
        """Images per step; needs a run."""
        return self.rows[0]["mini_batch"]

    def ap_at(self, epoch: int) -> list[float]:
        """AP after an epoch, of all runs that came so far."""
        return [e["AP"] for row in self.rows for e in row["evaluations"] if round(e["epoch"]) == epoch]

    @property
    def epochs(self) -> list[int]:
        """The epochs after which there are evaluations."""
        return sorted({round(e["epoch"]) for row in self.rows for e in row["evaluations"]})

    @property
    def noise(self) -> Noise | None:
        """The noise while the rate was highest, None where none was measured."""
        chosen = []
        for row in self.rows:
            measured = [entry for entry in row["training"] if entry.get("gradient_variance") is not None]
            full = FULL_RATE * max((entry["lr"] for entry in row["training"]), default=0.0)
            chosen += [entry for entry in measured if entry["lr"] >= full]
        if not chosen:
            return None
        variance, signal, lr = (
            statistics.fmean(entry[key] for entry in chosen) for key in ("gradient_variance", "squared_gradient", "lr")
        )
        return Noise(variance, signal, lr, self.mini_batch)

    def __str__(self) -> str:
        """Mean and spread of the final AP, what failed, and how many runs there are."""
        if not self.rows:
            return "not run yet"
        parts = [mean_and_spread(self.ap)] if self.ap else []
        if self.diverged_at:
            parts.append(f"diverged at step {', '.join(map(str, self.diverged_at))}")
        return f"{'; '.join(parts)} ({len(self.rows)})"


class Outcomes:
    """The outcomes by cell; of a cell that did not run, an empty one."""

    def __init__(self, rows: list[Row]) -> None:
        by_cell: dict[str, list[Row]] = {}
        for row in sorted(rows, key=lambda row: row["seed"]):
            by_cell.setdefault(row["cell"], []).append(row)
        self._by_cell = {cell: Outcome(tuple(its_rows)) for cell, its_rows in by_cell.items()}

    def __getitem__(self, cell: str) -> Outcome:
        return self._by_cell.get(cell, Outcome())


def mean_and_spread(values: list[float]) -> str:
    """`0.502 ± 0.004`: mean and standard deviation of a sample; the mean alone where there is one value."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}" if values else "–"


LEAST_DIFFERENCE = 0.01
"""Of AP: smaller ones are nothing to speak of, however small the spread."""


def clearly_above(high: list[float], low: list[float]) -> bool:
    """Whether the mean of ``high`` exceeds that of ``low`` by 2 standard errors and by :data:`LEAST_DIFFERENCE`."""
    if len(high) < 2 or len(low) < 2:
        return False
    error = sqrt(statistics.variance(high) / len(high) + statistics.variance(low) / len(low))
    return statistics.fmean(high) - statistics.fmean(low) > max(2 * error, LEAST_DIFFERENCE)
