"""The cells: training configurations, one file each, identified by a hash of what they say."""

import fnmatch
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from horovod_megdet.config import Config, load_config
from horovod_megdet.errors import UserError

CELLS = Path(__file__).parent / "cells"

RANKS = 2
"""Of every cell; the layout of a mini-batch in passes and ranks follows from it."""


@dataclass(frozen=True)
class Cell:
    """A training configuration to run with several seeds."""

    name: str
    path: Path
    overrides: tuple[str, ...]
    config: Config

    @property
    def hash(self) -> str:
        """Of all that the cell and its base say. Keys that they do not name keep their defaults, and may be new."""
        values = self.config.model_dump(mode="json", exclude_unset=True)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Run:
    """A cell with one seed."""

    cell: Cell
    seed: int

    def __str__(self) -> str:
        return f"{self.cell.name}, seed {self.seed}"

    @property
    def key(self) -> tuple[str, int]:
        """What a line of results is found by."""
        return self.cell.hash, self.seed

    @property
    def folder(self) -> str:
        """Name of the run directory: another one when the cell changes."""
        return f"{self.cell.name}-{self.cell.hash}-seed{self.seed}"


def load_cells(folder: Path = CELLS, overrides: tuple[str, ...] = ()) -> tuple[list[Cell], dict[str, str]]:
    """All cells of a folder by name, and for each cell that this version cannot run, the sentence that says why."""
    cells, waiting = [], {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            cells.append(Cell(path.stem, path, overrides, load_config(path, list(overrides))))
        except UserError as error:
            waiting[path.stem] = str(error)
    return cells, waiting


def choose_runs(cells: list[Cell], only: str, seeds: int) -> list[Run]:
    """The runs to make: one seed of every cell first, so that all findings have something to show early.

    ``only`` has patterns such as ``k08_*,k16_cgbn``; the cells come in their order. Raises :class:`UserError` where a
    pattern fits no cell.
    """
    chosen: dict[str, Cell] = {}
    for pattern in only.split(",") if only else ["*"]:
        found = {cell.name: cell for cell in cells if fnmatch.fnmatch(cell.name, pattern.strip())}
        if not found:
            raise UserError(f"ONLY={only}: no cell is called {pattern}; there are {', '.join(c.name for c in cells)}.")
        chosen |= {name: cell for name, cell in found.items() if name not in chosen}
    return [Run(cell, seed) for seed in range(seeds) for cell in chosen.values()]
