"""Memory that was freed between tensors that stay goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from ptq import trim

SIZE, COUNT, STAYS = 60 << 10, 2000, 10


def resident() -> int:
    """Bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library has no malloc_trim")
def test_what_was_freed_between_tensors_that_stay_is_given_back():
    tensors = [torch.ones(SIZE, dtype=torch.uint8) for _ in range(COUNT)]
    stay = tensors[::STAYS]
    del tensors
    before = resident()
    trim.give_back()
    assert before - resident() > SIZE * COUNT / 2
    assert all(int(tensor.sum()) == SIZE for tensor in stay)


def test_nothing_happens_where_the_c_library_cannot(monkeypatch):
    trim._malloc_trim.cache_clear()
    monkeypatch.setattr(trim.sys, "platform", "win32")
    try:
        trim.give_back()
        assert trim._malloc_trim() is None
    finally:
        trim._malloc_trim.cache_clear()
