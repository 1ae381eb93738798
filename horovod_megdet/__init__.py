"""Multi-node training of FPN detectors with Horovod and Cross-GPU Batch Normalization, after MegDet (CVPR 2018)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from horovod_megdet.inference import ImageDetections, TrainedDetector, load
    from horovod_megdet.layers.cross_gpu_bn import CrossGPUBatchNorm, convert_batch_norm, revert_batch_norm

__version__ = "0.1.0"
__all__ = [
    "CrossGPUBatchNorm",
    "ImageDetections",
    "TrainedDetector",
    "__version__",
    "convert_batch_norm",
    "load",
    "revert_batch_norm",
]

_INFERENCE = {"ImageDetections", "TrainedDetector", "load"}


def __getattr__(name: str) -> Any:
    """Imports the public names on first use: loader processes import this package and must not start Horovod."""
    if name in __all__:
        module = "inference" if name in _INFERENCE else "layers.cross_gpu_bn"
        return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
