"""GPTQ's and SparseGPT's column sweep (arXiv 2210.17323 and 2301.00774, Alg. 1), driven by V instead of the Cholesky factor of H^-1.

With D = W - W_hat, tr(D H D^T) = ||D V||_F^2, and U = V^-1 is the factor that both papers use. A block of columns starts from
W + (D_before V_before,block) inv(V_block), which reads only finished columns, and inside the block the usual right-looking
update runs: e = w - w_hat, W1[:, i:] -= e (x) U[i, i:] / U_ii. The saliency w^2 / [H^-1]_ii of a weight is w^2 V_ii^2.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsegpt import pattern as patterns
from sparsegpt.factor import Factor
from sparsegpt.grid import WeightGrid, dequantize, fit_grid, group_index
from sparsegpt.pattern import Budget, Pattern
from sparsegpt.solution import Solution, by_step, check_finite, energy, relative
from sparsegpt.sweep import sweep as torch_sweep

# The reference of the relative error costs as much as the sweep's own products; above twice this many rows, every n-th will do.
REFERENCE_ROWS = 256


def solve(
    W: Tensor,
    factor: Factor,
    *,
    pattern: Pattern | None = None,
    mask: Tensor | None = None,
    sizes: Tensor | None = None,
    bits: int | None = None,
    fine: Tensor | None = None,
    clip: bool = False,
    parts: Sequence[int] | None = None,
    update_block: int = 128,
    scale_dtype: torch.dtype = torch.float16,
    sweep: Callable = torch_sweep,
    lowest: Callable = patterns.lowest,
    total: Callable = patterns.alone,
) -> Solution:
    """Prune, quantize, or both in one sweep: W float [R, C] column by column in factor.order, each absorbing the errors before it.

    pattern: choose the mask on the way (SparseGPT). mask: bool [R, C], a mask from elsewhere, False is pruned. Neither: GPTQ.
    bits 2..8 and sizes, int64 [G] contiguous column groups: one grid per row and group, all fitted to W before the sweep. fine: bool
    [R, G], groups of twice the bits. clip: let a grid leave out the ends of its range where that lowers the error weighted
    by diag H.
    parts: rows of the weights stacked in W, each with a pruning budget of its own (by default one weight).
    sweep, lowest: kernels to use in place of `sparsegpt.sweep` and `sparsegpt.lowest`.
    total: where several processes solve the same weights at once, each some of the rows of every part, the sum of a tensor over all
    of them; `lowest` then chooses among the rows of all. Every process must make the same calls.
    Arithmetic is float32 whatever W is. A dead channel takes no error from the others and gives them none; it is rounded to
    nearest, and zeroed where weights are pruned, beside the budget.
    Raises ValueError for W that is not a finite matrix of factor's width, or arguments that do not fit it or each other.
    """
    parts = [W.shape[0]] if parts is None else list(parts)
    _check(W, factor, pattern, mask, sizes, bits, parts, update_block)
    importance = torch.empty_like(factor.V[0]).index_copy(0, factor.order, factor.V.square().sum(1)) if clip else None
    grid = None
    if bits is not None:
        grid = fit_grid(W, sizes, bits, importance=importance, fine=fine, scale_dtype=scale_dtype, total=total)
    R, C = W.shape
    columns = by_step(W, factor)  # [C, R], turns from W into D = W - W_hat block by block
    kept = _given_mask(W, factor, pattern, mask)
    sampled = slice(None, None, max(1, int(total(torch.tensor(R))) // REFERENCE_ROWS))
    reference = energy(columns[:, sampled], factor)
    values = torch.empty(C, R, dtype=torch.uint8 if grid else torch.float32, device=W.device)
    loss = torch.zeros(R, dtype=torch.float64, device=W.device)
    budget = Budget(pattern, parts, lowest, total) if pattern is not None and pattern.sparsity is not None else None
    keep = pattern.keep if pattern is not None else None
    if keep is not None:
        update_block = max(1, update_block // keep[1]) * keep[1]
    for mask_block in _blocks(C, _mask_columns(pattern, C, update_block)):
        W1 = None
        if budget is not None:
            W1, U = _compensated(columns, factor, mask_block)
            _choose(W1, kept, factor, mask_block, budget)
        for block in _blocks(mask_block.stop, update_block, mask_block.start):
            if W1 is None or W1.shape[0] != block.stop - block.start:
                W1, U = _compensated(columns, factor, block)
            loss += _solve_block(W1, U, columns, values, kept, block, factor, grid, keep, sweep)
            W1 = None
    del columns
    losses = torch.tensor([loss.sum(), loss[sampled].sum(), reference], dtype=torch.float64)
    lost, lost_of_sampled, reference = total(losses).tolist()
    by_channel = torch.argsort(factor.order)
    values = values[by_channel].t().contiguous()  # [C, R] by step -> [R, C] by channel
    return Solution(
        weight=dequantize(values, grid) if grid else values,
        mask=None if kept is None else kept[by_channel].t().contiguous(),
        codes=values if grid else None,
        grid=grid,
        loss=lost,
        relative_error=relative(lost_of_sampled, reference),
    )


def _solve_block(
    W1, U, columns, values, kept, block: slice, factor: Factor, grid: WeightGrid | None, keep, sweep
) -> Tensor:
    """Finish one block of `columns`, `values` and `kept` in place; return each row's share of ||D V||_F^2, float64 [R]."""
    V = factor.V[block, block]
    # Row i of U over U_ii, without the diagonal: what one unit of error in column i moves in the columns after it.
    steps = (U / U.diagonal()[:, None]).triu_(1).contiguous()
    score = V.diagonal().square()
    options = {"mask": None if kept is None else kept[block], "keep": keep, "score": None if keep is None else score}
    channels = factor.order[block]
    if grid:
        group = group_index(grid.sizes, factor.order.numel())[channels]
        scale = grid.step.t()[group]  # [block, R]
        zero = grid.zero.t()[group]  # [block, R]
        options |= {"scale": scale, "low": -zero, "high": grid.top.t()[group] - zero}
    final, chosen, errors = sweep(W1, steps, **options)
    if keep is not None:
        kept[block] = chosen
    if grid:
        values[block] = final + zero
        final = final * scale
    else:
        values[block] = final
    columns[block] -= final
    weight = score.double() * ~factor.dead[channels]
    return weight @ errors.square_().double()


