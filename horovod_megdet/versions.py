"""The packages that a run needs: every rank must have the same versions, and checkpoints record them."""

import platform
from importlib import metadata

REQUIRED = (
    *("horovod", "torch", "torchvision", "numpy", "pillow", "pycocotools", "pyyaml", "pydantic", "safetensors"),
    *("psutil", "rich", "matplotlib", "tensorboard"),
)

OPTIONAL = ("mpi4py", "timm")
"""mpi4py serves Horovod's MPI controller only, timm only the LARS optimizer."""

MISSING = "missing"
"""The version of a package that is not installed."""


def versions() -> dict[str, str]:
    """The versions of Python and of all packages above: all that could change the numbers of a run."""
    return {"Python": platform.python_version()} | {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return MISSING
