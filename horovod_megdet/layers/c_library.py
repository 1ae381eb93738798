"""The C functions of ``*_cpu.c`` in this folder, which ``setup.py`` compiles into one library."""

import ctypes
import functools
import importlib.util

import torch
from torch import Tensor

from horovod_megdet.errors import UserError

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The types of activations that the C functions read and write, and their numbers there."""

_TENSOR, _NUMBER, _LENGTH, _INT = ctypes.c_void_p, ctypes.c_double, ctypes.c_ssize_t, ctypes.c_int
_EXTENTS = [_LENGTH, _LENGTH, _LENGTH, _INT]
_ROI_ALIGN = [_TENSOR, _INT, *[_LENGTH] * 4, _INT, _TENSOR, _TENSOR, _LENGTH, _LENGTH, _NUMBER, *[_LENGTH] * 2, _INT]
_WITHOUT_STATUS = {
    "statistics": [_TENSOR, _NUMBER, _LENGTH, _TENSOR],
    "update_running": [_TENSOR, _NUMBER, _LENGTH, _TENSOR, _TENSOR],
}
_WITH_STATUS = {
    "moments": [_TENSOR, _INT, *_EXTENTS, _TENSOR],
    "squared_differences": [_TENSOR, _INT, _TENSOR, *_EXTENTS, _TENSOR],
    "normalize": [_TENSOR, _INT, *[_TENSOR] * 4, _INT, *_EXTENTS, _TENSOR],
    "gradient_sums": [*[_TENSOR] * 2, _INT, *[_TENSOR] * 3, _INT, _TENSOR, *_EXTENTS, *[_TENSOR] * 2],
    "input_gradient": [*[_TENSOR] * 2, _INT, *[_TENSOR] * 3, _INT, _TENSOR, *_EXTENTS, _TENSOR],
    "roi_align": [*_ROI_ALIGN, _TENSOR],
    "roi_align_backward": [*_ROI_ALIGN, _TENSOR],
    "suppress": [_TENSOR, *[_LENGTH] * 2, _TENSOR, _LENGTH, _NUMBER, _INT, _TENSOR],
}
"""The types of the arguments, by function, of those that return nothing, and those that return whether they failed."""


def call(function: str, *arguments: Tensor | float | None) -> None:
    """Calls a C function. Tensors are passed by address, and live until the function returns.

    Raises ``MemoryError`` if the function runs out of memory, and :class:`UserError` if nothing is compiled.
    """
    addresses = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
    if getattr(library(), f"megdet_{function}")(*addresses):
        raise MemoryError(f"no memory for {function}")


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded when it is needed first. Raises :class:`UserError` without it."""
    name = "horovod_megdet.layers._cpu"
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise UserError(
            f"{name} is not compiled, and training on the CPU needs it: "
            "run 'make setup', or 'pip install -e .' in the checkout."
        )
    library = ctypes.CDLL(found.origin)
    for functions, result in ((_WITHOUT_STATUS, None), (_WITH_STATUS, _INT)):
        for function, types in functions.items():
            compiled = getattr(library, f"megdet_{function}")
            compiled.argtypes, compiled.restype = types, result
    return library
