"""Masks that look at one weight at a time: magnitude and Wanda. The weights that stay keep their values."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsegpt.pattern import Pattern, alone, lowest, lowest_in_columns, lowest_in_groups
from sparsegpt.solution import check_finite


def choose(
    W: Tensor,
    H: Tensor | None,
    pattern: Pattern,
    *,
    method: str,
    dead: Tensor | None = None,
    parts: list[int] | None = None,
    lowest: Callable = lowest,
    total: Callable = alone,
) -> Tensor:
    """Mask bool [R, C] of W float [R, C], True is kept.

    method "magnitude": |W|, one threshold over each part (a weight of the stack; by default W is one), or a row with scope "row". "wanda"
    (arXiv 2306.11695, eq. 1): |W| sqrt(H_jj), one threshold a row; H float [C, C], any positive multiple of sum x x^T. dead: bool [C],
    channels to prune beside the budget, by default those with H_jj = 0 under wanda and none under magnitude. With `keep` both
    compare inside groups. Ties: the lower channel is pruned first. lowest, total: as for `solve`.
    Raises ValueError for an unknown method, NaN or Inf in W, or an H that does not fit.
    """
    if method not in ("magnitude", "wanda"):
        raise ValueError(f"method must be magnitude or wanda, got {method!r}")
    check_finite(W)
    C = W.shape[1]
    score = W.t().float().abs()  # [C, R]
    if method == "wanda":
        if H is None or H.shape != (C, C):
            raise ValueError(f"wanda needs H [{C}, {C}], got {None if H is None else list(H.shape)}")
        dead = H.diagonal() == 0 if dead is None else dead
        score = score * H.diagonal().float().sqrt()[:, None]
    if dead is None:
        dead = torch.zeros(C, dtype=torch.bool, device=W.device)
    if pattern.preserve:
        score.masked_fill_(W.t() == 0, -1)
    if pattern.keep is not None:
        score[dead] = -1
        pruned = lowest_in_groups(score, pattern.keep)
        if pattern.preserve:
            pruned |= score < 0
    else:
        score[dead] = torch.inf
        pruned = _share(score, pattern, int((~dead).sum()), method, parts or [W.shape[0]], lowest, total)
    pruned[dead] = True
    return ~pruned.t()


def _share(score: Tensor, pattern: Pattern, live: int, method: str, parts: list[int], lowest, total) -> Tensor:
    """The exact share of each row (wanda) or each part (magnitude) of score [C, R] that goes; what is below 0 always goes."""
    zeros = (score < 0).sum(0)  # [R]
    if method == "wanda" or pattern.scope == "row":
        return lowest_in_columns(score, zeros.clamp(min=round(pattern.sparsity * live)))
    rows = total(torch.tensor(parts)).tolist()
    existing = total(torch.stack([z.sum() for z in zeros.split(parts)])).tolist()
    counts = [max(round(pattern.sparsity * r * live), e) for r, e in zip(rows, existing)]
    return torch.cat([lowest(s, count) for s, count in zip(score.split(parts, 1), counts)], 1)
