"""What the contenders of bench_cpu.py share: the same weight and inputs, and turns that a parent process deals out one at a time.

Each library runs in a process of its own, because threads that wait for their next product would take a core from another library's.
"""

import argparse
import json
import sys
import time

import numpy as np

REPEATED = 16  # the weight is so many times the same rows: what is slow to quantize is quantized once
UNTIMED = 1


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


def serve(args, contenders):
    """Say what there is, then take turns until the parent hangs up.

    contenders: name -> (bytes of the weight, make), where make(x float32 [T, C]) returns a function that multiplies and returns y [T, R],
    and does all that depends on x alone. None instead of y: there is nothing to check.
    A turn is a line of JSON, {"name", "tokens", "calls"}; the answer {"seconds": [...], "error": relative to W x in float64}.
    """
    W = distinct_rows(args).astype(np.float64)
    print(json.dumps({name: size for name, (size, _) in contenders.items()}), flush=True)
    runs, errors = {}, {}
    for line in sys.stdin:
        turn = json.loads(line)
        key = turn["name"], turn["tokens"]
        if key not in runs:
            x = inputs(turn["tokens"], args.channels)
            runs[key] = contenders[turn["name"]][1](x)
            errors[key] = error_of(runs[key](), x.astype(np.float64) @ W.T)
        run = runs[key]
        for _ in range(UNTIMED):
            run()
        seconds = []
        for _ in range(turn["calls"]):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        print(json.dumps({"seconds": seconds, "error": errors[key]}), flush=True)


def error_of(found, expected):
    """|found - expected| / |expected|, where found [T, R] repeats what is expected [T, R / REPEATED]; None for nothing found."""
    if found is None:
        return None
    wanted = np.concatenate([expected] * REPEATED, axis=1)
    return float(np.linalg.norm(np.asarray(found, dtype=np.float64) - wanted) / np.linalg.norm(wanted))
