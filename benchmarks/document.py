"""Sections of docs/benchmarks.md that a command of their own measures and writes."""

import argparse
import os
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from horovod_megdet import comm

Row = tuple[str, ...]


def table(head: Row, rows: Sequence[Row]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, tuple("---" for _ in head), *rows))


def processor() -> str:
    """The cores of this machine, in words."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{os.cpu_count()} cores of {line.partition(':')[2].strip()}"
    return f"{os.cpu_count()} cores of {platform.machine()}"


def machine() -> str:
    """What the figures belong to."""
    return f"{processor()}, no GPU, torch {torch.__version__}"


def measure_section(description: str | None, section: Callable[[], str]) -> None:
    """Measures a section with one thread per rank; rank 0 prints it and, with ``--write``, replaces it in the file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="Markdown file whose section is replaced")
    arguments = parser.parse_args()
    comm.init()
    torch.set_num_threads(1)
    text = section()
    if comm.is_main():
        print(text)
        if arguments.write:
            write_section(arguments.write, text)
    comm.shutdown()


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
