"""Activations to int8 codes in Triton, in one pass with what comes before: residual sum, norm, gather of the channels, rotation.

One program owns a token, or a few tiles of one where there is no norm, as [tiles, 64] in registers. The decisions are those of
`lowbit.planar_reference`; the results are laid out as `lowbit.triton.planar_linear` reads them, the grids with tokens contiguous, all with
memory for whole blocks of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.planar import EXACT, TILE, UNIT
from lowbit.triton.planar_linear import padded_tokens

ROTATION = 64
NORMS = {None: 0, "layernorm": 1, "rmsnorm": 2, "rmsnorm_plus_one": 3}
OPTIONS = {
    "num_stages": 1,
    "enable_fp_fusion": False,
}  # a fused product would round once where the formulas round twice
# Channels that a thread holds; tiles of a program that need not see the whole token.
HELD, FEW_TILES = 16, 16
TINY = tl.constexpr(1.1754943508222875e-38)
WHOLE = tl.constexpr(4194304.0)
MAGIC = tl.constexpr(12582912.0)


@triton.jit
def _rounded(v):
    """Half to even: adding 1.5 * 2^23 leaves no bits for a fraction. Larger numbers, infinities and NaN have none."""
    return tl.where(tl.abs(v) < WHOLE, (v + MAGIC) - MAGIC, v)


@triton.jit
def _brief(v):
    """Positive float32 to the nearest bfloat16, half to even, as float32. A cast would do, but not under Triton's interpreter."""
    word = v.to(tl.int32, bitcast=True)
    word = (word + 0x7FFF + ((word >> 16) & 1)) & -65536
    return tl.where(v - v == 0.0, word.to(tl.float32, bitcast=True), v)


@triton.jit
def _own_grid(low, high, top, BRIEF: tl.constexpr):
    """Scale and zero point of numbers from low to high, top the largest code: [tiles] each. BRIEF: hold the scale as bfloat16."""
    s = tl.maximum(tl.div_rn(high - low, top), TINY)
    if BRIEF:
        s = _brief(s)
    return s, _rounded(tl.div_rn(-low, s))


@triton.jit
def _codes_of(value, s, z, top, offset, kept):
    """Codes less `offset` of value [tiles, 64] on the grids [tiles]; 0 where not kept."""
    codes = _rounded(tl.div_rn(value, tl.broadcast_to(s[:, None], value.shape))) + z[:, None]
    codes = tl.minimum(tl.maximum(codes, 0.0), top[:, None]) - offset[:, None]
    return tl.where(kept, codes, 0.0)


@triton.jit
def _normalized(x, inside, weight, bias, source, C, eps, NORM: tl.constexpr, dtype: tl.constexpr):
    """x [tiles, 64] float32, 0 outside; rounded to `dtype` where the modules round."""
    if NORM == 1:
        mean = tl.sum(x) / C
        x = tl.where(inside, x - mean, 0.0)
    x = x * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x) / C + eps))
    if NORM == 2:
        x = x.to(dtype).to(tl.float32)
    if weight is not None:
        w = tl.load(weight + source, mask=inside, other=0.0).to(tl.float32)
        if NORM == 3:
            x = x * (1.0 + w)
        else:
            x = x * w.to(dtype).to(tl.float32)
    if bias is not None:
        x = x + tl.load(bias + source, mask=inside, other=0.0).to(dtype).to(tl.float32)
    return x.to(dtype).to(tl.float32)


@triton.jit
def _rotated(x, TILES: tl.constexpr):
    """Each row of x [tiles, 64] times H_64 / 8: Sylvester's matrix as six rounds of sums and differences."""
    for k in tl.static_range(6):
        y = tl.permute(tl.reshape(x, [TILES, 32 >> k, 2, 1 << k]), [0, 1, 3, 2])
        left, right = tl.split(y)
        x = tl.reshape(tl.permute(tl.join(left + right, left - right), [0, 1, 3, 2]), [TILES, 64])
    return x * 0.125


