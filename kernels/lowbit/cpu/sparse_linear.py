"""The sparse linear by the compiled library."""

from __future__ import annotations

import ctypes

import torch

from lowbit.cpu import native
from lowbit.sparse_linear import TILE, SparseTiles


def tiles(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """values, index and starts of `lowbit.SparseTiles` from a contiguous float32 CPU weight [R, C]."""
    library, threads = native.library(), torch.get_num_threads()
    R, C = weight.shape
    starts = torch.zeros(-(-C // TILE), R + 1, dtype=torch.int64)
    sizes = ctypes.c_long(R), ctypes.c_long(C)
    library.lowbit_sparse_starts(threads, *sizes, native.pointer(weight), native.pointer(starts))
    entries = int(starts[-1, -1]) if starts.numel() else 0
    values, index = torch.empty(entries), torch.empty(entries, dtype=torch.uint8)
    library.lowbit_sparse_fill(threads, *sizes, *map(native.pointer, (weight, starts, values, index)))
    return values, index, starts


def sparse_linear(
    x: torch.Tensor, weight: SparseTiles, bias: torch.Tensor | None, *, path: str = "fastest"
) -> torch.Tensor:
    """`lowbit.sparse_linear` for checked, contiguous x [T, C], on torch.get_num_threads() threads.

    path: as for the sweep. Raises ValueError for a path that this machine lacks, MemoryError.
    """
    T, (R, C) = x.shape[0], weight.shape
    y = torch.empty(T, R)
    if y.numel() == 0 or C == 0:
        return y.zero_() if bias is None else y.copy_(bias)
    tensors = x, weight.values, weight.index, weight.starts, bias, y
    sizes = [ctypes.c_long(size) for size in (T, C, R)]
    threads = torch.get_num_threads()
    status = native.library().lowbit_sparse_linear(native.PATHS[path], threads, *sizes, *map(native.pointer, tensors))
    native.check(status, f"lowbit.sparse_linear found no memory for {R} rows on {threads} threads", path)
    return y
