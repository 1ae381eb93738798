"""The layers that docs/architecture.md draws: imports go one way, and only comm imports Horovod and mpi4py."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PACKAGE = PROJECT / "horovod_megdet"

LAYERS = (
    {"errors", "printing", "progress", "versions", "wording"},
    {"config", "files", "launched", "run_files"},
    {"arguments", "comm", "data"},
    {"layers"},
    {"models"},
    {"evaluation", "solver"},
    {"report"},
    {"engine"},
    {"cluster", "import_data", "inference"},
    {"export", "plan", "predict", "training"},
    {"run", "__init__"},
    {"cli"},
)
"""Modules and packages; each imports from those in the sets before its own only."""

FILES = sorted(path.relative_to(PROJECT) for path in PACKAGE.rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse((PROJECT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def layer_of(unit: str) -> int:
    return next(number for number, units in enumerate(LAYERS) if unit in units)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_down(file: Path) -> None:
    own = file.parts[1].removesuffix(".py")
    for name in imports(file):
        if name.startswith("horovod_megdet."):
            other = name.split(".")[1]
            other = other if (PACKAGE / other).exists() or (PACKAGE / f"{other}.py").exists() else "__init__"
            assert other == own or layer_of(other) < layer_of(own), f"{own} imports {name}"


def test_only_comm_imports_horovod_and_mpi4py() -> None:
    found = {file.parts[1] for file in FILES for name in imports(file) if name.split(".")[0] in ("horovod", "mpi4py")}
    assert found == {"comm"}


def test_the_map_names_every_package_and_module() -> None:
    map_of_code = (PROJECT / "docs" / "architecture.md").read_text()
    units = {file.parts[1] if file.parts[1].endswith(".py") else f"{file.parts[1]}/" for file in FILES}
    indented = r"^ {6}(?:\S+, )*"  # the level of the package's own files and folders
    missing = [name for name in units if not re.search(indented + re.escape(name), map_of_code, re.MULTILINE)]
    assert missing == ["__init__.py"]
