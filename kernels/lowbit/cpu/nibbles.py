"""4-bit codes laid out by the compiled library, in one pass over them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lowbit import large_pages
from lowbit.cpu import native


def nibbles(packed: Tensor) -> tuple[Tensor, Tensor]:
    """(the plane of `lowbit.planar` uint8 [R, C/2], sums of each tile's centred codes int32 [R, C/64]) of packed codes.

    packed: uint8 [R, C/2] on the CPU, C a multiple of 128, as `lowbit.pack` gives them. Runs on torch.get_num_threads() threads.
    """
    packed = packed.contiguous()
    plane = large_pages.empty(tuple(packed.shape), torch.uint8)
    sums = torch.empty(packed.shape[0], packed.shape[1] // 32, dtype=torch.int32)
    pointers = (native.pointer(tensor) for tensor in (packed, plane, sums))
    native.library().lowbit_nibbles(torch.get_num_threads(), ctypes.c_long(packed.numel() // 64), *pointers)
    return plane, sums
