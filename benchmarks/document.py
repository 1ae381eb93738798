"""Sections of docs/benchmarks.md that a command of their own measures and writes."""

import re
from collections.abc import Sequence
from pathlib import Path

Row = tuple[str, ...]


def table(head: Row, rows: Sequence[Row]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, tuple("---" for _ in head), *rows))


def write_section(path: Path, text: str) -> None:
    """Replaces the section of the file that has the heading of ``text``, its first line, or appends it."""
    heading = re.escape(text.partition("\n")[0])
    section = re.compile(rf"^{heading}\n.*?(?=^## |\Z)", flags=re.DOTALL | re.MULTILINE)
    document = path.read_text()
    if section.search(document):
        document = section.sub(lambda _: f"{text.rstrip()}\n\n", document)
    else:
        document = f"{document.rstrip()}\n\n{text}"
    path.write_text(f"{document.rstrip()}\n")
