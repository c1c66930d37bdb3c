"""Find and load the compiled library, and turn tensors into what its C functions take."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

# Where setup.py leaves it; a plain shared library, so one build serves every Python.
FILE = Path(__file__).with_name("_native.so")
PATHS = {"fastest": 0, "portable": 1, "avx2": 2}
OUT_OF_MEMORY, NO_SUCH_PATH = 1, 2


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, None where the file is missing or this machine cannot load it."""
    try:
        return ctypes.CDLL(str(FILE))
    except OSError:
        return None


@cache
def fast_avx2() -> bool:
    """Whether a kernel in AVX2 can beat PyTorch's float32 products: where these have no AVX-512 to run in."""
    return library() is not None and torch.backends.cpu.get_cpu_capability() == "AVX2"


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """The address of a contiguous CPU tensor's first element, null for None. The caller keeps the tensor alive."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def check(status: int, need: str, path: str) -> None:
    """Raises MemoryError or ValueError for what a C function returned; `need`: what there was no memory for."""
    if status == OUT_OF_MEMORY:
        raise MemoryError(need)
    if status == NO_SUCH_PATH:
        raise ValueError(f"this machine cannot run the {path} path")
