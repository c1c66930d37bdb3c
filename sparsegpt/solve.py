"""GPTQ's column sweep (arXiv 2210.17323, Alg. 1) driven by V instead of the Cholesky factor of H^-1.

With D = W - W_hat, tr(D H D^T) = ||D V||_F^2, and U = V^-1 is the factor that GPTQ uses. A block of columns starts from
W + (D_before V_before,block) inv(V_block), which reads only finished columns, and inside the block the usual
right-looking update runs: e = w - quant(w), W1[:, i:] -= e (x) U[i, i:] / U_ii.
"""

import torch
from torch import Tensor

from sparsegpt.factor import Factor
from sparsegpt.grid import WeightGrid, dequantize, fit_grid, group_index
from sparsegpt.solution import Solution, by_step, energy, relative

# Columns that see each other's error at once; those further right in the block get one matrix product per SPAN columns.
SPAN = 16
# The reference of the relative error costs as much as the sweep's own products; above twice this many rows, every n-th will do.
REFERENCE_ROWS = 1024


def solve(
    W: Tensor,
    factor: Factor,
    *,
    sizes: Tensor,
    bits: int,
    update_block: int = 128,
    scale_dtype: torch.dtype = torch.float16,
) -> Solution:
    """Quantize W float [R, C] column by column in factor.order, each column absorbing the error of those before it.

    sizes: int64 [G], contiguous column groups with one grid per row, all fitted to W before the sweep. bits: 2..8. Rows
    do not interact, so weights that share an input may be stacked along R. Arithmetic is float32 whatever W is.
    A dead channel is rounded to nearest: it takes no error from the others and gives them none.
    Raises ValueError for W that is not a finite matrix of factor's width, bits outside 2..8, bad sizes or update_block.
    """
    if update_block < 1:
        raise ValueError(f"update_block must be at least 1, got {update_block}")
    grid = fit_grid(W, sizes, bits, scale_dtype=scale_dtype)
    R, C = W.shape
    if C != factor.order.numel():
        raise ValueError(f"W has {C} columns, the factor {factor.order.numel()}: both must read one input")
    columns = by_step(W, factor)  # [C, R], turns from W into D = W - W_hat block by block
    sampled = slice(None, None, max(1, R // REFERENCE_ROWS))
    reference = energy(columns[:, sampled], factor)
    codes = torch.empty(C, R, dtype=torch.uint8, device=W.device)
    loss = torch.zeros(R, dtype=torch.float64, device=W.device)
    for start in range(0, C, update_block):
        loss += _solve_block(columns, codes, slice(start, min(start + update_block, C)), factor, grid)
    del columns
    codes = codes[torch.argsort(factor.order)].t().contiguous()  # [C, R] by step -> [R, C] by channel
    error = relative(loss[sampled].sum().item(), reference)
    return Solution(codes, grid, dequantize(codes, grid), loss.sum().item(), error)


def _solve_block(columns: Tensor, codes: Tensor, block: slice, factor: Factor, grid: WeightGrid) -> Tensor:
    """Finish one block of `columns` and `codes` in place; return each row's share of ||D V||_F^2, float64 [R]."""
    V = factor.V[block, block]
    U = torch.linalg.solve_triangular(V, torch.eye(V.shape[0], dtype=V.dtype, device=V.device), upper=True)
    channels = factor.order[block]
    group = group_index(grid.sizes, factor.order.numel())[channels]
    scale = grid.scale.t()[group].float()  # [block, R]
    zero = grid.zero.t()[group]  # [block, R]

    carried = factor.V[: block.start, block].t() @ columns[: block.start]  # [block, R]
    W1 = torch.addmm(columns[block], U.t(), carried)
    # Row i of U over U_ii, without the diagonal: what one unit of error in column i moves in the columns after it.
    steps = (U / U.diagonal()[:, None]).triu_(1)
    levels, errors = _sweep(W1, steps, scale, -zero, 2**grid.bits - 1 - zero)

    codes[block] = levels + zero
    columns[block] -= levels.mul_(scale)
    weight = V.diagonal().double().square() * ~factor.dead[channels]
    return weight @ errors.square_().double()


def _sweep(W1: Tensor, steps: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Round the rows of W1 [block, R] in turn, passing errors on; W1 is used up.

    Returns levels (code - zero) and errors (compensated weight - rounded weight), both [block, R].
    """
    levels, errors = torch.empty_like(W1), torch.empty_like(W1)
    for start in range(0, W1.shape[0], SPAN):
        stop = min(start + SPAN, W1.shape[0])
        span = W1[start:stop]
        # unbind makes every row view in one call; `step` is zero up to its own column, so the update needs no slicing.
        rows = [tensor[start:stop].unbind(0) for tensor in (W1, scale, low, high, levels, errors)]
        for w, s, lo, hi, level, error, step in zip(*rows, steps[start:stop, start:stop].unbind(0), strict=True):
            torch.div(w, s, out=level)
            torch.clamp(level.round_(), lo, hi, out=level)
            torch.addcmul(w, level, s, value=-1, out=error)
            span.addr_(step, error, alpha=-1)
        W1[stop:].addmm_(steps[start:stop, stop:].t(), errors[start:stop], alpha=-1)
    return levels, errors
