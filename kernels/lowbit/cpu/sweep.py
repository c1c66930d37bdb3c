"""The column sweep by the compiled library."""

from __future__ import annotations

import ctypes

import torch

from lowbit.cpu import native


def sweep(
    W1: torch.Tensor,
    steps: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    keep: tuple[int, int] | None = None,
    score: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    low: torch.Tensor | None = None,
    high: torch.Tensor | None = None,
    path: str = "fastest",
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """`lowbit.sweep` for checked, contiguous CPU tensors, on torch.get_num_threads() threads; the errors take W1's place.

    path: "portable" rounds every product and every difference, as PyTorch does; "avx2" fuses the two; "fastest" takes what
    the machine has. Raises ValueError for a path that it lacks, MemoryError.
    """
    b, R = W1.shape
    values = torch.empty_like(W1)
    kept = torch.empty_like(W1, dtype=torch.bool) if keep else None if mask is None else mask.clone()
    if W1.numel() == 0:
        return values, kept, W1
    n, m = keep or (0, 0)
    tensors = (W1, steps, mask, score if keep else None, scale, low, high, values, kept, W1)
    sizes = [ctypes.c_long(size) for size in (b, R, n, m)]
    threads = torch.get_num_threads()
    status = native.library().lowbit_sweep(native.PATHS[path], threads, *sizes, *map(native.pointer, tensors))
    native.check(status, f"lowbit.sweep found no memory for a block of {b} steps on {threads} threads", path)
    return values, kept, W1
