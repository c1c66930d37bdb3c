"""H + lambda I = V V^T with V upper triangular: the only factorization the column solvers need.

GPTQ (arXiv 2210.17323, Alg. 1) and SparseGPT (arXiv 2301.00774, Alg. 1) go H -> H^-1 -> upper Cholesky factor U with
H^-1 = U^T U. That U is V^-1, so one Cholesky of the flipped H replaces two Choleskys and an inverse.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsegpt.errors import SolveError
from sparsegpt.grid import group_index

LADDER = (1, 3, 10, 30, 100)


@dataclass(frozen=True)
class Factor:
    """The factored H of one layer input, shared by every weight that reads that input.

    V: float32 [C, C], upper triangular, rows and columns in processing order: (H + lambda I)[order][:, order] = V V^T.
    order: int64 [C], the channel processed at each step; V[i, j] belongs to channels order[i], order[j].
    dead: bool [C] in channel order, True where H_ii == 0.
    damp: the damping that worked, lambda = damp * mean(H_ii over live channels).
    attempts: every (damp, dtype) tried, the one that worked last. dtype: the precision that worked.
    """

    V: Tensor
    order: Tensor
    dead: Tensor
    damp: float
    attempts: tuple[tuple[float, torch.dtype], ...]
    dtype: torch.dtype


def activation_order(diagonal: Tensor, sizes: Tensor) -> Tensor:
    """Processing order of GPTQ's act-order inside each group: descending H_ii, ties by channel number.

    diagonal [C], sizes int64 [G] with sum C -> int64 [C]. Groups follow one another; `sizes = [C]` orders across them,
    which is just as valid because the grids of `solve` are fixed before the sweep. Raises ValueError for bad sizes.
    """
    descending = torch.argsort(diagonal, descending=True, stable=True)
    group = group_index(sizes.to(diagonal.device), diagonal.numel())
    return descending[torch.argsort(group[descending], stable=True)]


def factor(H: Tensor, *, damp: float = 0.01, order: Tensor | None = None) -> Factor:
    """Factor H = sum x x^T (any positive multiple of it) for `solve`. H float [C, C] is left as it is.

    Dead channels (H_ii == 0, so their whole row is 0) get 1 on the diagonal and stay out of the mean. Damping climbs
    damp * (1, 3, 10, 30, 100), each in float32, then in float64, until a Cholesky succeeds; there is no other fallback.
    order: int64 permutation of the C channels (`activation_order`), by default 0..C-1.
    Raises ValueError for a bad shape, dtype, damp or order; SolveError for NaN/Inf in H, H = 0, or an exhausted ladder.
    """
    order = _checked_order(H, damp, order)
    diagonal = H.diagonal()
    if not torch.isfinite(H).all():
        raise SolveError(f"H [{H.shape[0]}, {H.shape[0]}] holds NaN or Inf: look for overflow in the inputs")
    dead = diagonal == 0
    if dead.all():
        raise SolveError(f"H is zero for all C={H.shape[0]} channels: no input reached this layer, add samples")
    mean = diagonal[~dead].double().mean().item()

    # Factoring in reversed order and flipping back turns the lower Cholesky factor into the upper one.
    reversed_order = order.flip(0)
    reordered = not torch.equal(order, torch.arange(order.numel(), device=order.device))
    A = H[reversed_order[:, None], reversed_order] if reordered else H.flip(0, 1)  # [C, C]
    undamped = diagonal[reversed_order].masked_fill(dead[reversed_order], 1)  # [C]
    attempts: list[tuple[float, torch.dtype]] = []
    for step in LADDER:
        for dtype in (torch.float32, torch.float64):
            attempts.append((damp * step, dtype))
            L = _cholesky(A, undamped, damp * step * mean, dtype)
            if L is not None:
                del A  # with many channels each [C, C] counts, and the flip makes another
                V = L.flip(0, 1).to(torch.float32)
                return Factor(V, order, dead, damp * step, tuple(attempts), dtype)
    tried = ", ".join(f"{damp * step:g}" for step in LADDER)
    raise SolveError(
        f"H with C={H.shape[0]} is not positive definite after damping {tried} (float32 and float64), "
        f"diagonal {diagonal.min().item():.3g}..{diagonal.max().item():.3g}: raise damp or use more calibration samples"
    )


def damped(H: Tensor, damp: float) -> Tensor:
    """H + lambda I with the lambda and the dead channels of `factor`: float [C, C] -> a new [C, C]."""
    diagonal = H.diagonal()
    dead = diagonal == 0
    H = H.clone()
    H.diagonal().masked_fill_(dead, 1).add_(damp * diagonal[~dead].double().mean().item())
    return H


def _cholesky(A: Tensor, undamped: Tensor, damping: float, dtype: torch.dtype) -> Tensor | None:
    """Lower factor of A with `undamped` + damping on the diagonal, None if there is none. A's own diagonal is scratch."""
    damped = A.to(dtype)
    damped.diagonal().copy_(undamped.to(dtype) + damping)
    L, info = torch.linalg.cholesky_ex(damped)
    # A NaN anywhere in a row of L reaches that row's pivot, so the pivots tell for the whole factor.
    if info.item() != 0 or not torch.isfinite(L.diagonal()).all():
        return None
    return L


def _checked_order(H: Tensor, damp: float, order: Tensor | None) -> Tensor:
    if H.ndim != 2 or H.shape[0] != H.shape[1] or H.shape[0] == 0 or not H.is_floating_point():
        raise ValueError(f"H must be a square float matrix, got {H.dtype} {list(H.shape)}: pass sum x x^T as [C, C]")
    if not (math.isfinite(damp) and damp > 0):
        raise ValueError(f"damp must be a positive number, got {damp}: 0.01 is the papers' value")
    channels = torch.arange(H.shape[0], device=H.device)
    if order is None:
        return channels
    order = order.to(H.device)
    if order.shape != channels.shape or order.dtype != torch.int64 or not torch.equal(order.sort().values, channels):
        got = f"{order.dtype} {list(order.shape)}"
        raise ValueError(f"order must be an int64 permutation of 0..{H.shape[0] - 1}, got {got}: see activation_order")
    return order
