"""The packages that a run needs, and their versions."""

import platform
from importlib import metadata

NUMERICAL = (
    *("horovod", "mpi4py", "torch", "torchvision", "pytorch-optimizer", "numpy", "pillow", "pycocotools", "hotcoco"),
    *("pyyaml", "pydantic", "simplejpeg"),
)
"""What could change the numbers of a run."""

PACKAGES = (*NUMERICAL, "msgspec", "safetensors", "psutil", "rich", "matplotlib", "tensorboard", "jinja2")

OPTIONAL = ("mpi4py", "pytorch-optimizer", "hotcoco")
"""mpi4py serves Horovod's MPI controller only, pytorch-optimizer the LARS optimizer; pycocotools replaces hotcoco."""

MISSING = "missing"
"""The version of a package that is not installed."""


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """The versions of Python and of the packages, by name."""
    return {"Python": platform.python_version()} | {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return MISSING
