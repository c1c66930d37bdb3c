"""The integer linear over the planar layout (`lowbit.planar`) in Triton: int8 activations, weights of 8, 4, 3 or 2 bits.

The weights are the left operand, so that few tokens are the narrow side of a tensor core's tile. One flat loop runs over units of 128
channels. A code stays in the top bits of its byte, v * 2^(8 - bits): unpacking needs no subtraction and no sign extension, and the power
of two is divided out once, at the end. Each tile's whole-number dot product is scaled and added in float32.

For few tokens one warp owns 16 rows and nothing goes through shared memory: a product does not mind the order of its channels, so a
thread's 16 consecutive bytes are declared to be the channels that the tensor core wants of it. For more tokens the operands of a larger
tile are pipelined through shared memory. Where K is split, each part writes its own sums and a second kernel adds them in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

UNIT = tl.constexpr(128)
# With 1.5 * 2^23 as its first summand a sum of up to 2^22 in size has the bits of the float32 that is 1.5 * 2^23 larger.
MAGIC_BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(12582912.0)
# Grids of so many tiles at once are multiplied with the corrections of zero points.
CORRECTED = tl.constexpr(16)

# $0, $1: four channels each of the unit's even and odd tile, in the top bits of their bytes; $2: four bytes of the plane.
FOUR_BITS = tl.constexpr("{ .reg .b32 t; shl.b32 t, $2, 4; and.b32 $0, t, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0; }")
# $3: four bytes of the sign plane; $4, $5: how far to turn the planes to the left, so that the odd tile is in bits 5 to 7.
THREE_BITS = tl.constexpr(
    "{ .reg .b32 t, s; shf.l.wrap.b32 t, $2, $2, $4; shf.l.wrap.b32 s, $3, $3, $5; lop3.b32 t, t, s, 0x66666666, 0xE4;"
    " and.b32 $1, t, 0xE0E0E0E0; shl.b32 t, t, 4; and.b32 $0, t, 0xE0E0E0E0; }"
)
# $3: how far to turn the plane to the left, so that the odd tile is in bits 6 and 7.
TWO_BITS = tl.constexpr(
    "{ .reg .b32 t; shf.l.wrap.b32 t, $2, $2, $3; and.b32 $1, t, 0xC0C0C0C0; shl.b32 t, t, 4; and.b32 $0, t, 0xC0C0C0C0; }"
)


@triton.jit
def _four_bits(p, USE_ASM: tl.constexpr):
    if USE_ASM:
        return tl.inline_asm_elementwise(FOUR_BITS, "=r,=r,r", [p], (tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        wide = p.to(tl.int32)
        return (wide << 4).to(tl.int8), (wide & 0xF0).to(tl.int8)


@triton.jit
def _three_bits(p, s, channel, USE_ASM: tl.constexpr):
    """p, s: bytes channel % 32 of the two-bit plane and channel % 16 of the sign plane, channel in 0..63 [1, 64]."""
    if USE_ASM:
        turns = tl.broadcast_to(tl.where(channel < 32, 1, 31).to(tl.int8), p.shape)
        sign_turns = tl.broadcast_to((3 - channel // 16).to(tl.int8), p.shape)
        return tl.inline_asm_elementwise(
            THREE_BITS, "=r,=r,r,r,r,r", [p, s, turns, sign_turns], (tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        low = p.to(tl.int32) >> (channel // 32 * 2)
        sign = s.to(tl.int32) >> (channel // 16)
        even = ((sign & 1) << 7) | ((low & 3) << 5)
        odd = ((sign >> 4 & 1) << 7) | ((low >> 4 & 3) << 5)
        return even.to(tl.int8), odd.to(tl.int8)


@triton.jit
def _two_bits(p, channel, USE_ASM: tl.constexpr):
    if USE_ASM:
        turns = tl.broadcast_to(tl.where(channel < 32, 2, 0).to(tl.int8), p.shape)
        return tl.inline_asm_elementwise(TWO_BITS, "=r,=r,r,r", [p, turns], (tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        low = p.to(tl.int32) >> (channel // 32 * 2)
        return ((low & 3) << 6).to(tl.int8), ((low >> 4 & 3) << 6).to(tl.int8)


@triton.jit
def _in_order(x, DIRECT: tl.constexpr):
    """The 64 channels of x [n, 64] in the order in which a thread that holds 16 consecutive ones feeds them to two products of 32."""
    if DIRECT:
        y = tl.permute(tl.reshape(x, [x.shape[0], 4, 4, 4]), [0, 2, 1, 3])  # [n, thread, word, byte] -> [n, word, ...]
        return tl.reshape(y, [x.shape[0], 64])
    else:
        return x


@triton.jit
def _offsets(row, column, stride):
    """Unsigned, so that they are added to a pointer that all threads share."""
    return (row[:, None] * stride + column[None, :]).to(tl.uint32).to(tl.uint64)


@triton.jit
def _scaled(acc, dots, scale, step, MAGICAL: tl.constexpr, BRIEF: tl.constexpr):
    """acc + scale * step * dots [rows, tokens]; dots start at MAGIC_BITS where MAGICAL."""
    if MAGICAL:
        value = dots.to(tl.float32, bitcast=True)
        if step is None:
            value = value - MAGIC
        elif BRIEF:  # MAGIC * step has no rounding error, and the sum has at most one
            value = tl.fma(value, step[None, :], (step * -MAGIC)[None, :])
        else:
            value = (value - MAGIC) * step[None, :]
    else:
        value = dots.to(tl.float32)
        if step is not None:
            value = value * step[None, :]
    return tl.fma(value, scale[:, None], acc)


@triton.jit
def _grids(scale, step, to_step, at_row, at_token):
    if step is None:
        return tl.load(scale + at_row), None
    else:
        return tl.load(scale + at_row), tl.load(step + to_step + at_token)


@triton.jit
def _corrections(acc, grid, grid_row, N, part, part_token, part_stride, first, last, factor, PRECISION: tl.constexpr):
    """acc + factor * grid[first:last]^T part[first:last]: grid [G, N], part [G, tokens]."""
    for g in tl.range(first, last, CORRECTED, num_stages=1):
        tile = (g + tl.arange(0, CORRECTED)).to(tl.int64)
        of_rows = tl.load(grid + grid_row[:, None] + tile[None, :] * N, mask=(tile < last)[None, :], other=0.0)
        at = part + part_token[None, :] + tile[:, None] * part_stride
        of_tokens = tl.load(at, mask=(tile < last)[:, None], other=0.0)
        acc = tl.dot(of_rows * factor, of_tokens, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _broken(part, part_token, part_stride, first, last):
    """0 [tokens], NaN where part [G, tokens] has one."""
    sums = part_token.to(tl.float32) * 0.0
    for g in tl.range(first, last, CORRECTED, num_stages=1):
        tile = (g + tl.arange(0, CORRECTED)).to(tl.int64)
        at = part + part_token[None, :] + tile[:, None] * part_stride
        values = tl.load(at, mask=(tile < last)[:, None], other=0.0)
        sums += tl.sum(tl.where(values == values, 0.0, values), axis=0)
    return sums


@triton.jit
def linear_kernel(
    a, step, shift, count, plane, signs, scale, zero, total, bias, y, M, grid_stride, per, N: tl.constexpr, units: tl.constexpr,
    PER: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, NARROW: tl.constexpr, BRIEF: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, DIRECT: tl.constexpr, MAGICAL: tl.constexpr,
    PRECISION: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """BN rows times BM tokens of y [parts, M, N] over one part of K, `per` of its units; PER is the same or 0.

    step, shift, count: [G, tokens], tokens contiguous and at least all of the last block's. NARROW: fewer rows than BN.
    """
    PER_TILE: tl.constexpr = UNIT // TILE if TILE else 0
    BYTES: tl.constexpr = 128 if BITS == 8 else 64 if BITS == 4 else 32  # of a unit of the plane
    UP: tl.constexpr = 2 ** (8 - BITS)
    start = tl.program_id(0) * BN
    if NARROW:
        row = tl.minimum(tl.arange(0, BN), N - 1)
    else:
        start = tl.minimum(start, N - BN)  # the last rows twice rather than a mask in the loop
        row = tl.arange(0, BN)
    token = tl.arange(0, BM)
    first_token = tl.program_id(1).to(tl.int64) * BM
    part = tl.program_id(2)
    if PER:  # addresses become constants; in a larger tile ptxas would unroll the whole loop
        first, last = part * PER, tl.minimum(part * PER + PER, units)
    else:
        first, last = part * per, tl.minimum(part * per + per, units)

    n0 = start.to(tl.int64)
    acc = tl.zeros([BN, BM], tl.float32)
    if TILE == 0:  # the only tile belongs to the first part
        g0, g1 = tl.minimum(part, 1), 1
    else:
        g0, g1 = first * PER_TILE, last * PER_TILE
    if zero is not None:
        acc = _corrections(acc, zero + n0, row, N, count + first_token, token, grid_stride, g0, g1, -UP, PRECISION)
    elif step is None:
        acc += _broken(count + first_token, token, grid_stride, g0, g1)[None, :]
    if shift is not None:
        acc = _corrections(acc, total + n0, row, N, shift + first_token, token, grid_stride, g0, g1, UP, PRECISION)

    channel = tl.arange(0, 64)
    plane_stride = units * BYTES
    at_plane = _offsets(row, channel if BITS >= 4 else channel % 32, plane_stride)
    plane += n0 * plane_stride
    if BITS == 3:
        at_signs = _offsets(row, channel % 16, units * 16)
        signs += n0 * units * 16
    at_a = _offsets(token, channel, units * UNIT)
    a += first_token * (units * UNIT)
    at_row, at_token = row.to(tl.uint32).to(tl.uint64), token.to(tl.uint32).to(tl.uint64)
    scale += n0
    if step is not None:
        step += first_token
    nothing = tl.full([BN, BM], MAGIC_BITS if MAGICAL else 0, tl.int32)
    dots = nothing
    for u in tl.range(first, last, num_stages=STAGES, loop_unroll_factor=2 if DIRECT else 1):
        w = plane + u * BYTES
        codes = tl.load(w + at_plane)
        if BITS == 8:
            even, odd = codes, tl.load(w + 64 + at_plane)
        elif BITS == 4:
            even, odd = _four_bits(codes, USE_ASM)
        elif BITS == 3:
            even, odd = _three_bits(codes, tl.load(signs + u * 16 + at_signs), channel[None, :], USE_ASM)
        else:
            even, odd = _two_bits(codes, channel[None, :], USE_ASM)
        x = _in_order(tl.load(a + u * UNIT + at_a), DIRECT)
        other_x = _in_order(tl.load(a + u * UNIT + 64 + at_a), DIRECT)
        even, odd = _in_order(even, DIRECT), _in_order(odd, DIRECT)
        x, other_x = tl.trans(x), tl.trans(other_x)
        if TILE == 0:
            dots = tl.dot(even, x, dots, out_dtype=tl.int32)
            dots = tl.dot(odd, other_x, dots, out_dtype=tl.int32)
        else:
            g = tl.cast(u * PER_TILE, tl.int64)
            products = tl.dot(even, x, nothing, out_dtype=tl.int32)
            scales, steps = _grids(scale + g * N, step, g * grid_stride, at_row, at_token)
            if TILE == 128:
                products = tl.dot(odd, other_x, products, out_dtype=tl.int32)
            else:
                other_products = tl.dot(odd, other_x, nothing, out_dtype=tl.int32)
                other_scales, other_steps = _grids(scale + g * N + N, step, (g + 1) * grid_stride, at_row, at_token)
            acc = _scaled(acc, products, scales, steps, MAGICAL, BRIEF)
            if TILE == 64:
                acc = _scaled(acc, other_products, other_scales, other_steps, MAGICAL, BRIEF)
    if TILE == 0:
        scales, steps = _grids(scale, step, 0, at_row, at_token)
        acc = _scaled(acc, dots, scales, steps, MAGICAL, BRIEF)

    acc *= 1.0 / UP
    if bias is not None:
        acc += tl.load(bias + n0 + row)[:, None]
    inside = (first_token + token < M)[None, :]
    if NARROW:
        inside = inside & (tl.arange(0, BN) < N)[:, None]
    at_y = (part.to(tl.int64) * M + first_token + token)[None, :] * N + n0 + row[:, None]
    tl.store(y + at_y, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def sum_kernel(parts, bias, y, size, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = bias + parts[0, i] + parts[1, i] + ..., in this order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    acc = tl.zeros([BLOCK], tl.float32)
    for s in range(SPLIT):
        acc += tl.load(parts + s * size + at, mask=inside, other=0.0)
    if bias is not None:
        acc += tl.load(bias + at % N, mask=inside, other=0.0)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


# family of GPUs -> (most tokens, tile, threads and how the main loop is fed), the first that fits. One warp of `DIRECT` owns 16 rows.
FEW = {"BN": 16, "num_warps": 1, "num_stages": 1, "STAGES": 1, "DIRECT": True}
SOME = {"BN": 64, "num_warps": 4, "num_stages": 3, "STAGES": 3, "DIRECT": False}
MANY = {"BN": 128, "num_warps": 8, "num_stages": 2, "STAGES": 2, "DIRECT": False}
NVIDIA = (
    (8, {"BM": 8, **FEW}),
    (16, {"BM": 16, **FEW}),
    (32, {"BM": 32, **SOME}),
    (256, {"BM": 64, **SOME}),
    (None, {"BM": 64, **MANY}),
)
AMD = (
    (16, {"BM": 16, **SOME, "num_stages": 2, "STAGES": 2}),
    (64, {"BM": 64, **SOME, "num_stages": 2, "STAGES": 2}),
    (None, {"BM": 64, **MANY}),
)
# More of a tile fits into a warp's registers where one sum is scaled at the end.
ONE_GRID = {"num_warps": 4}
SHAPES = {"sm_80": NVIDIA, "sm_90": NVIDIA, "hip": AMD, "interpreter": NVIDIA}
# Programs for each multiprocessor that K is split for: one warp hides little of the memory's latency alone.
WANTED = {True: 16, False: 2}
LEAST_UNITS, MOST_PARTS, SUMMED = 4, 16, 1024
OPTIONS = {"enable_fp_fusion": True}


def planar_linear(
    a: Tensor,
    step: Tensor | None,
    shift: Tensor | None,
    count: Tensor,
    planes: tuple[Tensor, ...],
    scale: Tensor,
    zero: Tensor | None = None,
    total: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    brief: bool = False,
    parts: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y[t, r] = bias[r] + sum_g step[t, g] scale[g, r] (a . v)_g - zero[g, r] count[t, g] + shift[t, g] total[g, r].

    G is Kp / 64, Kp / 128 or 1: so many grids does K have. `lowbit.triton.quantize` lays a, step, shift and count out as they are read
    here; anything else is copied first. A token with NaN in count has NaN everywhere.

    Args:
        a: int8 [T, Kp], Kp a multiple of 128.
        step: float32 [T, G], or [1, G] for every token; None where it is folded into scale.
        shift: float32 like step, None where it is 0 or folded into the bias.
        count: float32 [T, G].
        planes: the planes of `lowbit.planar.PlanarWeight`.
        scale, zero, total: float32 [G, R]; zero is None for symmetric weights, total is read with shift only.
        bias: float32 [R].
        bits: 8, 4, 3 or 2, of the weights.
        brief: every step is a bfloat16 (those of `quantize_tiles` are); saves an instruction for each product.
        parts: of K, summed in a fixed order; None: as many as fill the GPU.

    Returns:
        `dtype` [T, R].

    Raises:
        ValueError: another number of grids, or channels that are not whole units.
    """
    T, Kp = a.shape
    G, R = scale.shape
    units = Kp // UNIT.value
    if Kp % UNIT.value or G not in (2 * units, units, 1):
        raise ValueError(
            f"{G} grids of {Kp} channels: pad channels to whole units of 128, with a grid for 64, 128 or all"
        )
    y = torch.empty(T, R, dtype=dtype, device=a.device)
    if y.numel() == 0:
        return y
    tile = {2 * units: 64, units: 128}.get(G, 0)
    options = launch_options(_family(a.device), T, bits=bits, tile=tile, stepped=step is not None, brief=brief)
    programs = triton.cdiv(R, options["BN"]), triton.cdiv(T, options["BM"])
    parts = parts or _parts(programs[0] * programs[1], units, options["DIRECT"], a.device)
    per = triton.cdiv(units, parts)
    sums = y if parts == 1 else torch.empty(parts, T, R, device=a.device)
    grids = [None if t is None else _by_grid(t, T) for t in (step, shift, count)]
    inputs = _whole_blocks(a), *grids, planes[0], planes[1] if bits == 3 else None, scale, zero, total
    with torch.cuda.device_of(a):
        linear_kernel[(*programs, parts)](
            *inputs, bias if parts == 1 else None, sums, T, padded_tokens(T), per, R, units,
            PER=per if options["DIRECT"] else 0, NARROW=options["BN"] > R, **options, **OPTIONS,
        )  # fmt: skip
        if parts > 1:
            sum_kernel[(triton.cdiv(T * R, SUMMED),)](sums, bias, y, T * R, R, SPLIT=parts, BLOCK=SUMMED)
    return y


