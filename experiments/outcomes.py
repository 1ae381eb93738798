"""What the lines of results say about each cell: means and spreads over its seeds."""

import statistics
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

from experiments.results import Row
from horovod_megdet.solver.gradient_noise import MEMORY

TRAINS = 0.1
"""Final AP below which a run counts as failed, like one whose loss stopped being finite."""

NOISE_EPOCHS = (3, 4)
"""Whose noise is compared: the warm-up is over, and the rate is the full one."""


@dataclass(frozen=True)
class Noise:
    """The gradient's noise at the full learning rate, averaged over epochs and seeds."""

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
    def trained(self) -> list[Row]:
        """Runs that came to their end with an AP of :data:`TRAINS` or more."""
        return [row for row in self.rows if row["outcome"] == "finished" and _final_ap(row) >= TRAINS]

    @property
    def failed(self) -> list[Row]:
        """The others."""
        return [row for row in self.rows if row not in self.trained]

    @property
    def ap(self) -> list[float]:
        """Final AP of the runs that trained."""
        return [_final_ap(row) for row in self.trained]

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
        """The noise in :data:`NOISE_EPOCHS` of the runs that trained, None where none was measured."""
        chosen = []
        for row in self.trained:
            measured = [entry for entry in row["training"] if entry.get("gradient_variance") is not None]
            for earlier, later in pairwise(measured):
                if round(later["epoch"]) in NOISE_EPOCHS:
                    values = [between(earlier, later, key) for key in ("gradient_variance", "squared_gradient")]
                    chosen.append((*values, later["lr"]))
        if not chosen:
            return None
        variance, signal, lr = (statistics.fmean(values) for values in zip(*chosen, strict=True))
        return Noise(variance, signal, lr, self.mini_batch)

    @property
    def factors(self) -> dict[str, float]:
        """The last factors of AGVM by module, averaged over the runs that have some."""
        last = [entry for row in self.rows for entry in row["training"][-1:] if "lr_factor_fpn" in entry]
        keys = [key for key in (last[0] if last else {}) if key.startswith("lr_factor_")]
        return {key.removeprefix("lr_factor_"): statistics.fmean(entry[key] for entry in last) for key in keys}

    def __str__(self) -> str:
        """Mean and spread of the final AP and what failed, with the number of runs of each."""
        if not self.rows:
            return "not run yet"
        steps = [row["diverged_at_step"] for row in self.rows if row["outcome"] == "diverged"]
        collapsed = [_final_ap(row) for row in self.failed if row["outcome"] == "finished"]
        parts = [f"{mean_and_spread(self.ap)} ({len(self.ap)})"] if self.ap else []
        if collapsed:
            parts.append(f"collapsed to {', '.join(f'{ap:.3f}' for ap in collapsed)} ({len(collapsed)})")
        if steps:
            parts.append(f"diverged at step {', '.join(map(str, steps))} ({len(steps)})")
        return "; ".join(parts)


def _final_ap(row: Row) -> float:
    """AP of a run that finished."""
    ap: float = row["evaluations"][-1]["AP"]
    return ap


def between(earlier: Row, later: Row, key: str) -> float:
    """The average of a measured value over the measurements between two rows; later ones count more.

    A row has the running average of all measurements before it, of which older ones fade. The sums behind two such
    averages differ by the measurements between them.
    """
    fade = 1 - 1 / MEMORY
    # In lines of before the number was noted, every step since the first had been measured.
    first, last = (row["noise_measurements" if "noise_measurements" in row else "step"] for row in (earlier, later))
    weights = [1 - fade**number for number in (first, last)]
    kept = fade ** (last - first)
    average: float = (weights[1] * later[key] - kept * weights[0] * earlier[key]) / (1 - kept)
    return average


class Outcomes:
    """The outcomes by cell; of a cell that did not run, an empty one."""

    def __init__(self, rows: list[Row]) -> None:
        by_cell: dict[str, dict[int, Row]] = {}
        for row in sorted(rows, key=lambda row: row["seed"]):
            by_cell.setdefault(row["cell"], {})[row["seed"]] = row
        self._by_cell = {cell: Outcome(tuple(by_seed.values())) for cell, by_seed in by_cell.items()}

    def __getitem__(self, cell: str) -> Outcome:
        return self._by_cell.get(cell, Outcome())


def mean_and_spread(values: list[float]) -> str:
    """`0.502 ± 0.004`: mean and standard deviation of a sample; the mean alone where there is one value."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}" if values else "–"


LEAST_DIFFERENCE = 0.01
"""Of AP: smaller ones are nothing to speak of, however small the spread."""

LEAST_FAILURES = 2
"""Runs by which failures have to differ: a single one can be chance."""


def clearly_above(high: list[float], low: list[float]) -> bool:
    """Whether the mean of ``high`` exceeds that of ``low`` by 2 standard errors and by :data:`LEAST_DIFFERENCE`."""
    if len(high) < 2 or len(low) < 2:
        return False
    error = sqrt(statistics.variance(high) / len(high) + statistics.variance(low) / len(low))
    return statistics.fmean(high) - statistics.fmean(low) > max(2 * error, LEAST_DIFFERENCE)


def clearly_better(one: Outcome, other: Outcome) -> bool:
    """Whether fewer runs fail, by :data:`LEAST_FAILURES`, or no more do and the AP of the others is clearly above."""
    fewer = len(other.failed) - len(one.failed)
    return fewer >= LEAST_FAILURES or (fewer >= 0 and clearly_above(one.ap, other.ap))
