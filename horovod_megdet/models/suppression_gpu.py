"""Greedy non-maximum suppression of many lists of boxes at once, on a GPU, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 64
_BITS = 32
"""In a word of the overlaps."""


def kept(boxes: Tensor, threshold: float) -> Tensor:
    """Which boxes greedy suppression keeps in each list: (lists, n) bool for ``boxes`` (lists, n, 4), best ones first.

    The intersection over union is compared with ``threshold``. A box without area neither suppresses nor is suppressed.
    """
    lists, count, _ = boxes.shape
    words = triton.cdiv(count, _BITS)
    overlaps = torch.empty(lists, count, words, dtype=torch.int32, device=boxes.device)
    removed = torch.empty(lists, words, dtype=torch.int32, device=boxes.device)
    grid = (triton.cdiv(count, _ROWS), words, lists)
    _overlaps[grid](boxes.contiguous(), overlaps, count, words, threshold, ROWS=_ROWS, BITS=_BITS)
    _scan[(lists,)](overlaps, removed, count, words, WORDS=triton.next_power_of_2(words), BITS=_BITS, num_warps=1)
    bits = torch.arange(_BITS, device=boxes.device, dtype=torch.int32)
    return ((removed[:, :, None] >> bits) & 1).flatten(1)[:, :count] == 0


@triton.jit(do_not_specialize=["count", "words"])
def _overlaps(boxes, overlaps, count, words, threshold, ROWS: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bit j of a box is set where it overlaps a later box j too much."""
    list_ = tl.program_id(2).to(tl.int64)
    word = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = word * BITS + tl.arange(0, BITS)
    of_list = boxes + list_ * count * 4
    x1, y1 = tl.load(of_list + 4 * row, row < count, 0), tl.load(of_list + 4 * row + 1, row < count, 0)
    x2, y2 = tl.load(of_list + 4 * row + 2, row < count, 0), tl.load(of_list + 4 * row + 3, row < count, 0)
    u1, v1 = tl.load(of_list + 4 * column, column < count, 0), tl.load(of_list + 4 * column + 1, column < count, 0)
    u2, v2 = tl.load(of_list + 4 * column + 2, column < count, 0), tl.load(of_list + 4 * column + 3, column < count, 0)
    width = tl.maximum(tl.minimum(x2[:, None], u2[None, :]) - tl.maximum(x1[:, None], u1[None, :]), 0)
    height = tl.maximum(tl.minimum(y2[:, None], v2[None, :]) - tl.maximum(y1[:, None], v1[None, :]), 0)
    shared = width * height
    union = ((x2 - x1) * (y2 - y1))[:, None] + ((u2 - u1) * (v2 - v1))[None, :] - shared
    # Boxes without area have no union to divide by.
    too_much = (shared > 0) & (shared / tl.where(shared > 0, union, 1) > threshold)
    too_much = too_much & (column[None, :] > row[:, None])
    bits = tl.sum(tl.where(too_much, 1 << tl.arange(0, BITS)[None, :], 0), axis=1)
    tl.store(overlaps + (list_ * count + row) * words + word, bits, row < count)


@triton.jit(do_not_specialize=["count", "words"])
def _scan(overlaps, removed, count, words, WORDS: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Goes through the boxes of a list: one that is not removed removes those that it overlaps."""
    list_ = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, WORDS)
    gone = tl.zeros([WORDS], dtype=tl.int32)
    row = overlaps + list_ * count * words + word
    for box in range(count):
        overlapped = tl.load(row, word < words, 0)
        own = tl.sum(tl.where(word == box // BITS, gone, 0), axis=0)
        gone = tl.where((own >> (box % BITS)) & 1 == 0, gone | overlapped, gone)
        row += words
    tl.store(removed + list_ * words + word, gone, word < words)
