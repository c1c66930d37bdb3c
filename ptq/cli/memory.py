"""How this process gives memory back."""

from __future__ import annotations

import ctypes
import platform

# glibc's names for these are in malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let glibc keep up to 512 MB of freed memory, of blocks below 32 MB.

    It would give what a micro-batch frees back to the kernel, which clears each page anew for the next one: 4% of a pruning run. For the
    command only, because it holds for the whole process. Does nothing where the C library is another.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 512 << 20)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
