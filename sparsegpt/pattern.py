"""Which weights become zero: patterns, exact budgets and deterministic choices."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SCOPES = ("block", "row", "layer")


@dataclass(frozen=True)
class Pattern:
    """What a mask must look like. Exactly one of `sparsity` and `keep`.

    sparsity: share of zeros, 0..1, over the live columns. keep: (n, m), n values kept of every m consecutive channels; a
    tail of t < m channels keeps ceil(n t / m). scope: what shares one threshold when `sparsity` is given: "block", all rows of
    a mask block (arXiv 2301.00774, section 3.3), "row", each row of a mask block, "layer", everything. block: columns of a
    mask block, in processing steps. preserve: zeros that W has stay zero, and count.
    Raises ValueError for values out of range.
    """

    sparsity: float | None = None
    keep: tuple[int, int] | None = None
    scope: str = "block"
    block: int = 128
    preserve: bool = False

    def __post_init__(self):
        if (self.sparsity is None) == (self.keep is None):
            raise ValueError(f"give one of sparsity and keep, got {self.sparsity} and {self.keep}")
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity must lie in 0..1, got {self.sparsity}: it is the share of zeros")
        if self.keep is not None and not (len(self.keep) == 2 and 0 < self.keep[0] < self.keep[1]):
            raise ValueError(f"keep must be (n, m) with 0 < n < m, got {self.keep}: (2, 4) keeps 2 of every 4")
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")


def kept_of_tail(keep: tuple[int, int], channels: int) -> int:
    """Weights that a group of `channels` <= m keeps: n of a whole group, ceil(n t / m) of a tail of t."""
    n, m = keep
    return math.ceil(n * channels / m)


def lowest(score: Tensor, count: int) -> Tensor:
    """The `count` smallest entries of `score`, ties in memory order: bool in score's shape. Clamps count to what there is.

    One threshold over a mask block (SparseGPT, arXiv 2301.00774, section 3.3). score: of any shape and dtype with an order, no NaN.
    """
    flat = score.reshape(-1)  # [n]
    if count <= 0 or count >= flat.numel():
        return torch.full_like(score, count > 0, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    chosen = flat < threshold
    missing = count - int(chosen.sum())
    chosen[(flat == threshold).nonzero()[:missing, 0]] = True
    return chosen.view_as(score)


def alone(x: Tensor) -> Tensor:
    """The sum over all processes that hold rows of a weight, where one holds them all."""
    return x


def lowest_in_columns(score: Tensor, count: Tensor) -> Tensor:
    """The count[g] smallest entries of each column of score [n, g], ties from the top: bool [n, g]."""
    rank = score.argsort(dim=0, stable=True).argsort(dim=0)  # [n, g]
    return rank < count


def lowest_in_groups(score: Tensor, keep: tuple[int, int]) -> Tensor:
    """What keep n of m prunes of score [C, R], groups of m along C, ties from the top: bool [C, R]."""
    m = keep[1]
    whole = score.shape[0] - score.shape[0] % m
    groups = score[:whole].unflatten(0, (whole // m, m))  # [C, R] -> [C / m, m, R]
    pruned = _before_in_groups(groups) < m - keep[0]
    tail = score[whole:]
    pruned_of_tail = _before_in_groups(tail[None])[0] < len(tail) - kept_of_tail(keep, len(tail))
    return torch.cat([pruned.flatten(0, 1), pruned_of_tail])  # [C / m, m, R] -> [C, R]


def _before_in_groups(score: Tensor) -> Tensor:
    """How many of its group come before each entry, ties in order, int8 [G, m, R]: for few entries faster than to sort them."""
    before = torch.zeros_like(score, dtype=torch.int8)
    for i in range(score.shape[1]):
        for j in range(i):
            earlier_first = score[:, j] <= score[:, i]
            before[:, i] += earlier_first
            before[:, j] += ~earlier_first
    return before


class Budget:
    """Zeros still to be placed over the mask blocks of one layer, so that their total is exactly round(sparsity x weights).

    parts: rows of each of the weights stacked in the layer; each has a budget of its own. lowest, total: as `lowest` and `alone` here.
    """

    def __init__(self, pattern: Pattern, parts: list[int], lowest=lowest, total=alone):
        self.pattern, self.parts, self.lowest, self.total = pattern, parts, lowest, total
        self.rows = [1] * len(parts) if pattern.scope == "row" else total(torch.tensor(parts)).tolist()
        self.live = 0
        self.placed = [torch.zeros(rows if pattern.scope == "row" else 1, dtype=torch.int64) for rows in parts]

    def choose(self, score: Tensor, zeros: Tensor | None, dead: Tensor) -> Tensor:
        """Weights to prune of the next mask block: score [b, R] >= 0, zeros bool [b, R] to keep as such, dead bool [b] -> bool [b, R].

        Dead columns are pruned beside the budget.
        """
        self.live += int((~dead).sum())
        score = score.clamp(max=torch.finfo(score.dtype).max)
        if zeros is not None:
            score.masked_fill_(zeros, -1)
        score[dead] = math.inf  # last in every order: the budget is for live columns
        pieces = zip(score.split(self.parts, 1), range(len(self.parts)))
        pruned = torch.cat([self._choose_part(piece, i, ~dead) for piece, i in pieces], 1)
        pruned[dead] = True
        return pruned

    def _choose_part(self, score: Tensor, i: int, live: Tensor) -> Tensor:
        by_row = self.pattern.scope == "row"
        target = round(self.pattern.sparsity * self.rows[i] * self.live)
        existing = (score < 0).sum(0).cpu() if by_row else self._existing(score)
        most = int(live.sum()) * self.rows[i]
        count = (target - self.placed[i]).clamp(min=0).maximum(existing).clamp(max=most)
        self.placed[i] += count
        if by_row:
            return lowest_in_columns(score, count.to(score.device))
        return self.lowest(score, int(count))

    def _existing(self, score: Tensor) -> Tensor:
        return self.total((score < 0).sum()).cpu()[None] if self.pattern.preserve else torch.zeros(1, dtype=torch.int64)
