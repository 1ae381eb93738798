"""Long commands: run so that all of it ends when the set-up ends, logged, and explained when they fail."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from environment.state import StepError, say

LOG_LINES = 15
"""Lines of a failed command's output to show."""

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
        r"Could NOT find CUDA|Failed to find nvcc|FOUND_LIB_cud",
        "the CUDA toolkit is not complete: install it and set HOROVOD_CUDA_HOME to its folder",
    ),
)
"""What a pattern in the output of a failed command means for the user; the first one found counts."""


def explain(output: str) -> tuple[str, list[str]]:
    """Why a command failed and what to do about it, and the lines of its output that show it (the last, if unknown)."""
    for pattern, explanation in EXPLANATIONS:
        if match := re.search(pattern, output):
            first = max(0, output.count("\n", 0, match.start()) - 2)
            return explanation.format(**match.groupdict()), output.splitlines()[first : first + LOG_LINES]
    return "see the end of its output below", output.splitlines()[-LOG_LINES:]


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
            explanation, lines = explain(output)
            raise StepError(f"{message} failed: {explanation} (full output: {log}).", lines)


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
