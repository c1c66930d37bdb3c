"""Free memory of the C library's heap, given back to the system.

What was freed between tensors that stay is kept by the heap, and counts as the process's: in a model of many small packed tensors a
third of what it takes.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache


def give_back() -> None:
    """Let the system have what is free in the heap, where the C library knows how; a few milliseconds."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim():
    """glibc's function, None elsewhere."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
