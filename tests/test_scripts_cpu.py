"""What the CPU benchmark computes without a clock: its verdicts, its table, the error of a product."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import _cpu_turns as turns
import bench_cpu as bench


def run_of(tokens, threads, **more):
    """A finished run; more: further contenders, name -> median."""
    ours = dict.fromkeys(("ptq W4A8", "ptq W4A8 symmetric", "ptq W3A8", "ptq W8A8"), 3)
    medians = ours | {"torch qint8": 3, "stream": 1, "ggml Q3_K": 5} | more
    contenders = {name: {"bytes": 10, "error": 0.1, "seconds": [9, ms, 1]} for name, ms in medians.items()}
    return {"tokens": tokens, "threads": threads, "cores_of_others": 0.05, "contenders": contenders}


def all_of_4_bits(ms):
    return dict.fromkeys(bench.FOUR_BITS, ms)


def test_aims_are_held_against_the_medians():
    one = run_of(1, 1, **all_of_4_bits(5) | {"ggml Q4_0": 4})
    assert bench.verdicts([one, run_of(16, 2)]) == [
        "- ptq W4A8, 1 token, 1 thread: 0.75 times ggml Q4_0 (least times 1.00); at most 0.75 was aimed at: reached.",
        "- ptq W4A8 symmetric, 1 token, 1 thread: 0.75 times ggml Q4_0 (least times 1.00); at most 0.75 was aimed at: reached.",
        "- ptq W3A8, 1 token, 1 thread: 0.60 times ggml Q3_K (least times 1.00); at most 0.75 was aimed at: reached.",
        "- ptq W8A8, 1 token, 1 thread: 1.00 times torch qint8 (least times 1.00); at most 1.0 was aimed at: reached.",
        f"- ptq W4A8, 16 tokens, 2 threads: at most 0.75 was aimed at: not known: no {' or '.join(bench.FOUR_BITS)} took part.",
    ]
    (late,) = bench.verdicts([run_of(16, 2, **all_of_4_bits(3.9))])
    assert late.endswith("2 threads: 0.77 times ggml Q4_0 (least times 1.00); at most 0.75 was aimed at: not reached.")
    row = next(row for row in bench.table(one).splitlines() if "ptq W4A8" in row)
    assert [cell.strip() for cell in row.split("|")[3:6]] == ["3000.00", "1000.00", "0.75"]


def test_the_least_times_are_those_of_the_peer_with_the_best_median():
    run = run_of(16, 1, **all_of_4_bits(5))
    contenders = run["contenders"]
    contenders["ptq W4A8"]["seconds"] = [2, 3, 9]
    contenders["ggml Q4_1"]["seconds"] = [3.2, 4, 9]
    assert "0.75 times ggml Q4_1 (least times 0.62); at most 0.75 was aimed at: reached." in bench.verdicts([run])[0]


def test_no_aim_is_reached_while_a_peer_is_missing():
    slow = {name: 5 for name in bench.FOUR_BITS if name not in ("ggml Q4_1", "ggml Q4_K")}
    (line,) = bench.verdicts([run_of(16, 1, **slow)])
    assert line.endswith("not known: ggml Q4_1, ggml Q4_K did not take part.")
    (line,) = bench.verdicts([run_of(16, 1, **slow | {"ggml Q4_0": 3.9})])
    assert line.endswith(": not reached.")  # whatever the missing ones take


@pytest.mark.parametrize(
    ("cores", "said"),
    [
        (bench.BUSY, ": reached."),
        (0.304, "not known: other processes took 0.30 cores."),
        (None, "not known: the system does not tell what other processes took."),
    ],
)
@pytest.mark.parametrize("ms", [5, 3.9])
def test_nothing_is_known_while_others_are_busy(cores, said, ms):
    (line,) = bench.verdicts([run_of(16, 1, **all_of_4_bits(ms)) | {"cores_of_others": cores}])
    assert line.endswith(said if ms == 5 or cores != bench.BUSY else ": not reached.")


def test_what_others_took_is_an_average_over_the_turns():
    def cores(*pairs):
        return bench.cores_of_others([{"turn": turn, "others": others} for turn, others in pairs])

    assert cores((1, 0.5), (3, 0.3)) == pytest.approx(0.2)
    assert cores((1, -0.03)) == 0  # a tick too few
    assert cores((1, -0.5)) is None and cores((1, 0.0), (1, None)) is None
    assert "took 0.05 cores" in bench.busy(run_of(1, 1))
    assert "unknown share" in bench.busy({"cores_of_others": None})


def test_the_time_of_others_is_all_but_idle_and_our_own(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 300 4000 5000 6 70 8 9 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    monkeypatch.setattr(turns.os, "sysconf", {"SC_CLK_TCK": 100}.get)
    monkeypatch.setattr(turns.time, "process_time", lambda: 2.0)
    # Neither idle, waiting nor guests, which users' time holds.
    assert turns.taken_by_others(stat) == pytest.approx(5.04 - 2)
    assert turns.taken_by_others(tmp_path / "none") is None


def test_as_much_is_read_as_empties_the_largest_cache(tmp_path):
    assert turns.flushed_bytes(tmp_path) == 256 << 20  # where it is not told
    for level, size in enumerate(("32K\n", "512K\n", "98304K\n")):
        (tmp_path / f"index{level}").mkdir()
        (tmp_path / f"index{level}" / "size").write_text(size)
    assert turns.flushed_bytes(tmp_path) == 384 << 20
    (tmp_path / "index2" / "size").write_text("4096K\n")
    assert turns.flushed_bytes(tmp_path) == 128 << 20


def test_the_caches_are_emptied_before_each_timed_call():
    done = []
    found = turns.timed(lambda: done.append("run"), 3, lambda: done.append("flush"))
    assert done == ["run"] * turns.UNTIMED + ["flush", "run"] * 3
    assert len(found["seconds"]) == 3 and found["turn"] >= sum(found["seconds"])


def test_a_product_that_is_wrong_has_an_error():
    expected = np.array([[3.0, 4.0]])
    right = turns.repeated(expected.T).T
    assert turns.error_of(right, expected) == 0 and turns.error_of(0 * right, expected) == 1
    assert turns.error_of(None, expected) is None
