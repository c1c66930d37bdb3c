"""The Gram matrix by the compiled library."""

from __future__ import annotations

import ctypes

import torch

from lowbit.cpu import native


def add_gram(upper: torch.Tensor, x: torch.Tensor) -> None:
    """`lowbit.add_gram` for checked, contiguous CPU tensors, on torch.get_num_threads() threads; at most a copy of x beside them.

    Raises MemoryError, and ValueError where the machine lacks AVX2.
    """
    sizes = [ctypes.c_long(size) for size in x.shape]
    tensors = x, upper
    status = native.library().lowbit_add_gram(torch.get_num_threads(), *sizes, *map(native.pointer, tensors))
    native.check(status, f"lowbit.add_gram found no memory for a copy of x {list(x.shape)}", "avx2")
