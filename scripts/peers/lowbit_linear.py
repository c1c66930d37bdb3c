#!/usr/bin/env python3
"""This package's integer linears and PyTorch's, for bench_cpu.py, which starts it. Activations are quantized within the call."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from _cpu_turns import distinct_rows, options, repeated, serve
from lowbit import pack
from lowbit.cpu import planar
from lowbit.planar import TILE, planar_weight

GROUP = 128
A8 = 8


def rounded(W, bits, group, symmetric):
    """Round to nearest on the range of each group: codes uint8 [R, C], scale [R, G], zero uint8 [R, G]."""
    groups = W.unflatten(1, (-1, group))  # [R, C] -> [R, G, group]
    top = 2**bits - 1
    if symmetric:
        scale = groups.abs().amax(2) / (top // 2)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = groups.amin(2), groups.amax(2)
        scale = (high - low) / top
        zero = (-low / scale).round()
    codes = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, top)
    return codes.flatten(1).to(torch.uint8), scale, zero.to(torch.uint8)  # [R, G, group] -> [R, C]


def laid_out(W, bits, group, symmetric):
    codes, scale, zero = (torch.from_numpy(repeated(t.numpy())) for t in rounded(W, bits, group, symmetric))
    sizes = torch.full((W.shape[1] // group,), group)
    # Scales are stored in 16 bits.
    scale = scale.half().float()
    return planar_weight(pack(codes, bits), scale, pack(zero, bits), sizes, bits=bits, channels=W.shape[1]).ready()


def read_bytes(weight):
    """Bytes that a product reads, of activations with shifts, which those of 8 bits have: planes and all tables."""
    return sum(plane.numel() for plane in weight.planes) + weight.tables.numel()


def by_tiles(weight):
    """8-bit activations, a grid for each token and 64 channels."""

    def make(x):
        x, tiles = torch.from_numpy(x), weight.channels // TILE
        sizes, bits = torch.full((tiles,), TILE), torch.full((tiles,), A8, dtype=torch.uint8)
        return lambda: planar.quantized_linear(x, planar.Grids(bits, sizes, brief=True), weight)

    return read_bytes(weight), make


def by_token(weight):
    """8-bit activations, a grid for each token."""

    def make(x):
        x = torch.from_numpy(x)
        return lambda: planar.quantized_linear(x, planar.token_grid(A8, weight.channels), weight)

    return read_bytes(weight), make


def dynamic_qint8(W):
    """PyTorch's dynamically quantized linear: a scale for each row, a grid for each call."""
    scale = W.abs().amax(1).double() / 127
    zero = torch.zeros(len(W), dtype=torch.int64)
    quantized = torch.quantize_per_channel(W, scale, zero, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, None)

    def make(x):
        x = torch.from_numpy(x)
        return lambda: torch.ops.quantized.linear_dynamic(x, packed)

    return W.numel() + 4 * len(W), make


def full(W):
    def make(x):
        x = torch.from_numpy(x)
        return lambda: F.linear(x, W)

    return 4 * W.numel(), make


def stream(size):
    """A sum over `size` bytes: how fast they come, within a twentieth or so of the fastest read that PyTorch and NumPy have."""
    # NumPy asks for large pages.
    words = torch.from_numpy(np.ones(size // 8, dtype=np.int64))

    def read():
        words.sum()

    return size, lambda x: read


def main():
    args = options()
    torch.set_num_threads(args.threads)
    W = torch.from_numpy(distinct_rows(args))
    whole = torch.from_numpy(repeated(W.numpy()))
    four = by_tiles(laid_out(W, 4, GROUP, False))
    contenders = {
        "ptq W4A8": four,
        "ptq W4A8 symmetric": by_tiles(laid_out(W, 4, GROUP, True)),
        "ptq W3A8": by_tiles(laid_out(W, 3, GROUP, False)),
        "ptq W8A8": by_token(laid_out(W, 8, args.channels, True)),
        "torch qint8": dynamic_qint8(whole),
        "torch float32": full(whole),
        "stream": stream(four[0]),
    }
    serve(args, contenders)


if __name__ == "__main__":
    main()
