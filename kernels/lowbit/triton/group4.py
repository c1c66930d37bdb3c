"""x W^T for FlexGen's codec (`lowbit.group4`, groups of 64 along the rows) in Triton: decode a tile, multiply it. The plain baseline.

Scales and minima belong to a channel and 64 rows, so they cannot wait for the sum; every weight is decoded in float32 and rounded to the
dtype of x, as `lowbit.group4.decompress` does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.group4 import Group4
from lowbit.triton.planar_linear import SUMMED, _family, _parts, sum_kernel

UNIT = 128  # channels of a part of K are whole units of


@triton.jit
def group4_kernel(
    x, packed, scale, minimum, bias, y, M, C, N, per, x_stride, octets, groups, BM: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The 64 rows of one group times BM tokens of y [parts, M, N] over channels per part to per (part + 1).

    packed [C, octets]: byte i of a channel holds rows 2i and 2i + 1. scale, minimum [C, groups].
    """
    group = tl.program_id(0)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    octet = group * 32 + tl.arange(0, 32)
    even, odd = tl.zeros([32, BM], tl.float32), tl.zeros([32, BM], tl.float32)
    for c0 in tl.range(part * per, tl.minimum(part * per + per, C), BC, num_stages=1):
        channel = (c0 + tl.arange(0, BC)).to(tl.int64)
        there = channel < C
        codes = tl.load(
            packed + channel[:, None] * octets + octet[None, :],
            mask=there[:, None] & (octet < octets)[None, :],
            other=0,
        )
        s = tl.load(scale + channel * groups + group, mask=there, other=0.0).to(tl.float32)[:, None]
        m = tl.load(minimum + channel * groups + group, mask=there, other=0.0).to(tl.float32)[:, None]
        at = token[None, :].to(tl.int64) * x_stride + channel[:, None]
        values = tl.load(x + at, mask=there[:, None] & (token < M)[None, :], other=0.0)  # [BC, BM]
        low = ((codes & 15).to(tl.float32) * s + m).to(x.dtype.element_ty)
        high = ((codes >> 4).to(tl.float32) * s + m).to(x.dtype.element_ty)
        even = tl.dot(tl.trans(low), values, even, input_precision=PRECISION)
        odd = tl.dot(tl.trans(high), values, odd, input_precision=PRECISION)
    _store(y, even, bias, 2 * octet, token, part, M, N)
    _store(y, odd, bias, 2 * octet + 1, token, part, M, N)


@triton.jit
def _store(y, acc, bias, row, token, part, M, N):
    if bias is not None:
        acc += tl.load(bias + row, mask=row < N, other=0.0)[:, None]
    at = (part.to(tl.int64) * M + token)[None, :] * N + row[:, None]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=(row < N)[:, None] & (token < M)[None, :])


# (most tokens, tile and threads), the first that fits, for every family.
SHAPES = ((16, {"BM": 16, "BC": 64, "num_warps": 4}), (None, {"BM": 64, "BC": 64, "num_warps": 4}))
OPTIONS = {"enable_fp_fusion": True, "num_stages": 1}


def launch_options(family: str, T: int) -> dict:
    """What is compiled into `group4_kernel` for T tokens."""
    shape = next(shape for most, shape in SHAPES if most is None or T <= most)
    return shape | {"PRECISION": "ieee" if family == "hip" else "tf32x3"}


def group4_linear(x: Tensor, weight: Group4, bias: Tensor | None = None, *, parts: int | None = None) -> Tensor:
    """y = x W^T + bias with W [R, C] = `decompress(weight)`, sums in float32.

    Args:
        x: float [T, C], channels contiguous.
        weight: `lowbit.group4.compress(W, dim=0)`.
        bias: float32 [R].
        parts: of K, summed in a fixed order; None: as many as fill the GPU.

    Returns:
        [T, R] in x's dtype.

    Raises:
        ValueError: another dimension or group.
    """
    if len(weight.shape) != 2 or weight.dim != 0 or weight.group != 64:
        raise ValueError(
            f"weight {weight.shape} in groups of {weight.group} along {weight.dim}; compress [R, C] along 0 by 64"
        )
    T, (R, C) = x.shape[0], weight.shape
    y = torch.empty(T, R, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    options = launch_options(_family(x.device), T)
    programs, units = (triton.cdiv(R, 64), triton.cdiv(T, options["BM"])), triton.cdiv(C, UNIT)
    parts = parts or _parts(programs[0] * programs[1], units, True, x.device)
    sums = y if parts == 1 else torch.empty(parts, T, R, device=x.device)
    with torch.cuda.device_of(x):
        group4_kernel[(*programs, parts)](
            x, weight.packed, weight.scale, weight.minimum, bias if parts == 1 else None, sums, T, C, R,
            triton.cdiv(units, parts) * UNIT, x.stride(0), weight.packed.shape[1], weight.scale.shape[1], **options, **OPTIONS,
        )  # fmt: skip
        if parts > 1:
            sum_kernel[(triton.cdiv(T * R, SUMMED),)](sums, bias, y, T * R, R, SPLIT=parts, BLOCK=SUMMED)
    return y
