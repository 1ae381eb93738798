"""Horovod for the installed torch: how its wheel is built, and the name under which it is kept."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment.commands import Runner, SetupError

VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
PATCH = Path(__file__).resolve().parent.parent / f"horovod-{VERSION}.patch"

COMPILER_BYTES = 2 * 1024**3
"""Memory that one compiler process needs for torch's headers."""


def short_hash(*values: Any) -> str:
    """16 hexadecimal digits that depend on all of the values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Found:
    """What a build of Horovod has to fit: ``torch`` is the full version (``2.14.1+cu130``), ``cuda`` what it is for."""

    torch: str
    cuda: str | None
    torch_folder: str
    abi: str
    openmpi: str
    cmake_folder: str


def inspect(python: Path) -> Found:
    """What is installed for the interpreter ``python``."""
    program = (
        "import cmake, importlib.metadata as metadata, json, os, sysconfig, torch\n"
        "openmpi = ''.join(d.version for d in metadata.distributions(name='openmpi'))\n"
        "abi = sysconfig.get_config_var('SOABI')\n"
        "torch_folder = os.path.dirname(torch.__file__)\n"
        "facts = [torch.__version__, torch.version.cuda, torch_folder, abi, openmpi, cmake.CMAKE_BIN_DIR]\n"
        "print(json.dumps(facts))"
    )
    result = subprocess.run([python, "-I", "-c", program], capture_output=True, text=True)
    if result.returncode != 0:
        raise SetupError(f"{python} cannot import torch and cmake: {result.stderr.strip().splitlines()[-1]}.")
    return Found(*json.loads(result.stdout))


def wheel_key(torch: str, python_abi: str, mpi: str, variables: Mapping[str, str], patch: Path = PATCH) -> str:
    """A readable name that differs as soon as anything does that a build of Horovod depends on.

    ``mpi`` identifies the MPI library; ``variables`` are those of :func:`build_variables` and of the compilers.
    """
    cpu = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split()) & {"avx", "f16c", "fma"}
    machine = [platform.system(), platform.machine(), *platform.libc_ver(), *sorted(cpu)]
    digest = short_hash(torch, python_abi, mpi, machine, dict(variables), patch.read_text(encoding="utf-8"))
    kind = variables.get("HOROVOD_GPU_OPERATIONS", "CPU")
    name = f"horovod-{VERSION}-torch-{torch}-{python_abi}-MPI-{mpi.splitlines()[-1]}-{kind}"
    return f"{re.sub(r'[^A-Za-z0-9_.+-]+', '-', name)[:200]}-{digest}"


def build_variables(mpi: bool, gpu: bool) -> dict[str, str]:
    """The environment variables that tell Horovod's build what to include."""
    include = {"PYTORCH": True, "TENSORFLOW": False, "MXNET": False, "GLOO": True, "MPI": mpi}
    variables = {f"HOROVOD_WITH{'' if wanted else 'OUT'}_{name}": "1" for name, wanted in include.items()}
    return {**variables, "HOROVOD_GPU_OPERATIONS": "NCCL"} if gpu else variables


def check_sdist(sdist: Path) -> None:
    """Whether ``sdist`` is the file with Horovod's sources that the patch was made for."""
    if hashlib.sha256(sdist.read_bytes()).hexdigest() != SDIST_SHA256:
        raise SetupError(f"{sdist.name} is not the file that PyPI has (its SHA-256 differs): check where pip finds it.")


def get_sources(runner: Runner, python: Path, work: Path) -> Path:
    """Download Horovod into the folder ``work`` and patch it there.

    Without a package index, a wheel of Horovod that pip finds for this Python is taken as it is.
    """
    shutil.rmtree(work, ignore_errors=True)
    download = [str(python), "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--dest", str(work)]
    sources_only = [] if "PIP_NO_INDEX" in runner.environ else ["--no-binary=horovod"]
    name = f"horovod-{VERSION}"
    runner.run("horovod-download", f"getting {name}", [*download, *sources_only, f"horovod=={VERSION}"])
    if wheel := next(work.glob("*.whl"), None):
        return wheel
    sdist = work / f"{name}.tar.gz"
    check_sdist(sdist)
    shutil.unpack_archive(sdist, work)
    patch = [str(python), "-m", "patch_ng", "-p1", "-d", str(work / name), str(PATCH)]
    runner.run("horovod-patch", f"applying {PATCH.name}", patch)
    return work / name


def compile_wheel(runner: Runner, python: Path, sources: Path, cache: Path, variables: Mapping[str, str]) -> Path:
    """Compile the ``sources`` into a wheel, which appears in the folder ``cache`` when it is complete."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    jobs = max(1, min(len(os.sched_getaffinity(0)), memory // COMPILER_BYTES))
    unfinished = cache / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    wheel = [str(python), "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    message = f"compiling Horovod with {jobs} jobs (1 to 2 minutes on 2 cores)"
    runner.run(
        "horovod-build", message, [*wheel, "-w", str(unfinished), str(sources)], **variables, MAKEFLAGS=f"-j{jobs}"
    )
    built = next(unfinished.glob("horovod-*.whl"))
    return built.replace(cache / built.name)
