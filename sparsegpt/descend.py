"""Cyclic coordinate descent on codes: what a sweep, which visits each weight once, leaves to be gained."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sparsegpt.factor import Factor
from sparsegpt.grid import dequantize, group_index
from sparsegpt.pattern import alone
from sparsegpt.solution import Solution, by_step, energy

BLOCK = 128


def descend(W: Tensor, found: Solution, H: Tensor, factor: Factor, *, passes: int, total: Callable = alone) -> Solution:
    """Move each code in turn to the best of its grid while all others stay, `passes` times over (QuantEase, arXiv 2309.01885).

    With D = W - W_hat, tr(D H D^T) is least in the weight of column j at w_hat_j + (D H)_j / H_jj, so the nearest grid point is the best
    one, and no step raises the error. A weight that the mask of `found` leaves out stays zero, and a dead column as it is.
    W: float [R, C], what the codes stand for. found: codes uint8 [R, C] on grids, from `solve` with `factor`, that of H float [C, C].
    total: as for `solve`.
    Raises ValueError if `found` has no codes.
    """
    if found.codes is None:
        raise ValueError("a solution without codes has no grid to descend on; solve with bits")
    grid, order = found.grid, factor.order
    A = H.float()[order[:, None], order]  # [C, C], by turn
    A.diagonal().add_(factor.damp * A.diagonal().mean())
    g = group_index(grid.sizes, order.numel()).to(W.device)[order]
    s, z, top = (t[:, g].t().contiguous() for t in (grid.step, grid.zero, grid.top))  # [R, G] -> [C, R]
    w_hat = (found.codes.t()[order].float() - z) * s  # [R, C] -> [C, R]
    kept = None if found.mask is None else found.mask.t()[order]  # [R, C] -> [C, R]
    G = A @ (by_step(W, factor) - w_hat)  # [C, R], the transpose of D H
    for _ in range(passes):
        for start in range(0, order.numel(), BLOCK):
            block = slice(start, min(start + BLOCK, order.numel()))
            before = w_hat[block].clone()
            _visit(w_hat, G, A, s, z, kept, ~factor.dead[order], block, top)
            step = w_hat[block] - before  # [b, R]
            # Inside the block G is up to date.
            G[: block.start].addmm_(A[: block.start, block], step, alpha=-1)
            G[block.stop :].addmm_(A[block.stop :, block], step, alpha=-1)
    codes = torch.round(w_hat / s).add_(z).to(torch.uint8)[order.argsort()].t().contiguous()  # [C, R] -> [R, C]
    weight = dequantize(codes, grid)
    loss = float(total(torch.tensor(energy(by_step(W.float() - weight, factor), factor), dtype=torch.float64)))
    share = loss / found.loss if found.loss else 1.0
    return replace(found, codes=codes, weight=weight, loss=loss, relative_error=found.relative_error * share)


def _visit(w_hat, G, A, s, z, kept, free, block: slice, top) -> None:
    """One turn of each column of the block; w_hat [C, R] and the block's rows of G change in place."""
    inside = G[block]  # [b, R], a view
    none = torch.zeros_like(top[0])
    for i, j in enumerate(range(block.start, block.stop)):
        if not free[j]:
            continue
        best = (
            torch.round((w_hat[j] + inside[i] / A[j, j]) / s[j]).add_(z[j]).clamp_(none, top[j]).sub_(z[j]).mul_(s[j])
        )
        if kept is not None:
            best = torch.where(kept[j], best, w_hat[j])
        inside.addr_(A[block, j], best - w_hat[j], alpha=-1)
        w_hat[j] = best
