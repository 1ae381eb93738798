"""The lines of results: one JSON object for each finished or diverged run."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from horovod_megdet.errors import UserError

Row = dict[str, Any]


class Results:
    """A file of lines, to which several drivers may append."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """All lines, without an incomplete last one. Raises :class:`UserError` naming any other that is not ours."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        return [self._row(line, number) for number, line in enumerate(lines[:-1], start=1) if line.strip()]

    def append(self, row: Row) -> None:
        """Adds a line, on disk when this returns."""
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with self._locked() as file:
            _repair(file)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def repair(self) -> bool:
        """Removes a last line without its end, which an interruption leaves behind; True if there was one."""
        if not self.path.exists():
            return False
        with self._locked() as file:
            return _repair(file)

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror or error}.") from error

    def _row(self, line: bytes, number: int) -> Row:
        try:
            row = json.loads(line)
            whole = {"cell", "hash", "seed", "outcome", "evaluations"} <= row.keys()
            if whole and (row["evaluations"] or row["outcome"] == "diverged"):
                return row
        except (ValueError, AttributeError):
            pass
        raise UserError(f"{self.path}, line {number}: not a line of results. Remove it; its run is then made again.")


def _repair(file: BinaryIO) -> bool:
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    file.truncate(whole)
    return whole < len(content)