def launch_options(family: str, T: int, *, bits: int, tile: int, stepped: bool, brief: bool) -> dict[str, Any]:
    """What is compiled into `linear_kernel` for T tokens, but for the layer's shape.

    Args:
        family: a key of SHAPES, or "interpreter".
        tile: channels that share a grid, 64 or 128, 0 for all.
        stepped: there are steps to multiply with; brief: they are bfloat16.
    """
    shape = next(shape for most, shape in SHAPES[family] if most is None or T <= most)
    shape = shape | ONE_GRID if tile == 0 and shape["BN"] == MANY["BN"] else shape
    # Whole numbers are converted slowly on sm_80; elsewhere the detour pays only where it saves a multiplication.
    magical = tile > 0 and (family != "sm_90" or (shape["DIRECT"] and brief and stepped))
    precision = "ieee" if family == "hip" else "tf32x3"
    how = {"MAGICAL": magical, "PRECISION": precision, "USE_ASM": family.startswith("sm_")}
    return {"BITS": bits, "TILE": tile, "BRIEF": brief, **how, **shape}


def padded_tokens(T: int) -> int:
    """Tokens for which activations and their grids have memory: whole blocks of any kernel."""
    return max(16, triton.next_power_of_2(T)) if T <= 64 else triton.cdiv(T, 64) * 64


