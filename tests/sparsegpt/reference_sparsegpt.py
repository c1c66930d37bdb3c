"""SparseGPT from the paper's formulas (arXiv 2301.00774, Alg. 1): float64, one column at a time, slow and plain.

Where the paper leaves a choice (ties, rounding of the number of zeros, tails, dead channels) it is made here in words.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """weight float64 [R, C], mask bool [R, C] (True = kept), codes int64 [R, C] or None; all in channel order."""

    weight: Tensor
    mask: Tensor
    codes: Tensor | None


def layer(R: int, C: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight float32 [R, C] and H float32 [C, C] of correlated inputs with a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(C, C, generator=generator) * torch.logspace(0, -1.5, C)
    X = torch.randn(3 * C, C, generator=generator) @ mix.T
    X[:, :: max(C // 4, 1)] *= 5
    return torch.randn(R, C, generator=generator) * 0.1, (X.double().T @ X.double()).float()


def damped(H: Tensor, damp: float = 0.01) -> Tensor:
    """H + damp * (mean of the live diagonal) * I, dead channels with 1 on the diagonal first: float64 [C, C]."""
    H = H.double()
    dead = H.diagonal() == 0
    return H + torch.diag(dead.double() + damp * H.diagonal()[~dead].mean())


def error_of(D: Tensor, H: Tensor) -> float:
    """tr(D H D^T), eq. 1 with D = W - W_hat."""
    D, H = D.double(), H.double()
    return ((D @ H) * D).sum().item()


def loss_of(W: Tensor, weight: Tensor, H: Tensor) -> float:
    """The layer error with damping over live channels, what `Solution.loss` states."""
    live = H.diagonal() != 0
    return error_of((W.double() - weight.double())[:, live], damped(H)[live][:, live])


def inverse_factor(H: Tensor) -> Tensor:
    """Upper U with H^-1 = U^T U: its row j, over U_jj, is how removing column j moves those right of it (Alg. 1)."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)


def pruned_first(score: Tensor, forced: Tensor, count: int) -> list[tuple[int, int]]:
    """(row, step) of the `count` entries that go: forced ones, then low score, then lower step, then lower row.

    score [R, steps], forced bool [R, steps]. All forced entries go even where they are more than count.
    """
    score, forced = score.tolist(), forced.tolist()
    entries = [(not forced[r][s], score[r][s], s, r) for r in range(len(score)) for s in range(len(score[r]))]
    count = max(count, sum(map(sum, forced)))
    return [(r, s) for *_, s, r in sorted(entries)[:count]]


def choose_share(score, forced, live, kept, start, stop, sparsity, rows):
    """Mask of steps start..stop for the given rows, so that all zeros up to `stop` are the rounded share of them."""
    steps = [step for step in range(start, stop) if live[step]]
    due = round(sparsity * len(rows) * int(live[:stop].sum()))
    done = int((~kept[rows, :start] & live[:start]).sum())
    for r, s in pruned_first(score[rows][:, steps], forced[rows][:, steps], due - done):
        kept[rows[r], steps[s]] = False


def choose_groups(score, forced, kept, start, n, m):
    """Mask of the group of m steps at `start`: each row keeps the n best; a tail of t keeps ceil(n * t / m)."""
    stop = min(start + m, score.shape[1])
    zeros = (stop - start) - math.ceil(n * (stop - start) / m)
    for row in range(score.shape[0]):
        for _, s in pruned_first(score[row : row + 1, start:stop], forced[row : row + 1, start:stop], zeros):
            kept[row, start + s] = False


def sparsegpt(
    W, H, *, order=None, sparsity=None, keep=None, scope="block", block=128, preserve=False, mask=None, grid=None
) -> Reference:
    """W float [R, C], H float [C, C] undamped; order int64 [C], channel of each step; grid a WeightGrid by channel.

    One of sparsity (share of zeros, with scope "block", "row" or "layer"), keep (n, m) and mask bool [R, C].
    """
    R, C = W.shape
    order = torch.arange(C) if order is None else order
    width = {"block": block, "row": block, "layer": C}[scope] if keep is None else keep[1]
    U = inverse_factor(damped(H)[order][:, order])
    live = (H.diagonal() != 0)[order]  # [C]
    work = W.double()[:, order]  # [R, C] by step
    forced = ~live.expand(R, C) | ((work == 0) & preserve)
    kept = (mask[:, order] if mask is not None else torch.ones(R, C, dtype=torch.bool)) & live
    values, codes = torch.zeros_like(work), torch.zeros(R, C, dtype=torch.int64)
    for i in range(C):
        if mask is None and i % width == 0:
            score = work**2 / U.diagonal() ** 2  # eq. 3
            if keep is not None:
                choose_groups(score, forced, kept, i, *keep)
            for rows in [[row] for row in range(R)] if scope == "row" else [list(range(R))]:
                if keep is None:
                    choose_share(score, forced, live, kept, i, min(i + width, C), sparsity, rows)
        w = work[:, i]
        values[:, i], codes[:, i] = rounded(w * kept[:, i], grid, order[i].item())
        error = (w - values[:, i]) / U[i, i]  # eq. 7
        work[:, i:] -= error[:, None] * U[i, i:]
    back = torch.argsort(order)
    return Reference(values[:, back], kept[:, back], None if grid is None else codes[:, back])


def rounded(w: Tensor, grid, channel: int) -> tuple[Tensor, Tensor | float]:
    """Nearest values and codes of column `channel` on its grid, ties to even; w itself where there is no grid."""
    if grid is None:
        return w, 0
    group = torch.repeat_interleave(torch.arange(len(grid.sizes)), grid.sizes)[channel]
    scale, zero = grid.scale[:, group].double(), grid.zero[:, group].double()
    q = torch.clamp(torch.round(w / scale) + zero, 0, 2**grid.bits - 1)
    return (q - zero) * scale, q.long()
