"""The column sweep in Triton: one program owns a few rows of W and keeps a whole block of their columns in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lowbit.sweep_reference import sweep_reference

# Steps that one program holds, and rows of W beside each other: 64 registers a thread for one warp, which needs no barrier.
BLOCK_STEPS = 128
BLOCK_ROWS = 16
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}
# A group's choice is one bit for each of its steps.
LONGEST_GROUP = 32


@triton.jit
def _choose(w, mask, score, row, first, b, R, n, GROUP: tl.constexpr, LANES: tl.constexpr):
    """Bit j is set where step first + j is kept; int32 [rows]. Scores are compared by their bits: NaN is the largest."""
    step = tl.arange(0, w.shape[0])[:, None]
    j = tl.arange(0, LANES)[:, None]  # the group's steps, to a power of two
    size = tl.minimum(GROUP, b - first)
    alive = (j < size) & (row < R)[None, :]  # [LANES, rows]
    factor = tl.load(score + first + j, mask=j < size, other=0.0)
    if mask is not None:
        at = (first + j).to(tl.int64) * R + row[None, :]
        alive = alive & (tl.load(mask + at, mask=alive, other=0) != 0)
    group = tl.zeros(alive.shape, tl.float32)
    for k in range(0, size):
        group = tl.where(j == k, tl.sum(tl.where(step == first + k, w, 0.0), axis=0)[None, :], group)
    rank = (group * group * factor).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    rank = tl.where(alive, rank, -1)
    before = tl.zeros(alive.shape, tl.int32)  # how many steps of the group go before this one
    for k in range(0, size):
        other = tl.sum(tl.where(j == k, rank, 0), axis=0)[None, :]  # [1, rows]
        before += ((other > rank) | ((other == rank) & (k > j))).to(tl.int32)
    chosen = alive & (before < (n * size + GROUP - 1) // GROUP)
    return tl.sum(tl.where(chosen, 1 << j, 0), axis=0)


@triton.jit
def sweep_kernel(
    W1, steps, mask, score, scale, low, high, values, kept, b, R, steps_stride, n,
    GROUP: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """All steps of a block for ROWS rows of W; errors take the place of W1.

    GROUP is the m of n:m, 0 without it, LANES the power of two that holds it.
    """
    step = tl.arange(0, STEPS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < R
    at = row.to(tl.int64)  # of step i
    tile = step.to(tl.int64)[:, None] * R + at[None, :]  # [STEPS, ROWS]
    w = tl.load(W1 + tile, mask=(step < b)[:, None] & there[None, :], other=0.0)
    chosen = tl.zeros([ROWS], tl.int32)
    for i in range(0, b):
        if GROUP > 0:
            if i % GROUP == 0:
                chosen = _choose(w, mask, score, row, i, b, R, n, GROUP, LANES)
        now = tl.sum(tl.where(step[:, None] == i, w, 0.0), axis=0)  # [ROWS]
        value = now
        if scale is not None:
            s = tl.load(scale + at, mask=there, other=1.0)
            level = tl.div_rn(now, s)
            # Adding 1.5 * 2^23 leaves no bits for a fraction: the sum is rounded half to even.
            level = tl.where(tl.abs(level) < 4194304.0, (level + 12582912.0) - 12582912.0, level)
            floor = tl.load(low + at, mask=there, other=0.0)
            ceiling = tl.load(high + at, mask=there, other=0.0)
            level = tl.where(level < floor, floor, level)  # NaN fails both comparisons and stays
            value = tl.where(level > ceiling, ceiling, level)
        if GROUP > 0:
            keeps = ((chosen >> (i % GROUP)) & 1) != 0
            tl.store(kept + at, keeps.to(tl.uint8), mask=there)
            value = tl.where(keeps, value, 0.0)
        elif mask is not None:
            value = tl.where(tl.load(mask + at, mask=there, other=0) != 0, value, 0.0)
        error = now - value
        if scale is not None:
            error = now - value * s
        tl.store(values + at, value + 0.0, mask=there)  # -0 + 0 is +0
        tl.store(W1 + at, error, mask=there)
        u = tl.load(steps + i * steps_stride + step, mask=(step > i) & (step < b), other=0.0)
        w -= u[:, None] * error[None, :]
        at += R


def sweep(
    W1: torch.Tensor,
    steps: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    keep: tuple[int, int] | None = None,
    score: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    low: torch.Tensor | None = None,
    high: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """`lowbit.sweep` for checked, contiguous tensors on a GPU, one launch for every 128 steps; the errors take W1's place.

    Groups of more than 32 go through the PyTorch loop.
    """
    n, m = keep or (0, 0)
    if m > LONGEST_GROUP:
        return sweep_reference(W1, steps, mask=mask, keep=keep, score=score, scale=scale, low=low, high=high)
    values = torch.empty_like(W1)
    kept = torch.empty_like(W1, dtype=torch.bool) if keep else None if mask is None else mask.clone()
    span = BLOCK_STEPS // m * m if keep else BLOCK_STEPS
    for start in range(0, W1.shape[0] if W1.numel() else 0, span):
        stop = min(start + span, W1.shape[0])
        part = slice(start, stop)
        grid = [None if t is None else t[part] for t in (scale, low, high)]
        marks = [None if t is None else t[part].view(torch.uint8) for t in (mask, kept if keep else None)]
        _launch(
            W1[part], steps[part, part], marks[0], score[part] if keep else None, grid[0], grid[1], grid[2],
            values[part], marks[1], n, m,
        )  # fmt: skip
        W1[stop:].addmm_(steps[part, stop:].t(), W1[part], alpha=-1)
    return values, kept, W1


def _launch(W1, steps, mask, score, scale, low, high, values, kept, n, m):
    b, R = W1.shape
    sizes = {"GROUP": m, "LANES": triton.next_power_of_2(max(m, 2)), "STEPS": max(16, triton.next_power_of_2(b))}
    with torch.cuda.device_of(W1):
        sweep_kernel[(triton.cdiv(R, BLOCK_ROWS),)](
            W1, steps, mask, score, scale, low, high, values, kept, b, R, steps.stride(0), n,
            **sizes, ROWS=BLOCK_ROWS, **OPTIONS,
        )  # fmt: skip
