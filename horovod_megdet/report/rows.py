"""The rows of ``metrics.jsonl``."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from horovod_megdet.errors import UserError

KINDS = ("train", "evaluation", "multi_scale", "ranks")
"""Of rows. The third is that of the multi-scale test at the end of a run; the last is a change of the ranks."""

Rows = list[dict[str, Any]]


def read_metrics(path: str | Path) -> Rows:
    """The rows of a ``metrics.jsonl``, one dict for each line.

    A last line without its newline is what a running or killed job leaves behind; it is ignored. Raises
    :class:`UserError` naming file and line for anything else that is not a row, and for a missing file.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}. Is {path.parent} a run directory?") from None
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(lines[:-1], start=1) if line.strip()]


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}). Was the file edited? Remove the line.") from None
    if not isinstance(row, dict) or row.get("kind") not in KINDS:
        kinds = ", ".join(f'"{kind}"' for kind in KINDS)
        raise UserError(f'{where}: not a row of metrics: it lacks a "kind", one of {kinds}.')
    if math.isnan(finite(row.get("step")) + finite(row.get("epoch"))):
        raise UserError(f'{where}: not a row of metrics: its "step" or "epoch" is not a number.')
    return row


def finite(value: Any) -> float:
    """A number as it is, NaN for anything else: what is missing, null, infinite or no number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def column(rows: Rows, key: str) -> np.ndarray:
    """The values of a key as float64 (rows,), NaN if a row has none or it is not finite."""
    return np.array([finite(row.get(key)) for row in rows], np.float64)


def noise_at_full_rate(rows: Rows) -> dict[str, Any] | None:
    """The last row that has a noise scale and a learning rate of at least half the largest; None without one.

    The noise scale grows when the rate falls (McCandlish et al. 2018, appendix C), so that what is measured after a
    milestone does not tell whether the full rate, or a larger mini-batch, would do.
    """
    rates = column(rows, "lr")
    full = rates >= np.nanmax(rates, initial=0.0) / 2
    measured = [
        row for row, at_full_rate in zip(rows, full, strict=True) if at_full_rate and finite(row.get("noise_scale")) > 0
    ]
    return measured[-1] if measured else None


def smoothed(values: np.ndarray) -> np.ndarray:
    """The running mean over about a twentieth of the values; same length."""
    return running_mean(values, max(1, len(values) // 40))


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
