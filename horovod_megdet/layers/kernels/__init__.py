"""The local arithmetic of batch normalization. Nothing in here communicates.

There are three implementations of one interface: compiled functions for the CPU, PyTorch's kernels for CUDA, and plain
operators, which define what the others compute. :func:`kernels_for` chooses.
"""

import functools

import torch
from torch import Tensor

from horovod_megdet.layers.c_library import TYPES
from horovod_megdet.layers.kernels.compiled import CompiledKernels
from horovod_megdet.layers.kernels.empty import EmptyInputKernels
from horovod_megdet.layers.kernels.plain import PlainKernels, activate
from horovod_megdet.layers.kernels.rectifier import Rectifier
from horovod_megdet.layers.kernels.statistics import Statistics

__all__ = ["PlainKernels", "Rectifier", "Statistics", "activate", "kernels_for", "widened"]

_PLAIN, _COMPILED = PlainKernels(), CompiledKernels()


def kernels_for(x: Tensor) -> PlainKernels:
    """The kernels for activations of the device, type and number of ``x``."""
    kernels = _PLAIN
    if x.is_cuda:
        kernels = _cuda_kernels()
    elif x.device.type == "cpu" and x.dtype in TYPES:
        kernels = _COMPILED
    return kernels if x.numel() else EmptyInputKernels(kernels)


@functools.cache
def _cuda_kernels() -> PlainKernels:
    # Triton comes with builds of PyTorch for GPUs only, and takes a while to import.
    from horovod_megdet.layers.kernels.cuda import CUDAKernels

    return CUDAKernels()


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 if it is of a 16-bit type, else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
