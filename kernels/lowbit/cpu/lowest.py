"""The choice of the smallest scores by the compiled library."""

from __future__ import annotations

import ctypes

import torch

from lowbit.cpu import native


def lowest(score: torch.Tensor, count: int) -> torch.Tensor:
    """`lowbit.lowest` for float32 CPU tensors and 0 < count < numel, on torch.get_num_threads() threads.

    Reads a matrix with contiguous rows where it lies. Raises MemoryError.
    """
    if score.dim() != 2 or score.stride(1) != 1:
        score = score.contiguous()
    mask = torch.empty(score.shape, dtype=torch.bool)
    in_rows = score.dim() == 2 and not score.is_contiguous()
    rows, columns, stride = (*score.shape, score.stride(0)) if in_rows else (1, score.numel(), 0)
    sizes = [ctypes.c_long(size) for size in (rows, columns, stride, count)]
    pointers = native.pointer(score), native.pointer(mask)
    if native.library().lowbit_lowest(torch.get_num_threads(), *sizes, *pointers):
        raise MemoryError(f"lowbit.lowest found no memory to choose {count} of {score.numel()} scores")
    return mask