def _compensated(columns: Tensor, factor: Factor, block: slice) -> tuple[Tensor, Tensor]:
    """The block's weights after the errors of every column before it, float32 [b, R], and U = inv(V_block), [b, b]."""
    V = factor.V[block, block]
    U = torch.linalg.solve_triangular(V, torch.eye(V.shape[0], dtype=V.dtype, device=V.device), upper=True)
    carried = factor.V[: block.start, block].t() @ columns[: block.start]  # [b, R]
    return torch.addmm(columns[block], U.t(), carried), U


def _choose(W1: Tensor, kept: Tensor, factor: Factor, block: slice, budget: Budget) -> None:
    """Mark in kept[block] the weights of the lowest saliency w^2 / [H^-1]_ii as pruned (arXiv 2301.00774, eq. 3)."""
    saliency = W1.square() * factor.V.diagonal()[block].square()[:, None]
    zeros = ~kept[block] if budget.pattern.preserve else None
    kept[block] = ~budget.choose(saliency, zeros, factor.dead[factor.order[block]])


def _given_mask(W: Tensor, factor: Factor, pattern: Pattern | None, mask: Tensor | None) -> Tensor | None:
    """What is kept before anything was chosen, bool [C, R] by step; None where nothing will be pruned."""
    if pattern is None and mask is None:
        return None
    if mask is not None:
        kept = mask.to(W.device)
    else:
        kept = W != 0 if pattern.preserve else torch.ones_like(W, dtype=torch.bool)
    kept = kept.t().contiguous().index_select(0, factor.order)  # [R, C] -> [C, R] by step
    kept[factor.dead[factor.order]] = False
    return kept


def _mask_columns(pattern: Pattern | None, C: int, update_block: int) -> int:
    if pattern is None or pattern.sparsity is None:
        return update_block
    return C if pattern.scope == "layer" else pattern.block


def _blocks(stop: int, width: int, start: int = 0) -> list[slice]:
    return [slice(i, min(i + width, stop)) for i in range(start, stop, width)]


def _check(W, factor, pattern, mask, sizes, bits, parts, update_block) -> None:
    if W.ndim != 2 or not W.is_floating_point():
        raise ValueError(f"W must be a float matrix [R, C], got {W.dtype} {list(W.shape)}: reshape or cast it")
    check_finite(W)
    if update_block < 1:
        raise ValueError(f"update_block must be at least 1, got {update_block}")
    R, C = W.shape
    if C != factor.order.numel():
        raise ValueError(f"W has {C} columns, the factor {factor.order.numel()}: both must read one input")
    if (bits is None) != (sizes is None):
        raise ValueError(f"bits and sizes go together, got bits {bits} and sizes {sizes}")
    if sum(parts) != R or min(parts, default=0) < 0:
        raise ValueError(f"parts {parts} must add up to the {R} rows of W")
    if mask is not None and (pattern is not None or mask.shape != W.shape or mask.dtype != torch.bool):
        got = f"{mask.dtype} {list(mask.shape)}"
        raise ValueError(f"mask must be bool {list(W.shape)} and come without a pattern, got {got}, pattern {pattern}")
    if pattern is None and mask is None and bits is None:
        raise ValueError("nothing to do: give a pattern, a mask, or bits and sizes")
    if pattern is not None and pattern.keep is not None and not _groups_whole(factor.order, pattern.keep[1]):
        raise ValueError(f"the processing order splits groups of {pattern.keep[1]} channels: factor H with order=None")


def _groups_whole(order: Tensor, m: int) -> bool:
    """Whether each m consecutive steps hold the channels of one group, the tail's last."""
    whole = order.numel() - order.numel() % m
    groups = order.div(m, rounding_mode="floor")
    return torch.equal(groups[:whole], groups[:whole:m].repeat_interleave(m)) and bool(
        (groups[whole:] == whole // m).all()
    )
