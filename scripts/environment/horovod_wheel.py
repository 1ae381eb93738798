"""Horovod for the installed torch: what to change in its sources, how to build it, and where its wheel is kept."""

import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from environment.machine import Mpi
from environment.state import Options, SetupError

HOROVOD_VERSION = "0.28.1"
HOROVOD_SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
RECIPE_VERSION = 1
"""Part of the name of a cached wheel. Raise it when the build comes out differently for a reason that is not there."""

COMPILER_BYTES = 2 * 1024**3
"""Memory that one compiler process needs for torch's headers."""


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
        kernels = "horovod/common/ops/cuda/CMakeLists.txt"
        why = "the CUDA headers need C++17"
        return [*adjustments, Adjustment(kernels, "set(CMAKE_CUDA_STANDARD 11)", "set(CMAKE_CUDA_STANDARD 17)", why)]
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
    """Environment variables that the build uses."""

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
    """The environment variables of a build. Only one for GPUs respects the ``HOROVOD_...`` that are already set."""
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
    toolkit = {"CUDA_HOME": environ["HOROVOD_CUDA_HOME"]} if environ.get("HOROVOD_CUDA_HOME") else {}  # torch asks it
    return {"HOROVOD_GPU_OPERATIONS": "NCCL", **toolkit, **given, **variables}


def nccl_variables(environ: Mapping[str, str], site_packages: Path, folder: Path) -> dict[str, str]:
    """Where the NCCL is that torch brings, for a build that uses the same one, unless the user names another.

    ``folder`` gets the link ``libnccl.so``, which the package lacks and a linker needs.
    """
    nccl = site_packages / "nvidia" / "nccl"
    if any(name.startswith("HOROVOD_NCCL_") for name in environ) or not (nccl / "include" / "nccl.h").exists():
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "libnccl.so").symlink_to(next((nccl / "lib").glob("libnccl.so.*")))
    return {
        "HOROVOD_NCCL_INCLUDE": str(nccl / "include"),
        "HOROVOD_NCCL_LIB": str(folder),
        "HOROVOD_NCCL_LINK": "SHARED",
    }


def compile_jobs() -> int:
    """How many compilers to run at once: one for each core, as far as the memory allows."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // COMPILER_BYTES, 16))
