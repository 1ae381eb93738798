"""Starts the ranks of a benchmark."""

import sys

from horovod_megdet.cluster.launch.launcher import find_program


def program(name: str) -> str:
    """The path of a program of this environment."""
    path = find_program(name)
    if path is None:
        raise SystemExit(f"{name} is not on the PATH: activate the environment that 'make setup' made.")
    return str(path)


def under_mpirun(ranks: int, *arguments: str, options: tuple[str, ...] = ()) -> list[str]:
    """The command that runs Python with these arguments on this machine; there may be more ranks than cores."""
    fixed = [program("mpirun"), "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]
    return [*fixed, *options, sys.executable, *arguments]
