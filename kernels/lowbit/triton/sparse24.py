"""x W^T for a weight that keeps 2 of every 4 channels (`lowbit.sparse24`) in Triton, for few tokens: half the values are read.

No tensor core that Triton reaches skips zeros, so they are put back in registers: four products a step, of the channels first, second,
third and fourth in their groups, since a sum does not mind the order of its channels. One load brings both values of a group, one the four
activations they meet.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lowbit.sparse24 import UNIT, Sparse24
from lowbit.triton.planar_linear import SUMMED, _family, _parts, sum_kernel

GROUPS = tl.constexpr(32)  # of four channels at once: one unit, and one grid of codes


@triton.jit
def _number(word, dtype: tl.constexpr):
    """The low 16 bits of a word as a number."""
    return word.to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def sparse24_kernel(
    x, values, places, scale, zero, bias, y, M, per, N, units, dtype: tl.constexpr, CODES: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """BN rows times BM tokens of y [parts, M, N] over one part of K, `per` of its units.

    x: int64 words of four channels. values: a word for each group. dtype: of x, and of values that are no codes.
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    at_row, at_token = tl.minimum(row, N - 1).to(tl.int64), tl.minimum(token, M - 1).to(tl.int64)
    group = tl.arange(0, GROUPS)
    acc = tl.zeros([BN, BM], tl.float32)
    for u in tl.range(part * per, tl.minimum(part * per + per, units), num_stages=1):
        pair = tl.load(values + at_row[:, None] * (units * GROUPS) + (group + u * GROUPS)[None, :])
        place = tl.load(places + at_row[:, None] * (units * GROUPS // 2) + (group // 2 + u * (GROUPS // 2))[None, :])
        place = place.to(tl.int32) >> ((group & 1) * 4)[None, :]
        four = tl.load(x + at_token[:, None] * (units * GROUPS) + (group + u * GROUPS)[None, :])
        if CODES:
            z = tl.load(zero + tl.cast(u, tl.int64) * N + at_row)[:, None]
            first = ((pair & 255).to(tl.float32) - z).to(dtype)
            second = ((pair >> 8 & 255).to(tl.float32) - z).to(dtype)
            products = tl.zeros([BN, BM], tl.float32)
        else:
            first, second, products = _number(pair, dtype), _number(pair >> 16, dtype), acc
        nothing = tl.zeros([BN, GROUPS], dtype)
        for j in tl.static_range(4):
            w = tl.where((place & 3) == j, first, tl.where((place >> 2 & 3) == j, second, nothing))
            products = tl.dot(w, tl.trans(_number(four >> 16 * j, dtype)), products)
        if CODES:
            acc += products * tl.load(scale + tl.cast(u, tl.int64) * N + at_row)[:, None]
        else:
            acc = products
    if bias is not None:
        acc += tl.load(bias + at_row)[:, None]
    inside = (row < N)[:, None] & (token < M)[None, :]
    at = (part.to(tl.int64) * M + at_token)[None, :] * N + at_row[:, None]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


# (most tokens, tile and threads), the first that fits, for every family.
SHAPES = ((16, {"BM": 16, "BN": 64, "num_warps": 4}), (None, {"BM": 64, "BN": 64, "num_warps": 8}))
OPTIONS = {"enable_fp_fusion": True, "num_stages": 1}


def launch_options(family: str, T: int) -> dict:
    """What is compiled into `sparse24_kernel` for T tokens; every family has the same."""
    return next(shape for most, shape in SHAPES if most is None or T <= most)


def sparse24_linear(x: Tensor, weight: Sparse24, bias: Tensor | None = None, *, parts: int | None = None) -> Tensor:
    """`lowbit.sparse24.sparse24_linear` on a GPU, sums in float32.

    Args:
        x: float16 or bfloat16 [T, C], the dtype of a weight that is no codes.
        bias: float32 [R].
        parts: of K, summed in a fixed order; None: as many as fill the GPU.

    Raises:
        ValueError: x of another dtype.
    """
    coded = weight.scale is not None
    kinds = (torch.float16, torch.bfloat16) if coded else (weight.values.dtype,)
    if x.dtype not in kinds:
        raise ValueError(f"x is {x.dtype} for a weight of {weight.values.dtype}: cast it to {kinds[0]}")
    (T, C), (R, half) = x.shape, weight.values.shape
    y = torch.empty(T, R, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    units = 2 * half // UNIT
    options = launch_options(_family(x.device), T)
    programs = triton.cdiv(R, options["BN"]), triton.cdiv(T, options["BM"])
    parts = parts or _parts(programs[0] * programs[1], units, True, x.device)
    sums = y if parts == 1 else torch.empty(parts, T, R, device=x.device)
    words = F.pad(x, (0, 2 * half - C)).contiguous().view(torch.int64)  # [T, C] -> [T, Kp/4]
    pairs = weight.values.view(torch.int16 if coded else torch.int32)  # [R, Kp/2] -> [R, Kp/4]
    with torch.cuda.device_of(x):
        sparse24_kernel[(*programs, parts)](
            words, pairs, weight.places, weight.scale, weight.zero, bias if parts == 1 else None, sums, T,
            triton.cdiv(units, parts), R, units, dtype=tl.float16 if x.dtype == torch.float16 else tl.bfloat16, CODES=coded,
            **options, **OPTIONS,
        )  # fmt: skip
        if parts > 1:
            sum_kernel[(triton.cdiv(T * R, SUMMED),)](sums, bias, y, T * R, R, SPLIT=parts, BLOCK=SUMMED)
    return y