@triton.jit
def quantize_kernel(
    x, residual, summed, weight, bias, permutation, scale, zero, bits, a, step, shift, count, C, x_stride, eps,
    NORM: tl.constexpr, ROTATE: tl.constexpr, TILES: tl.constexpr, G: tl.constexpr, grid_stride,
):  # fmt: skip
    """TILES tiles of a token, all where there is a norm: x [C] -> a [64 G], and step, shift, count at [g, token].

    scale, zero: [tiles], where the grids are static.
    """
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    channel = tile[:, None] * 64 + tl.arange(0, 64)[None, :]
    inside = channel < C
    source = channel
    if permutation is not None:
        source = tl.load(permutation + channel, mask=inside, other=0)
    loaded = tl.load(x + token * x_stride + source, mask=inside, other=0.0)
    if residual is not None:
        more = tl.load(residual + token * C + source, mask=inside, other=0.0)
        loaded = (loaded.to(tl.float32) + more.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(summed + token * C + source, loaded, mask=inside)
    value = loaded.to(tl.float32)
    if NORM > 0:
        value = _normalized(value, inside, weight, bias, source, C, eps, NORM, x.dtype.element_ty)
    if ROTATE:
        value = _rotated(value, TILES).to(x.dtype.element_ty).to(tl.float32)
    value = tl.where(inside, value, 0.0)

    there = tile * 64 < C
    b = tl.load(bits + tile, mask=there, other=8).to(tl.int32)
    top = ((1 << b) - 1).to(tl.float32)
    if scale is None:
        low, high = tl.minimum(tl.min(value, axis=1), 0.0), tl.maximum(tl.max(value, axis=1), 0.0)
        s, z = _own_grid(low, high, top, True)
        offset = tl.where(b == 8, 128.0, z)
        # Comparisons pass over NaN, so it is looked for by itself.
        broken = (tl.sum((value - value != 0.0).to(tl.int32), axis=1) > 0) | (s - s != 0.0)
        fine = ~broken[:, None]
    else:
        s, z = tl.load(scale + tile, mask=there, other=1.0), tl.load(zero + tile, mask=there, other=0.0)
        offset = (1 << (b - 1)).to(tl.float32)
        broken = tl.sum((value != value).to(tl.int32), axis=1) > 0
        fine = value == value
    codes = _codes_of(value, s, z, top, offset, inside & fine)
    tl.store(a + token * (G * 64) + channel, codes.to(tl.int8), mask=channel < G * 64)
    s = tl.where(broken, float("nan"), tl.where(there, s, 1.0))
    at = tile * grid_stride + token
    tl.store(count + at, s * tl.sum(codes, axis=1), mask=tile < G)
    if step is not None:
        tl.store(step + at, s, mask=tile < G)
    if shift is not None:
        tl.store(shift + at, tl.where(there & (b == 8), s * (128.0 - z), 0.0), mask=tile < G)


@triton.jit
def exact_kernel(
    x, a, step, count, T, C, x_stride, grid_stride, TILES: tl.constexpr, G: tl.constexpr, TERMS: tl.constexpr
):  # fmt: skip
    """TILES tiles of a token as TERMS codes a number: x [C] -> a [64 G], and step, count at [g, token], those of term n at token + n T."""
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    channel = tile[:, None] * 64 + tl.arange(0, 64)[None, :]
    left = tl.load(x + token * x_stride + channel, mask=channel < C, other=0.0).to(tl.float32)
    broken = tl.sum((left - left != 0.0).to(tl.int32), axis=1) > 0
    s = tl.maximum(tl.div_rn(tl.max(tl.abs(left), axis=1), tl.zeros([TILES], tl.float32) + 127.0), TINY)
    for term in tl.static_range(TERMS):
        steps = tl.broadcast_to(s[:, None], left.shape)
        codes = tl.minimum(tl.maximum(_rounded(tl.div_rn(left, steps)), -127.0), 127.0)
        codes = tl.where(broken[:, None], 0.0, codes)
        left -= codes * steps
        row = token + term * T
        tl.store(a + row * (G * 64) + channel, codes.to(tl.int8), mask=channel < G * 64)
        known = tl.where(broken, float("nan"), s)
        tl.store(step + tile * grid_stride + row, known, mask=tile < G)
        tl.store(count + tile * grid_stride + row, known * tl.sum(codes, axis=1), mask=tile < G)
        s = tl.maximum(tl.div_rn(s, tl.zeros([TILES], tl.float32) + 254.0), TINY)


@triton.jit
def clusters_kernel(
    x, ends, bits, a, step, shift, count, C, x_stride, tiles, grid_stride, TILES: tl.constexpr, BRIEF: tl.constexpr,
):  # fmt: skip
    """One cluster of one token, its tiles up to ends [n]: x [C] -> a [64 tiles], and step, shift, count at [g, token].

    The last cluster writes the tiles of padding too. BRIEF: hold the step as bfloat16.
    """
    token, cluster = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(ends + cluster - 1, mask=cluster > 0, other=0)
    last = tl.load(ends + cluster)
    within = tl.arange(0, TILES)[:, None] * 64 + tl.arange(0, 64)[None, :]
    lows, highs = tl.zeros([TILES, 64], tl.float32), tl.zeros([TILES, 64], tl.float32)
    odd = tl.zeros([TILES, 64], tl.int32)
    for g in tl.range(first, last, TILES, num_stages=1):
        channel = g * 64 + within
        value = tl.load(x + token * x_stride + channel, mask=channel < tl.minimum(last * 64, C), other=0.0).to(
            tl.float32
        )
        lows, highs = tl.minimum(lows, value), tl.maximum(highs, value)
        odd |= (value - value != 0.0).to(tl.int32)
    every = tl.zeros([TILES], tl.int32)  # the grid is the same in all tiles, and each has a copy
    low, high = every + tl.min(tl.min(lows, axis=1), axis=0), every + tl.max(tl.max(highs, axis=1), axis=0)
    broken = (every + tl.max(tl.max(odd, axis=1), axis=0)) > 0

    b = tl.load(bits + cluster + every).to(tl.int32)
    top = ((1 << b) - 1).to(tl.float32)
    s, z = _own_grid(low, high, top, BRIEF)
    offset = tl.where(b == 8, 128.0, z)
    broken = broken | (s - s != 0.0)
    known = tl.where(broken, float("nan"), s)
    written = tl.where(cluster == tl.num_programs(1) - 1, tiles, last)
    for g in tl.range(first, written, TILES, num_stages=1):
        channel, tile = g * 64 + within, g + tl.arange(0, TILES)
        inside = channel < tl.minimum(last * 64, C)
        value = tl.load(x + token * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
        codes = _codes_of(value, s, z, top, offset, inside & ~broken[:, None])
        tl.store(a + token * tiles * 64 + channel, codes.to(tl.int8), mask=channel < written * 64)
        at, there, mine = tile * grid_stride + token, tile < last, tile < written
        tl.store(step + at, tl.where(there, known, 1.0), mask=mine)
        tl.store(shift + at, tl.where(there & (b == 8), known * (128.0 - z), 0.0), mask=mine)
        tl.store(count + at, tl.where(there, known * tl.sum(codes, axis=1), 0.0), mask=mine)


def quantize_clusters(x: Tensor, bits: Tensor, ends: Tensor, *, brief: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each token's own grid in each cluster of one tile or more.

    Args:
        x: float [T, C], channels contiguous.
        bits: uint8 [n], 2 to 8.
        ends: int [n], where each cluster's tiles end, ascending to ceil(C / 64).
        brief: hold the step as bfloat16.

    Returns:
        (a, step, shift, count) as `quantize_tiles`.
    """
    T, C = x.shape
    G, rows = triton.cdiv(C, UNIT) * 2, padded_tokens(T)
    a = torch.empty(rows, G * TILE, dtype=torch.int8, device=x.device)
    step, shift, count = (torch.empty(G, rows, device=x.device) for _ in range(3))
    if T:
        with torch.cuda.device_of(x):
            clusters_kernel[(T, ends.numel())](
                x, ends, bits, a, step, shift, count, C, x.stride(0), G, rows, TILES=FEW_TILES, BRIEF=brief,
                num_warps=FEW_TILES * TILE // (32 * HELD), **OPTIONS,
            )  # fmt: skip
    return a[:T], *(t[:, :T].t() for t in (step, shift, count))


def quantize_exactly(x: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
    """x float [T, C], channels contiguous, as EXACT codes a number (`lowbit.integer.exact_codes`): all tokens' first ones, then the second.

    Returns:
        a int8 [2 T, Kp], step float32 [2 T, G], None, count float32 [2 T, G], laid out as those of `quantize_tiles`.
    """
    T, C = x.shape
    G, rows = triton.cdiv(C, UNIT) * 2, padded_tokens(EXACT * T)
    a = torch.empty(rows, G * TILE, dtype=torch.int8, device=x.device)
    step, count = (torch.empty(G, rows, device=x.device) for _ in range(2))
    if T:
        with torch.cuda.device_of(x):
            exact_kernel[(T, triton.cdiv(G, FEW_TILES))](
                x, a, step, count, T, C, x.stride(0), rows, TILES=FEW_TILES, G=G, TERMS=EXACT,
                num_warps=FEW_TILES * TILE // (32 * HELD), **OPTIONS,
            )  # fmt: skip
    return a[: EXACT * T], step[:, : EXACT * T].t(), None, count[:, : EXACT * T].t()


def quantize_tiles(x: Tensor, bits: Tensor, *, shifted: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Each token's own grid in each tile of 64 channels: the codes of `lowbit.reference.quantize_activation_tiles`.

    A tile with NaN or an infinity has NaN in step and count.

    Args:
        x: float [T, C], channels contiguous.
        bits: uint8 [ceil(C / 64)], 2 to 8.
        shifted: False where no tile has 8 bits.

    Returns:
        a int8 [T, Kp], step float32 [T, G], shift float32 [T, G] or None without `shifted`, count float32 [T, G]; step is a bfloat16.
    """
    return norm_quantize(x, bits, shifted=shifted)[0]


def norm_quantize(
    x: Tensor,
    bits: Tensor,
    *,
    kind: str | None = None,
    eps: float = 0.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    permutation: Tensor | None = None,
    rotation: int = 1,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    shifted: bool = True,
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None, Tensor], Tensor | None]:
    """quantize(rotate(norm(x + residual)[..., permutation])): RPTQ's reordering norm (section 3.3), and the codes at once.

    Args:
        x: float [T, C], channels contiguous.
        bits: uint8 [ceil(C / 64)], 2 to 8.
        kind: a norm of `lowbit.reference.NORMS`, None for none; eps, weight [C] and bias [C] are its own.
        permutation: int [C], each channel once.
        rotation: 64 for the Hadamard transform of each tile, 1 for none.
        residual: in x's dtype, contiguous [T, C].
        scale, zero: float32 [ceil(C / 64)] of static grids; None for each token's own. Their step and shift belong into the weight's
            scale and the bias, and come back as None.
        shifted: False where no tile of a dynamic grid has 8 bits.

    Returns:
        (a, step, shift, count) as `quantize_tiles`, and x + residual in x's dtype, None without residual.

    Raises:
        ValueError: a rotation other than 1 and 64, or one that does not divide C.
    """
    T, C = x.shape
    if rotation not in (1, ROTATION) or C % rotation:
        raise ValueError(f"rotation {rotation} of {C} channels: this kernel turns blocks of 64 that fill the channels")
    G, rows = triton.cdiv(C, UNIT) * 2, padded_tokens(T)
    a = torch.empty(rows, G * TILE, dtype=torch.int8, device=x.device)
    dynamic = scale is None
    made = dynamic, dynamic and shifted, True
    step, shift, count = (torch.empty(G, rows, device=x.device) if wanted else None for wanted in made)
    summed = None if residual is None else torch.empty(T, C, dtype=x.dtype, device=x.device)
    if T:
        tiles = triton.next_power_of_2(G) if kind else FEW_TILES
        warps = min(16, max(1, tiles * TILE // (32 * HELD)))
        with torch.cuda.device_of(x):
            quantize_kernel[(T, triton.cdiv(G, tiles))](
                x, residual, summed, weight, bias, permutation, scale, zero, bits, a, step, shift, count, C, x.stride(0),
                eps, NORM=NORMS[kind], ROTATE=rotation > 1, TILES=tiles, G=G, grid_stride=rows, num_warps=warps, **OPTIONS,
            )  # fmt: skip
    grids = (None if t is None else t[:, :T].t() for t in (step, shift, count))
    return (a[:T], *grids), summed
