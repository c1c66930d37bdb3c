"""Peaks of memory are the process's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ptq.memory import STATUS, peak_bytes, resident_bytes


@pytest.mark.skipif(not STATUS.is_file(), reason="only Linux tells a process its own peak")
def test_a_peak_begins_with_the_process_and_not_with_what_its_parent_held():
    held = bytearray(b"x") * (256 << 20)
    child = [sys.executable, "-c", "from ptq.memory import peak_bytes; print(peak_bytes())"]
    theirs = int(subprocess.run(child, capture_output=True, text=True, check=True).stdout)
    assert 1 << 20 < theirs < len(held) < resident_bytes() <= peak_bytes()
