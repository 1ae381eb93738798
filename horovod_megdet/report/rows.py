"""Reading ``metrics.jsonl``."""

import json
from pathlib import Path
from typing import Any

from horovod_megdet.errors import UserError

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
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
    if not isinstance(row, dict) or row.get("kind") not in ("train", "evaluation"):
        raise UserError(f'{where}: not a row of metrics: it lacks "kind": "train" or "evaluation".')
    return row
