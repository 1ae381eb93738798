#!/usr/bin/env python3
"""Collect one folder of wheels and sources, from which the set-up makes an environment on a machine that reaches no
package index ('make setup OFFLINE=FOLDER'). It is what 'make gpu-kit' runs, on a machine that does reach one.

In the folder: Horovod's sources, pip, and the packages of both lock files for the Python of that machine, without the
tools of 'make lint' and without torch, torchvision and what only they need (that machine has them: TORCH=installed).
"""

import argparse
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from environment.commands import SetupError, say
from environment.horovod_wheel import VERSION, check_sdist
from environment.options import TORCH_DEPENDENCIES, requirements

CHECKOUT = Path(__file__).resolve().parent.parent
NEEDED = {"jinja2", "markupsafe", "setuptools"}
"""Those of TORCH_DEPENDENCIES that the project and the build of Horovod need too."""
LINT = {"ast-serialize", "librt", "mypy", "mypy-extensions", "pathspec", "ruff", "types-pyyaml"}
"""Packages of requirements-dev.lock that only 'make lint' needs."""
GLIBC = range(28, 4, -1)
"""Wheels for glibc 2.28 (RHEL 8, Debian 10, Ubuntu 20.04) and older run on all that torch runs on."""
LARGE_BYTES = 1024**2
"""A wheel from this size on is left out if the machine has the package already. A smaller one costs nothing, and serves
where the version that is there is too old for the others."""


def canonical(name: str) -> str:
    """The name of a package as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(checkout: Path, mpi: str) -> list[str]:
    """The lines of the lock files for the packages of the kit."""
    left_out = (TORCH_DEPENDENCIES - NEEDED) | LINT | {"torch", "torchvision"}
    locks = (checkout / name for name in ("requirements.lock", "requirements-dev.lock"))
    lines = [line for lock in locks for line in requirements(lock.read_text(encoding="utf-8"), {"MPI": mpi})]
    return [line for line in lines if canonical(line.partition("==")[0]) not in left_out]


def listed(freeze: str) -> set[str]:
    """The packages that the output of 'pip list --format=freeze' or 'pip freeze' names."""
    names = (re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line) for line in freeze.splitlines())
    return {canonical(name.group()) for name in names if name}


def surplus(wheels: Iterable[Path], installed: set[str]) -> list[Path]:
    """The large ones of the ``wheels`` whose packages are ``installed`` already."""
    return [
        wheel
        for wheel in wheels
        if canonical(wheel.name.split("-")[0]) in installed and wheel.stat().st_size >= LARGE_BYTES
    ]


def download(folder: Path, *arguments: str) -> None:
    """Let pip put packages into the ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *arguments]
    if subprocess.run(command).returncode != 0:
        raise SetupError("pip could not get a package (it says above which): no kit was made.")


def collect(folder: Path, python: str, arch: str, mpi: str, installed: set[str]) -> None:
    """Make the kit ``folder`` for a machine with this ``python`` (``3.12``) and ``arch`` (``x86_64``).

    Raises:
        SetupError: the folder holds something already, or pip fails. There is no half a kit.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SetupError(f"KIT={folder} holds something already: remove it or name another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    names = [*(f"manylinux_2_{minor}" for minor in GLIBC), "manylinux2014", "manylinux2010", "manylinux1", "linux"]
    platforms = [f"--platform={name}_{arch}" for name in names]
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as temporary:
        new = Path(temporary, "kit")
        say(f"getting the packages of the lock files for Python {python} on {arch}")
        target = ("--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *platforms)
        download(new, *target, *pins(CHECKOUT, mpi), "pip")
        say(f"getting the sources of Horovod {VERSION}")
        download(new, "--no-binary=horovod", f"horovod=={VERSION}")
        check_sdist(new / f"horovod-{VERSION}.tar.gz")
        for wheel in surplus(new.glob("*.whl"), installed):
            wheel.unlink()
        new.replace(folder)
    files = list(folder.iterdir())
    mib = sum(file.stat().st_size for file in files) / 1024**2
    say(f"{folder} has {len(files)} files, {mib:.0f} MiB. Copy it into the checkout there, then run in the checkout:")
    say(f"  make setup OFFLINE={folder.name} MPI={mpi} TORCH=installed GPU=1 PYTHON=python3")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a kit and return the exit code."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="offline_kit.py", description=__doc__, formatter_class=formatter)
    here = "{}.{}".format(*sys.version_info[:2])
    parser.add_argument("--folder", type=Path, default=Path(".kit"), help="the folder to make (default: .kit)")
    parser.add_argument("--python", default=here, help=f"Python version of that machine (default: {here})")
    parser.add_argument("--arch", default=platform.machine(), help=f"its processor (default: {platform.machine()})")
    parser.add_argument("--mpi", choices=("none", "wheel"), default="none", help="wheel: Open MPI too (default: none)")
    parser.add_argument(
        "--installed",
        type=Path,
        metavar="FILE",
        help="output of 'pip list --format=freeze' there: what it names is left out if it is large",
    )
    options = parser.parse_args(arguments)
    try:
        installed = listed(options.installed.read_text(encoding="utf-8")) if options.installed else set()
        collect(options.folder.absolute(), options.python, options.arch, options.mpi, installed)
    except SetupError as error:
        print(f"offline_kit: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"offline_kit: {error.filename or options.folder}: {error.strerror}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
