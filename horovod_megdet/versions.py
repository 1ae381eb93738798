"""The packages that a run needs, and their versions."""

import platform
from importlib import metadata

NUMERICAL = (
    "horovod",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "pycocotools",
    "mpi4py",
    "pyyaml",
    "pydantic",
    "timm",
)
"""What could change the numbers of a run."""

REQUIRED = (
    *("horovod", "torch", "torchvision", "numpy", "pillow", "pycocotools", "pyyaml", "pydantic", "safetensors"),
    *("psutil", "rich", "matplotlib", "tensorboard"),
)

OPTIONAL = ("mpi4py", "timm")
"""mpi4py serves Horovod's MPI controller only, timm only the LARS optimizer."""

MISSING = "missing"
"""The version of a package that is not installed."""


def versions(packages: tuple[str, ...] = (*REQUIRED, *OPTIONAL)) -> dict[str, str]:
    """The versions of Python and of the packages, by name; all of those above by default."""
    return {"Python": platform.python_version()} | {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return MISSING
