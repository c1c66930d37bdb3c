#!/usr/bin/env python3
"""Time of the native integer linear, activations quantized in the call, beside PyTorch's float32 linear, in one run.

usage: python scripts/bench_planar.py [--channels 4096] [--rows 16384] [--tokens 1 16] [--threads 1] [--repeats 15]

One call of each contender after another, over and over; numbers are the least and the median. "read": the largest of as many bytes as
the 4-bit weight takes, by PyTorch, which is how fast one thread gets them here. Activations: 8 bits, each token's own grid in 64 channels;
weights: random, groups of 128 with zero points. Exit 2: there is no compiled library.
"""

import argparse
import sys
import time
from statistics import median

import torch
import torch.nn.functional as F
from lowbit import pack
from lowbit.cpu import native, planar
from lowbit.planar import TILE, PlanarWeight, planar_weight

GROUP = 128


def random_weight(bits: int, channels: int, rows: int) -> PlanarWeight:
    groups = -(-channels // GROUP)
    sizes = torch.tensor([GROUP] * (groups - 1) + [channels - GROUP * (groups - 1)])
    codes, zero = (torch.randint(2**bits, (rows, n), dtype=torch.uint8) for n in (channels, groups))
    scale = torch.rand(rows, groups) + 0.5
    return planar_weight(pack(codes, bits), scale, pack(zero, bits), sizes, bits=bits, channels=channels)


def contenders(x: torch.Tensor, weights: dict[int, PlanarWeight], full: torch.Tensor) -> dict:
    C = x.shape[1]
    sizes = torch.tensor([TILE] * (C // TILE) + [C % TILE] * (C % TILE > 0))
    bits = torch.full(sizes.shape, 8, dtype=torch.uint8)

    def run(weight):
        return lambda: planar.planar_linear(*planar.quantize_tiles(x, bits, sizes), weight)

    stream = torch.zeros(weights[4].planes[0].numel() // 4, dtype=torch.int32)
    ours = {f"W{b}A8": run(weight) for b, weight in weights.items()}
    return {**ours, "float32": lambda: F.linear(x, full), "read": stream.max}


def measure(runs: dict, repeats: int) -> dict[str, list[float]]:
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    if native.library() is None:
        print("no compiled library: run python setup.py build_ext --inplace", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    weights = {bits: random_weight(bits, args.channels, args.rows) for bits in (8, 4, 3)}
    full = torch.randn(args.rows, args.channels)
    for tokens in args.tokens:
        seconds = measure(contenders(torch.randn(tokens, args.channels), weights, full), args.repeats)
        reference = median(seconds["float32"])
        for name, each in seconds.items():
            least, middle = min(each) * 1e3, median(each) * 1e3
            speed = reference / median(each)
            print(f"{tokens:5} tokens  {name:8} {least:8.3f} ms least {middle:8.3f} ms median  {speed:6.2f} x float32")
    return 0


if __name__ == "__main__":
    sys.exit(main())