def _whole_blocks(a: Tensor) -> Tensor:
    """a [T, Kp], with memory behind it for the tokens that fill the last block."""
    wanted = padded_tokens(a.shape[0])
    if a.is_contiguous() and a.untyped_storage().nbytes() - a.storage_offset() >= wanted * a.shape[1]:
        return a
    return F.pad(a, (0, 0, 0, wanted - a.shape[0])).contiguous()


def _by_grid(t: Tensor, T: int) -> Tensor:
    """[T, G] or [1, G] -> [G, padded tokens] behind the pointer, whatever its shape says."""
    wanted, G = padded_tokens(T), t.shape[1]
    behind = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    if t.shape[0] == T and t.stride() == (1, wanted) and behind >= wanted * G:
        return t
    return F.pad(t.expand(T, G).t(), (0, wanted - T)).contiguous()


def _family(device: torch.device) -> str:
    """A key of SHAPES; tensors on the CPU reach a kernel under Triton's interpreter only."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "hip"
    return "sm_80" if torch.cuda.get_device_capability(device)[0] < 9 else "sm_90"


def _parts(programs: int, units: int, direct: bool, device: torch.device) -> int:
    """A power of two, so that few kernels are compiled."""
    processors = 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
    wanted = min(WANTED[direct] * processors // programs, units // LEAST_UNITS, MOST_PARTS)
    return 1 << max(wanted, 1).bit_length() - 1
