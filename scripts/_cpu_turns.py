"""What the contenders of bench_cpu.py share: the same weight and inputs, and turns that a parent process deals out one at a time.

Each library runs in a process of its own, because threads that wait for their next product would take a core from another library's.
Before each timed call the caches are emptied, because the weight of a model's layer lies in memory: other layers came since its last call.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

REPEATED = 16  # the weight is so many times the same rows: what is slow to quantize is quantized once
UNTIMED = 1
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE = 64 << 20  # taken for the last-level cache where the system does not tell
FLUSH = 4  # times the last-level cache is read to empty it; it need not replace what is oldest
LEAST_FLUSH = 128 << 20
STAT = Path("/proc/stat")


def options():
    """What the parent tells a library's process."""
    parser = argparse.ArgumentParser()
    for name in ("channels", "rows", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args()


def distinct_rows(args):
    """W float32 [rows / REPEATED, channels], the rows that differ."""
    generator = np.random.default_rng(0)
    return generator.standard_normal((args.rows // REPEATED, args.channels), dtype=np.float32)


def repeated(rows):
    """Along the first axis, REPEATED times."""
    return np.concatenate([rows] * REPEATED)


def inputs(tokens, channels):
    """x float32 [tokens, channels]."""
    return np.random.default_rng(tokens).standard_normal((tokens, channels), dtype=np.float32)


def flushed_bytes(caches=CACHES):
    """How much is read to empty the largest cache of the first core."""
    sizes = [int(file.read_text().strip().removesuffix("K")) << 10 for file in caches.glob("index*/size")]
    return max(FLUSH * max(sizes, default=UNKNOWN_CACHE), LEAST_FLUSH)


def flusher():
    """A function that empties the caches that the cores share, by one thread: more would drive out a library's, which wait for the call.

    It reads and does not write: what was written would have to leave the cache while a product is timed.
    """
    return np.ones(flushed_bytes(), dtype=np.uint8).max


def taken_by_others(stat=STAT):
    """Core-seconds since the machine started that others took, the hypervisor too; None where the system does not tell.

    Others are all but this process: a library whose threads still look for work is one. A tick is counted for whoever runs at its end,
    so that only a difference over many ticks says something.
    """
    try:
        words = stat.read_text(encoding="utf8").split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _, _, *interrupts_and_steal = (int(word) / os.sysconf("SC_CLK_TCK") for word in words[1:9])
    return user + nice + system + sum(interrupts_and_steal) - time.process_time()


def timed(run, calls, flush):
    """{"seconds": of each call, "turn": seconds of all that is done here, "others": core-seconds that others took meanwhile, or None}."""
    started, before, seconds = time.perf_counter(), taken_by_others(), []
    for _ in range(UNTIMED):
        run()
    for _ in range(calls):
        flush()
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    others = None if before is None else taken_by_others() - before
    return {"seconds": seconds, "turn": time.perf_counter() - started, "others": others}


def serve(args, contenders):
    """Say what there is, then take turns until the parent hangs up.

    contenders: name -> (bytes of the weight, make), where make(x float32 [T, C]) returns a function that multiplies and returns y [T, R],
    and does all that depends on x alone. None instead of y: there is nothing to check.
    A turn is a line of JSON, {"name", "tokens", "calls"}; the answer is what `timed` returns and "error", relative to W x in float64.
    """
    W, flush = distinct_rows(args).astype(np.float64), flusher()
    print(json.dumps({name: size for name, (size, _) in contenders.items()}), flush=True)
    runs, errors = {}, {}
    for line in sys.stdin:
        turn = json.loads(line)
        key = turn["name"], turn["tokens"]
        if key not in runs:
            x = inputs(turn["tokens"], args.channels)
            runs[key] = contenders[turn["name"]][1](x)
            errors[key] = error_of(runs[key](), x.astype(np.float64) @ W.T)
        print(json.dumps(timed(runs[key], turn["calls"], flush) | {"error": errors[key]}), flush=True)


def error_of(found, expected):
    """|found - expected| / |expected|, where found [T, R] repeats what is expected [T, R / REPEATED]; None for nothing found."""
    if found is None:
        return None
    wanted = np.concatenate([expected] * REPEATED, axis=1)
    return float(np.linalg.norm(np.asarray(found, dtype=np.float64) - wanted) / np.linalg.norm(wanted))
