"""Tables for the terminal."""

import sys

from rich.console import Console
from rich.table import Table

from horovod_megdet.printing import is_quiet


def console() -> Console:
    """A console for rank 0: as wide as the terminal, or 120 columns if the output goes to a file or a pipe."""
    terminal = sys.stdout.isatty() and sys.stderr.isatty() and not is_quiet()
    return Console(
        width=None if terminal else 120,
        force_terminal=terminal,
        highlight=False,
        soft_wrap=not terminal,
        quiet=is_quiet(),
    )


def two_columns(title: str, rows: list[tuple[str, str]]) -> Table:
    """A titled table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(name, value)
    return table
