"""Memory for weights, which every token reads from end to end: in pages of 2 MB where Linux grants them, because a core spends a good
part of such a read on finding pages of 4 KB. Weights smaller than a page share some.
"""

from __future__ import annotations

import mmap
import weakref
from threading import Lock

import torch
from torch import Tensor

CHUNK = 32 << 20  # bytes that are mapped at a time; what no weight has touched takes no memory
LINE = 64
_advice: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
_lock = Lock()
# Where weights go, for as long as one there lives, and how many bytes they take.
_last: tuple[weakref.ref[mmap.mmap], int] | None = None


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU whose numbers are to be written yet, beside those made before it; a plain one on other systems."""
    size = torch.Size(shape).numel()
    if _advice is None or not size:
        return torch.empty(shape, dtype=dtype)
    memory, start = _take(size * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype, count=size, offset=start).view(shape)


def in_large_pages(tensor: Tensor) -> Tensor:
    """A contiguous copy of a tensor on the CPU by `empty`; the tensor itself on other devices and systems."""
    if _advice is None or not tensor.is_cpu or not tensor.numel():
        return tensor
    return empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def _take(size: int) -> tuple[mmap.mmap, int]:
    """Memory and where in it `size` bytes of nobody's begin. It is given back when the last tensor there is gone."""
    global _last
    with _lock:
        memory, used = (None, 0) if _last is None else (_last[0](), _last[1])
        if memory is None or used + size > len(memory):
            memory, used = mmap.mmap(-1, max(size, CHUNK), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0
            memory.madvise(_advice)
        _last = weakref.ref(memory), -(-(used + size) // LINE) * LINE
    return memory, used
