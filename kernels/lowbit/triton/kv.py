"""Keys and values as packed codes in Triton: append new tokens, and attend to all of them with one query a sequence.

The layout is that of `lowbit.kv_planar`, whose functions are the reference of these. A grid belongs to a channel, so no scale is read for
a token. Without rotary embedding the scales of keys go into the query and their zero points into one number a query; those of values go
into the output. With it keys are decoded and turned in registers: both members of a pair come from the same byte.

One program attends with all query heads of one KV head to one part of the tokens; a second kernel joins the parts in a fixed order.
Quantized probabilities need the sum before the first of them is rounded: then keys are read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.attention import UNQUANTIZED_BITS
from lowbit.kv_planar import PlanarKV
from lowbit.spared import Spared
from lowbit.triton.planar_linear import _family
from lowbit.triton.quantize import _rounded

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # below any score, and still a number
# What a launch computes: all; only the largest score and the sum; only the products, largest score and sum being known.
ALL, SUMS, PRODUCTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# A byte behind 0x64 is the float16 of 1024 more. $0, $1: four bytes of $2 as float16.
BYTES = tl.constexpr(
    "{ .reg .b32 c, t; mov.b32 c, 0x64006400; mov.b32 t, $2; prmt.b32 $0, t, c, 0x5150; prmt.b32 $1, t, c, 0x5352;"
    " sub.f16x2 $0, $0, c; sub.f16x2 $1, $1, c; }"
)
# $0, $1: the low nibbles of $4 as float16, $2, $3: the high ones.
NIBBLES = tl.constexpr(
    "{ .reg .b32 c, l, h; mov.b32 c, 0x64006400; and.b32 l, $4, 0x0F0F0F0F; shr.u32 h, $4, 4; and.b32 h, h, 0x0F0F0F0F;"
    " prmt.b32 $0, l, c, 0x5150; prmt.b32 $1, l, c, 0x5352; prmt.b32 $2, h, c, 0x5150; prmt.b32 $3, h, c, 0x5352;"
    " sub.f16x2 $0, $0, c; sub.f16x2 $1, $1, c; sub.f16x2 $2, $2, c; sub.f16x2 $3, $3, c; }"
)
# $5: 0xFF in the bytes of $4 whose codes lie in bits 2-3 and 6-7, 0 where in bits 0-1 and 4-5. lop3 0xCA: $5 ? a : b.
TWO_BITS = tl.constexpr(
    "{ .reg .b32 c, l, h; mov.b32 c, 0x64006400; shr.u32 l, $4, 2; lop3.b32 h, $5, l, $4, 0xCA;"
    " and.b32 l, h, 0x03030303; shr.u32 h, h, 4; and.b32 h, h, 0x03030303;"
    " prmt.b32 $0, l, c, 0x5150; prmt.b32 $1, l, c, 0x5352; prmt.b32 $2, h, c, 0x5150; prmt.b32 $3, h, c, 0x5352;"
    " sub.f16x2 $0, $0, c; sub.f16x2 $1, $1, c; sub.f16x2 $2, $2, c; sub.f16x2 $3, $3, c; }"
)
# $6: the third bits, of the first members in bits 0 to 3; $7, $8: 0xFF where 2 and where 1 are to be added to the number of that bit.
# lop3 0xEA: (a and b) or c.
THREE_BITS = tl.constexpr(
    "{ .reg .b32 c, l, h, s, t; mov.b32 c, 0x64006400; shr.u32 l, $4, 2; lop3.b32 h, $5, l, $4, 0xCA;"
    " shr.u32 s, $6, 2; lop3.b32 s, $7, s, $6, 0xCA; shr.u32 t, s, 1; lop3.b32 s, $8, t, s, 0xCA;"
    " and.b32 l, h, 0x03030303; shr.u32 h, h, 4; and.b32 h, h, 0x03030303;"
    " shl.b32 t, s, 2; lop3.b32 l, t, 0x04040404, l, 0xEA; shr.u32 t, s, 2; lop3.b32 h, t, 0x04040404, h, 0xEA;"
    " prmt.b32 $0, l, c, 0x5150; prmt.b32 $1, l, c, 0x5352; prmt.b32 $2, h, c, 0x5150; prmt.b32 $3, h, c, 0x5352;"
    " sub.f16x2 $0, $0, c; sub.f16x2 $1, $1, c; sub.f16x2 $2, $2, c; sub.f16x2 $3, $3, c; }"
)
# Two pairs of float16 codes $2, $3 on their grids, code * $4 + $5 and code * $6 + $7, then turned by cosines $8 and sines $9.
TURNED = tl.constexpr(
    "{ .reg .b32 a, b, s, t; fma.rn.f16x2 a, $2, $4, $5; fma.rn.f16x2 b, $3, $6, $7; mul.f16x2 s, b, $9; neg.f16x2 s, s;"
    " mul.f16x2 t, a, $9; fma.rn.f16x2 s, a, $8, s; fma.rn.f16x2 t, b, $8, t; mov.b32 $0, s; mov.b32 $1, t; }"
)


@triton.jit
def _channels(place, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The channels stored at place and at D/2 + place."""
    turned = place < R // 2
    if INTERLEAVED:
        return tl.where(turned, 2 * place, place + R // 2), tl.where(turned, 2 * place + 1, place + D // 2)
    else:
        return tl.where(turned, place, place + R // 2), tl.where(turned, place + R // 2, place + D // 2)


@triton.jit
def _new_codes(
    x, at, inside, place, scale, zero, cos, sin, angle, TOP: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Codes int32 [tokens, places] of both members of each pair; at, angle [tokens]: where a token and its angles begin."""
    first, second = _channels(place, D, R, INTERLEAVED)
    a = tl.load(x + at[:, None] + first[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + at[:, None] + second[None, :], mask=inside, other=0.0).to(tl.float32)
    if cos is not None:
        turned = inside & (place < R // 2)[None, :]
        c = tl.load(cos + angle[:, None] + place[None, :], mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + angle[:, None] + place[None, :], mask=turned, other=0.0).to(tl.float32)
        size = c * c + s * s  # some models scale both
        c, s = tl.div_rn(c, size), tl.div_rn(-s, size)
        a, b = a * c - b * s, b * c + a * s
    there = place < D // 2
    return (
        _code(a, tl.load(scale + first, mask=there, other=1.0), tl.load(zero + first, mask=there, other=0.0), TOP),
        _code(b, tl.load(scale + second, mask=there, other=1.0), tl.load(zero + second, mask=there, other=0.0), TOP),
    )


@triton.jit
def _code(x, scale, zero, TOP: tl.constexpr):
    code = _rounded(tl.div_rn(x, tl.broadcast_to(scale[None, :], x.shape))) + zero[None, :]
    code = tl.where(code == code, tl.minimum(tl.maximum(code, 0.0), TOP), 0.0)
    return code.to(tl.int32)


@triton.jit
def _append_plane(
    plane, row, x, at, there, scale, zero, cos, sin, angle, TOP: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr, DONE: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    """Bits DONE to DONE + WIDTH - 1 of every code.

    row: where a token's codes begin, counted in tokens. OCTETS: a power of two, the bytes of a row or more.
    """
    BYTES_A_ROW: tl.constexpr = D * WIDTH // 8
    octet = tl.arange(0, OCTETS)
    inside = there[:, None] & (octet < BYTES_A_ROW)[None, :]
    if WIDTH == 8:
        inside = inside & (octet < D // 2)[None, :]
        a, b = _new_codes(x, at, inside, octet, scale, zero, cos, sin, angle, TOP, D, R, INTERLEAVED)
        tl.store(plane + row[:, None] * D + octet[None, :], a.to(tl.uint8), mask=inside)
        tl.store(plane + row[:, None] * D + D // 2 + octet[None, :], b.to(tl.uint8), mask=inside)
    else:
        merged = tl.zeros(inside.shape, tl.int32)
        for field in tl.static_range(4 // WIDTH):
            place = octet + field * BYTES_A_ROW
            a, b = _new_codes(x, at, inside, place, scale, zero, cos, sin, angle, TOP, D, R, INTERLEAVED)
            merged |= (a >> DONE & 2**WIDTH - 1) << field * WIDTH
            merged |= (b >> DONE & 2**WIDTH - 1) << 4 + field * WIDTH
        tl.store(plane + row[:, None] * BYTES_A_ROW + octet[None, :], merged.to(tl.uint8), mask=inside)


@triton.jit
def _append(
    plane, rest, row, x, at, there, scale, zero, cos, sin, angle, D: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr,
    INTERLEAVED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    TOP: tl.constexpr = 2**BITS - 1
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    OCTETS: tl.constexpr = HALF if BITS == 8 else HALF * WIDTH // 4
    _append_plane(plane, row, x, at, there, scale, zero, cos, sin, angle, TOP, D, R, INTERLEAVED, WIDTH, 0, OCTETS)
    if BITS == 3:
        _append_plane(rest, row, x, at, there, scale, zero, cos, sin, angle, TOP, D, R, INTERLEAVED, 1, 2, HALF // 4)


@triton.jit(do_not_specialize=["T", "held"])
def append_kernel(
    keys, values, key_scale, key_zero, value_scale, value_zero, cos, sin, key_plane, key_rest, value_plane, value_rest,
    T, held, capacity, H, key_batch, key_head, key_token, value_batch, value_head, value_token, angle_batch, angle_token,
    D: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS new tokens of one head, of keys [B, H, T, D] or of values, at tokens held to held + T of the planes."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    batch, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    there, token = token < T, token.to(tl.int64)
    row = (batch * H + head) * capacity + held + token
    if tl.program_id(2) == 0:
        at = batch * key_batch + head * key_head + token * key_token
        angle = batch * angle_batch + token * angle_token
        _append(
            key_plane, key_rest, row, keys, at, there, key_scale + head * D, key_zero + head * D, cos, sin, angle,
            D, R, BITS, INTERLEAVED, HALF,
        )  # fmt: skip
    else:
        at = batch * value_batch + head * value_head + token * value_token
        _append(
            value_plane, value_rest, row, values, at, there, value_scale + head * D, value_zero + head * D, None, None, at,
            D, 0, BITS, False, HALF,
        )  # fmt: skip


@triton.jit
def _old_codes(plane, rest, row, inside, place, D: tl.constexpr, BITS: tl.constexpr, USE_ASM: tl.constexpr):
    """Codes float16 [tokens, places] of both members of each pair; row [tokens]: the tokens, counted from where the planes begin."""
    if BITS == 8:
        a = tl.load(plane + row[:, None] * D + place[None, :], mask=inside, other=0)
        b = tl.load(plane + row[:, None] * D + D // 2 + place[None, :], mask=inside, other=0)
        if USE_ASM:
            a = tl.inline_asm_elementwise(BYTES, "=r,=r,r", [a], tl.float16, is_pure=True, pack=4)
            b = tl.inline_asm_elementwise(BYTES, "=r,=r,r", [b], tl.float16, is_pure=True, pack=4)
        return a.to(tl.float16), b.to(tl.float16)
    elif BITS == 4:
        p = tl.load(plane + row[:, None] * (D // 2) + place[None, :], mask=inside, other=0)
        if USE_ASM:
            return tl.inline_asm_elementwise(
                NIBBLES, "=r,=r,=r,=r,r", [p], (tl.float16, tl.float16), is_pure=True, pack=4
            )
        else:
            return (p & 15).to(tl.float16), (p >> 4).to(tl.float16)
    else:
        field = place // (D // 4)
        p = tl.load(plane + row[:, None] * (D // 4) + (place % (D // 4))[None, :], mask=inside, other=0)
        if BITS == 2:
            if USE_ASM:
                return tl.inline_asm_elementwise(
                    TWO_BITS, "=r,=r,=r,=r,r,r", [p, _mask(field, p)], (tl.float16, tl.float16), is_pure=True, pack=4
                )
            else:
                p = p.to(tl.int32) >> (field * 2)[None, :]
                return (p & 3).to(tl.float16), (p >> 4 & 3).to(tl.float16)
        else:
            bit = place // (D // 8)
            s = tl.load(rest + row[:, None] * (D // 8) + (place % (D // 8))[None, :], mask=inside, other=0)
            if USE_ASM:
                masks = [p, _mask(field, p), s, _mask(bit >> 1, p), _mask(bit & 1, p)]
                return tl.inline_asm_elementwise(
                    THREE_BITS, "=r,=r,=r,=r,r,r,r,r,r", masks, (tl.float16, tl.float16), is_pure=True, pack=4
                )
            else:
                p = p.to(tl.int32) >> (field * 2)[None, :]
                s = s.to(tl.int32) >> bit[None, :]
                a, b = (p & 3) | (s & 1) << 2, (p >> 4 & 3) | (s >> 4 & 1) << 2
                return a.to(tl.float16), b.to(tl.float16)


@triton.jit
def _mask(field, like):
    """0xFF where field [places] is not 0, in the shape of `like`."""
    return tl.broadcast_to(tl.where(field > 0, 255, 0).to(tl.uint8)[None, :], like.shape)


@triton.jit
def _turned(a, b, a_scale, a_shift, b_scale, b_shift, c, s, exact: tl.constexpr, USE_ASM: tl.constexpr):
    """Keys of codes a, b [tokens, places] float16, grids [places], angles c, s [tokens, places]."""
    if USE_ASM and exact == tl.float16:
        a_scale, a_shift = a_scale.to(tl.float16)[None, :], a_shift.to(tl.float16)[None, :]
        b_scale, b_shift = b_scale.to(tl.float16)[None, :], b_shift.to(tl.float16)[None, :]
        c, s = c.to(tl.float32).to(tl.float16), s.to(tl.float32).to(tl.float16)
        return tl.inline_asm_elementwise(
            TURNED, "=r,=r,r,r,r,r,r,r,r,r", [a, b, a_scale, a_shift, b_scale, b_shift, c, s], (tl.float16, tl.float16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        c, s = c.to(tl.float32), s.to(tl.float32)
        a = tl.fma(
            a.to(tl.float32), tl.broadcast_to(a_scale[None, :], a.shape), tl.broadcast_to(a_shift[None, :], a.shape)
        )
        b = tl.fma(
            b.to(tl.float32), tl.broadcast_to(b_scale[None, :], b.shape), tl.broadcast_to(b_shift[None, :], b.shape)
        )
        return (a * c - b * s).to(exact), (b * c + a * s).to(exact)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit(do_not_specialize=["T", "per", "mask_batch"])
def decode_kernel(
    q, key_scale, key_zero, cos, sin, mask, key_plane, key_rest, value_plane, value_rest, known_most, known_sum,
    products, most, sums, T, per, capacity, scaling, softcap, angle_batch, angle_token, mask_batch,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr, INTERLEAVED: tl.constexpr,
    PHASE: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """GROUP query heads over one part of the tokens: products [B, Hq, parts, D] of codes, most (log 2) and sums [B, Hq, parts]."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    head, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts = tl.num_programs(1)
    row = tl.arange(0, ROWS)
    place = tl.arange(0, HALF)
    there = place < D // 2
    first, second = _channels(place, D, R, INTERLEAVED)
    at_q = (batch * H * GROUP + head * GROUP + row) * D
    mine = (row < GROUP)[None, :] & there[:, None]
    a_q = tl.load(q + at_q[None, :] + first[:, None], mask=mine, other=0.0)  # [HALF, ROWS]
    b_q = tl.load(q + at_q[None, :] + second[:, None], mask=mine, other=0.0)
    exact: tl.constexpr = tl.float32 if q.dtype.element_ty == tl.float32 else tl.float16
    a_scale = tl.load(key_scale + head * D + first, mask=there, other=0.0)
    b_scale = tl.load(key_scale + head * D + second, mask=there, other=0.0)
    a_zero = tl.load(key_zero + head * D + first, mask=there, other=0.0)
    b_zero = tl.load(key_zero + head * D + second, mask=there, other=0.0)
    a_wide, b_wide = a_q.to(tl.float32), b_q.to(tl.float32)
    if cos is None:
        a_wide, b_wide = a_wide * a_scale[:, None], b_wide * b_scale[:, None]
    # Brought to at most 1, so that float16 holds the query whatever its scale.
    size = tl.maximum(tl.max(tl.abs(a_wide), axis=0), tl.max(tl.abs(b_wide), axis=0))
    size = tl.where(size > 0.0, size, 1.0)
    a_q, b_q = (a_wide / size[None, :]).to(exact), (b_wide / size[None, :]).to(exact)
    factor = size * scaling
    offset = tl.zeros([ROWS], tl.float32)
    if cos is None:
        offset = tl.sum(a_q.to(tl.float32) * a_zero[:, None] + b_q.to(tl.float32) * b_zero[:, None], axis=0)

    high = tl.zeros([ROWS], tl.float32) + LOWEST
    total = tl.zeros([ROWS], tl.float32)
    if PHASE == PRODUCTS:
        at_known = batch * H * GROUP + head * GROUP + row
        high = tl.load(known_most + at_known, mask=row < GROUP, other=0.0)
        share = LEVELS / tl.load(known_sum + at_known, mask=row < GROUP, other=1.0)
    a_acc = tl.zeros([HALF, ROWS], tl.float32)
    b_acc = tl.zeros([HALF, ROWS], tl.float32)
    start = (batch * H + head) * capacity
    key_plane += start * (D * WIDTH // 8)
    value_plane += start * (D * WIDTH // 8)
    if BITS == 3:
        key_rest += start * (D // 8)
        value_rest += start * (D // 8)
    if cos is not None:
        cos += batch * angle_batch
        sin += batch * angle_batch
    for t0 in tl.range(part * per, tl.minimum(part * per + per, T), TOKENS, num_stages=1):
        token = t0 + tl.arange(0, TOKENS)
        held = token < T
        inside = held[:, None] & there[None, :]
        a, b = _old_codes(key_plane, key_rest, token, inside, place, D, BITS, USE_ASM)
        if cos is not None:
            turned = held[:, None] & (place < R // 2)[None, :]
            angle = (token * angle_token)[:, None] + place[None, :]
            c = tl.load(cos + angle, mask=turned, other=1.0)
            s = tl.load(sin + angle, mask=turned, other=0.0)
            a, b = _turned(a, b, a_scale, -a_zero * a_scale, b_scale, -b_zero * b_scale, c, s, exact, USE_ASM)
        else:
            a, b = a.to(exact), b.to(exact)
        scores = tl.dot(a, a_q, input_precision=PRECISION)  # [TOKENS, ROWS]
        scores = tl.dot(b, b_q, scores, input_precision=PRECISION)
        scores = (scores - offset[None, :]) * factor[None, :]
        if softcap is not None:
            scores = _tanh(scores / softcap) * softcap
        visible = held
        if mask is not None:
            visible = held & (tl.load(mask + batch * mask_batch + token, mask=held, other=0) != 0)
        scores = tl.where(visible[:, None], scores * LOG2E, float("-inf"))
        if PHASE == PRODUCTS:
            p = tl.exp2(scores - high[None, :]) * share[None, :]
            p = _rounded(p).to(exact)
        else:
            higher = tl.maximum(high, tl.max(scores, axis=0))
            p = tl.exp2(scores - higher[None, :])
            p = p.to(exact) if PHASE == ALL else p
            fade = tl.exp2(high - higher)
            high, total = higher, total * fade
            a_acc, b_acc = a_acc * fade[None, :], b_acc * fade[None, :]
        total += tl.sum(p.to(tl.float32), axis=0)
        if PHASE != SUMS:
            a, b = _old_codes(value_plane, value_rest, token, inside, place, D, BITS, USE_ASM)
            a_acc = tl.dot(tl.trans(a.to(exact)), p, a_acc, input_precision=PRECISION)
            b_acc = tl.dot(tl.trans(b.to(exact)), p, b_acc, input_precision=PRECISION)

    at = (batch * H * GROUP + head * GROUP + row) * parts + part
    tl.store(most + at, high, mask=row < GROUP)
    tl.store(sums + at, total, mask=row < GROUP)
    if PHASE != SUMS:
        tl.store(products + at[None, :] * D + place[:, None], a_acc, mask=mine)
        tl.store(products + at[None, :] * D + D // 2 + place[:, None], b_acc, mask=mine)


@triton.jit
def join_kernel(
    products, most, sums, value_scale, value_zero, other_products, other_most, other_sum, y, GROUP: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, LEVELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y [B Hq, D] of all parts, and of values that are no codes: other_products [B Hq, D], other_most, other_sum [B Hq]."""
    i = tl.program_id(0).to(tl.int64)
    part, channel = tl.arange(0, PARTS), tl.arange(0, WIDE)
    there = channel < D
    weight, count = tl.load(most + i * PARTS + part), tl.load(sums + i * PARTS + part)
    acc = tl.load(products + (i * PARTS + part)[:, None] * D + channel[None, :], mask=there[None, :], other=0.0)
    if LEVELS > 0:  # probabilities as they are
        count, acc, norm = tl.sum(count, axis=0), tl.sum(acc, axis=0), LEVELS * 1.0
    else:
        highest = tl.max(weight, axis=0)
        if other_most is not None:
            highest = tl.maximum(highest, tl.load(other_most + i))
        weight = tl.exp2(weight - highest)
        count, acc = tl.sum(weight * count, axis=0), tl.sum(weight[:, None] * acc, axis=0)
        norm = count
    at_grid = (i // GROUP % H) * D + channel
    scale = tl.load(value_scale + at_grid, mask=there, other=0.0)
    acc = (acc - tl.load(value_zero + at_grid, mask=there, other=0.0) * count) * scale
    if other_products is not None:
        more = tl.load(other_products + i * D + channel, mask=there, other=0.0)
        if LEVELS == 0:
            fade = tl.exp2(tl.load(other_most + i) - highest)
            norm += fade * tl.load(other_sum + i)
            more *= fade
        acc += more
    tl.store(y + i * D + channel, (acc / norm).to(y.dtype.element_ty), mask=there)


# family of GPUs -> tokens that a program takes at once, 16 for each warp. Loads are not pipelined: that costs a third more instructions
# here, and several programs on a multiprocessor hide as much.
SHAPES = dict.fromkeys(("sm_80", "sm_90", "hip"), {"TOKENS": 64, "num_warps": 4, "num_stages": 1}) | {
    "interpreter": {"TOKENS": 16, "num_warps": 4, "num_stages": 1}
}
LEAST_ROWS = {"hip": 16}
# Programs for each multiprocessor that tokens are split for; tokens of a part at least.
WANTED, LEAST_TOKENS, MOST_PARTS = 6, 256, 64
OPTIONS = {"enable_fp_fusion": True}
EXACT = {"enable_fp_fusion": False}  # codes are those of the formula, which rounds each product


def launch_options(
    family: str, *, channels: int, group: int, bits: int, rotary_dim: int = 0, interleaved: bool = False
) -> dict:
    """What is compiled into `decode_kernel` for heads of `channels` channels and `group` query heads to one KV head."""
    rows = max(LEAST_ROWS.get(family, 8), triton.next_power_of_2(group))
    half = max(16, triton.next_power_of_2(channels // 2))
    how = {"PRECISION": "ieee" if family == "hip" else "tf32x3", "USE_ASM": family.startswith("sm_")}
    what = {"D": channels, "GROUP": group, "BITS": bits, "R": rotary_dim, "INTERLEAVED": interleaved}
    return {**what, "ROWS": rows, "HALF": half, **how, **SHAPES[family]}


def kv_append(kv: PlanarKV, keys: Tensor, values: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> None:
    """`lowbit.kv_planar.append` on a GPU, in one launch."""
    B, H, T, D = keys.shape
    grid, held = kv.grid, kv.length
    kv.reserve(held + T)
    kv.length += T
    keys, values = (t if t.stride(3) == 1 else t.contiguous() for t in (keys, values))
    if cos is not None:
        cos, sin = (t if t.stride(2) == 1 else t.contiguous() for t in (cos, sin))
    tokens = min(16, triton.next_power_of_2(max(T, 1)))
    if keys.numel() == 0:
        return
    with torch.cuda.device_of(keys):
        append_kernel[(triton.cdiv(T, tokens), B * H, 2)](
            keys, values, grid.key_scale, grid.key_zero, grid.value_scale, grid.value_zero, cos, sin,
            *_two(kv.keys), *_two(kv.values), T, held, kv.capacity, H, *keys.stride()[:3], *values.stride()[:3],
            *_angle_strides(cos, sin), D=D, R=grid.rotary_dim, BITS=grid.bits, INTERLEAVED=grid.rotary == "interleaved",
            HALF=max(16, triton.next_power_of_2(D // 2)), TOKENS=tokens, num_warps=1 if tokens == 1 else 4, **EXACT,
        )  # fmt: skip


def attention_decode(
    query: Tensor,
    kv: PlanarKV,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    softmax_bits: int = UNQUANTIZED_BITS,
    spared: Spared | None = None,
    parts: int | None = None,
) -> Tensor:
    """`lowbit.kv_planar.attention_decode` on a GPU. parts: of the tokens, a power of two; None: as many as fill the GPU.

    Products are of float16 codes (of float32 ones where the query is float32) and sums are float32; turned keys are rounded to the dtype
    of the query.
    """
    B, query_heads, D = query.shape
    grid, H = kv.grid, kv.keys[0].shape[1]
    scaling = D**-0.5 if scaling is None else scaling
    options = launch_options(
        _family(query.device), channels=D, group=query_heads // H, bits=grid.bits, rotary_dim=grid.rotary_dim,
        interleaved=grid.rotary == "interleaved",
    )  # fmt: skip
    parts = parts or _parts(B * H, kv.length, query.device)
    per = triton.cdiv(triton.cdiv(kv.length, parts), options["TOKENS"]) * options["TOKENS"]
    query = query.contiguous()
    sinks = None if spared is None else _scores_of_sinks(query, spared, H, scaling, mask, softcap)
    visible = mask if spared is None else _without_sinks(mask, spared, B, kv.length)
    visible = None if visible is None else visible.contiguous().view(torch.uint8)
    products = torch.empty(B, query_heads, parts, D, device=query.device)
    most, sums = (torch.empty(B, query_heads, parts, device=query.device) for _ in range(2))

    def launch(phase, known, levels):
        decode_kernel[(H, parts, B)](
            query, grid.key_scale, grid.key_zero, cos, sin, visible, *_two(kv.keys), *_two(kv.values), *known, products,
            most, sums, kv.length, per, kv.capacity, scaling, softcap, *_angle_strides(cos, sin),
            0 if visible is None else visible.stride(0), H=H, PHASE=phase.value, LEVELS=levels, **options, **OPTIONS,
        )  # fmt: skip

    y, levels, others = torch.empty_like(query), 0, (None, None, None)
    with torch.cuda.device_of(query):
        if softmax_bits == UNQUANTIZED_BITS:
            launch(ALL, (None, None), 0)
            if sinks is not None:
                others = _weighed(sinks, spared.values, sinks.amax(-1).clamp(min=LOWEST.value))
        else:
            levels = 2**softmax_bits - 1
            launch(SUMS, (None, None), 0)
            high, total = _joined(most, sums, sinks)
            launch(PRODUCTS, (high, total), levels)
            if sinks is not None:
                others = _weighed(sinks, spared.values, high, levels / total)
        join_kernel[(B * query_heads,)](
            products, most, sums, grid.value_scale, grid.value_zero, *others, y, GROUP=query_heads // H, H=H, D=D,
            PARTS=parts, LEVELS=levels, WIDE=triton.next_power_of_2(D), num_warps=4, **OPTIONS,
        )  # fmt: skip
    return y


def _two(planes: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    return planes if len(planes) == 2 else (planes[0], None)


def _angle_strides(cos: Tensor | None, sin: Tensor | None) -> tuple[int, int]:
    """Strides of batch (0 where one row serves all) and token; ValueError where the tables differ in theirs."""
    if cos is None:
        return 0, 0
    if cos.stride() != sin.stride():
        raise ValueError(f"cos has strides {cos.stride()}, sin {sin.stride()}; call .contiguous() on both")
    return (0 if cos.shape[0] == 1 else cos.stride(0)), cos.stride(1)


def _parts(programs: int, tokens: int, device: torch.device) -> int:
    """A power of two, so that few kernels are compiled."""
    processors = 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
    wanted = min(WANTED * processors // programs, tokens // LEAST_TOKENS, MOST_PARTS)
    return 1 << max(wanted, 1).bit_length() - 1


def _scores_of_sinks(query, spared: Spared, heads: int, scaling: float, mask, softcap) -> Tensor:
    """Scores (log 2) float32 [B, H, group, N] of the few tokens that are kept in full precision, -inf where a row has none."""
    q = query.float().unflatten(1, (heads, -1))  # [B, Hq, D] -> [B, H, group, D]
    scores = q @ spared.keys.float().transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    seen = spared.rows if mask is None else spared.rows & mask[:, spared.at]  # [B, N]
    return (scores * LOG2E.value).masked_fill(~seen[:, None, None], -torch.inf)


def _without_sinks(mask: Tensor | None, spared: Spared, batch: int, tokens: int) -> Tensor:
    """The mask bool [B, T] without the tokens that are kept in full precision."""
    visible = spared.rows.new_ones(batch, tokens) if mask is None else mask.clone()
    visible[:, spared.at] &= ~spared.rows
    return visible


def _joined(most: Tensor, sums: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest score and the sum of all parts and sinks: [B, Hq, parts] -> [B, Hq]."""
    if sinks is not None:
        high = sinks.flatten(1, 2).amax(-1, keepdim=True).clamp(min=LOWEST.value)  # [B, H, group, N] -> [B, Hq, 1]
        sums = torch.cat([sums, (sinks.flatten(1, 2) - high).exp2().sum(-1, keepdim=True)], -1)
        most = torch.cat([most, high], -1)
    high = most.amax(-1)
    return high, ((most - high[..., None]).exp2() * sums).sum(-1)


def _weighed(sinks: Tensor, values: Tensor, high: Tensor, levels: Tensor | None = None) -> tuple[Tensor, ...]:
    """(products [B, Hq, D], most [B, Hq], sum [B, Hq]) of the sinks; levels: whole numbers of these, rounded."""
    high = high.view(sinks.shape[:3])  # [B, Hq] -> [B, H, group]
    p = (sinks - high[..., None]).exp2()
    p = p if levels is None else (p * levels.view(high.shape)[..., None]).round()
    return tuple(t.flatten(1, 2).contiguous() for t in (p @ values.float(), high, p.sum(-1)))
