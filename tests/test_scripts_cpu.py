"""What the CPU benchmark computes without a clock: its verdicts, its table, the error of a product."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import _cpu_turns as turns
import bench_cpu as bench


def run_of(tokens, threads, **more):
    """A finished run; more: further contenders, name -> median."""
    medians = {"ptq W4A8": 3, "ptq W3A8": 3, "ptq W8A8": 3, "torch qint8": 3, "stream": 1, "ggml Q3_K": 5} | more
    contenders = {name: {"bytes": 10, "error": 0.1, "seconds": [9, ms, 1]} for name, ms in medians.items()}
    return {"tokens": tokens, "threads": threads, "contenders": contenders}


def test_aims_are_held_against_the_medians():
    one = run_of(1, 1, **{"ggml Q4_0": 4, "ggml Q4_K": 5})
    assert bench.verdicts([one, run_of(16, 2)]) == [
        "- ptq W4A8, 1 token, 1 thread: 0.75 times ggml Q4_0; at most 0.75 was aimed at: reached.",
        "- ptq W3A8, 1 token, 1 thread: 0.60 times ggml Q3_K; at most 0.75 was aimed at: reached.",
        "- ptq W8A8, 1 token, 1 thread: 1.00 times torch qint8; at most 1.0 was aimed at: reached.",
    ]  # no 4-bit peer took part with 16 tokens
    (late,) = bench.verdicts([run_of(16, 2, **{"ggml Q4_1": 3.9})])
    assert late.endswith("2 threads: 0.77 times ggml Q4_1; at most 0.75 was aimed at: not reached.")
    row = next(row for row in bench.table(one).splitlines() if "ptq W4A8" in row)
    assert [cell.strip() for cell in row.split("|")[3:6]] == ["3000.00", "1000.00", "0.75"]


def test_a_product_that_is_wrong_has_an_error():
    expected = np.array([[3.0, 4.0]])
    right = turns.repeated(expected.T).T
    assert turns.error_of(right, expected) == 0 and turns.error_of(0 * right, expected) == 1
    assert turns.error_of(None, expected) is None
