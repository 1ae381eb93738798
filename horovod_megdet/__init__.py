"""Multi-node training of FPN detectors with Horovod and Cross-GPU Batch Normalization, after MegDet (CVPR 2018)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from horovod_megdet.config import Config
    from horovod_megdet.errors import UserError
    from horovod_megdet.evaluation.coco import Evaluation
    from horovod_megdet.inference import ImageDetections, TrainedDetector, load
    from horovod_megdet.layers.cross_gpu_bn import CrossGPUBatchNorm, convert_batch_norm, revert_batch_norm
    from horovod_megdet.training import TrainingResult, evaluate, train

__version__ = "0.1.0"
__all__ = [
    "Config",
    "CrossGPUBatchNorm",
    "Evaluation",
    "ImageDetections",
    "TrainedDetector",
    "TrainingResult",
    "UserError",
    "__version__",
    "convert_batch_norm",
    "evaluate",
    "load",
    "revert_batch_norm",
    "train",
]

_MODULES = {
    "config": ("Config",),
    "errors": ("UserError",),
    "evaluation.coco": ("Evaluation",),
    "inference": ("ImageDetections", "TrainedDetector", "load"),
    "layers.cross_gpu_bn": ("CrossGPUBatchNorm", "convert_batch_norm", "revert_batch_norm"),
    "training": ("TrainingResult", "evaluate", "train"),
}
"""Where the public names are."""


def __getattr__(name: str) -> Any:
    """Imports the public names on first use: loader processes import this package and must not start Horovod."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
