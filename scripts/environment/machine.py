"""One sentence for each thing that the machine lacks."""

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from environment.commands import SetupError

ENVIRONMENT_GIB = 7
"""Room for an environment: 5.5 GiB with a CUDA build of torch."""


def check_disk(folder: Path, gib: float = ENVIRONMENT_GIB) -> None:
    """Whether the disk of ``folder`` has so many GiB free."""
    free = shutil.disk_usage(folder).free / 1024**3
    if free < gib:
        raise SetupError(
            f"{folder} is on a disk with {free:.1f} GiB free and the set-up needs {gib:.0f} GiB: make room, or choose "
            "another disk with VENV=."
        )


def check_compilers(environ: Mapping[str, str]) -> None:
    """Whether Horovod can be compiled: make, a C and a C++20 compiler, and the headers of Python."""
    hint = "(Debian, Ubuntu: apt install build-essential; Fedora, RHEL: dnf install gcc-c++ make; or 'module load gcc')"
    cxx = ""
    for what, variable, names in (
        ("make", "MAKE", ("make",)),
        ("C compiler", "CC", ("cc", "gcc", "clang")),
        ("C++ compiler", "CXX", ("c++", "g++", "clang++")),
    ):
        candidates = environ.get(variable, "").split()[:1] or names
        cxx = next((name for name in candidates if shutil.which(name, path=environ["PATH"])), "")
        if not cxx:
            raise SetupError(
                f"No {what} was found ({', '.join(candidates)}), and Horovod is compiled on this machine: install it "
                f"{hint} or set {variable}."
            )
    probe = "#include <concepts>\ntemplate <std::integral T> T same(T x) { return x; }\n"
    command = [cxx, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(command, input=probe, text=True, capture_output=True, env=dict(environ)).returncode != 0:
        raise SetupError(
            f"{cxx} does not know C++20, which the headers of torch need: install GCC 10 or Clang 12 or newer and name "
            "it with CC= and CXX=."
        )
    headers = Path(sysconfig.get_path("include"))
    folders = [str(headers), *filter(None, environ.get("CPATH", "").split(os.pathsep))]
    if not any(Path(folder, "Python.h").exists() for folder in folders):
        raise SetupError(
            f"{headers}/Python.h is missing, and Horovod is compiled with it: install the headers of Python (Debian, "
            f"Ubuntu: apt install {headers.name}-dev; Fedora, RHEL: dnf install {headers.name}-devel), or "
            "name a folder that has them in CPATH."
        )


def system_mpi(path: str) -> str:
    """What identifies the MPI in ``path``: on the first line its mpicc, then what mpirun says about itself."""
    mpicc, mpirun = shutil.which("mpicc", path=path), shutil.which("mpirun", path=path)
    if not mpicc or not mpirun:
        raise SetupError(
            f"MPI=system needs {'mpirun' if mpicc else 'mpicc'} in PATH: load your cluster's MPI ('module load "
            "openmpi', or apt install libopenmpi-dev openmpi-bin), or use MPI=wheel or MPI=none."
        )
    result = subprocess.run([mpirun, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return f"{mpicc}\n{result.stdout.strip()}"


def cuda_toolkit(environ: Mapping[str, str], path: str) -> str:
    """The folder of the CUDA toolkit: that in CUDA_HOME, or that of the nvcc in ``path``, or the usual one.

    The nvcc in PATH may be a script that calls the one in the toolkit, so nvcc itself is asked, as CMake does.
    """
    folders = [environ["CUDA_HOME"]] if environ.get("CUDA_HOME") else ["/usr/local/cuda"]
    nvcc = shutil.which("nvcc", path=path)
    if nvcc and not environ.get("CUDA_HOME"):
        result = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        folders = re.findall(r"^#\$ TOP=(.+)$", result.stderr, re.MULTILINE) + folders
    for folder in folders:
        if Path(folder, "bin", "nvcc").exists():
            return str(Path(folder).resolve())
    raise SetupError(
        f"GPU=1 needs the CUDA toolkit of torch's CUDA version, and there is no bin/nvcc in {' or '.join(folders)}: "
        "install it ('module load cuda') or set HOROVOD_CUDA_HOME to its folder."
    )
