"""The two memory layouts that the kernels read and write."""

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The memory format of tensors of so many dimensions whose channels are neighbors in memory."""


def dense(x: Tensor) -> Tensor:
    """``x`` with its channels last if it is laid out so, else contiguous; a copy if it is neither."""
    layout = CHANNELS_LAST.get(x.dim(), torch.contiguous_format)
    return x if x.is_contiguous(memory_format=layout) else x.contiguous()


def laid_out_like(x: Tensor, other: Tensor) -> Tensor:
    """``x`` in the layout of ``other``, a dense tensor of the same shape."""
    return x.contiguous() if other.is_contiguous() else x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
