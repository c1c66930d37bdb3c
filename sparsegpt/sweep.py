"""The inner loop of GPTQ and SparseGPT over one block of columns, in torch. The kernels that replace it equal it.

arXiv 2301.00774, Alg. 1 with eq. 7: weight i is pruned or rounded, and its error moves the weights after it.
"""

import torch
from torch import Tensor

from sparsegpt.pattern import kept_of_tail, lowest_in_columns

# Columns that see each other's error at once; those further right in the block get one matrix product per SPAN columns.
SPAN = 16


def sweep(
    W1: Tensor,
    steps: Tensor,
    *,
    mask: Tensor | None = None,
    keep: tuple[int, int] | None = None,
    score: Tensor | None = None,
    scale: Tensor | None = None,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Finish one block: W1 float32 [b, R], a row for each processing step, is used up.

    steps: float32 [b, b], U_ij / U_ii strictly above the diagonal: what one unit of error in step i takes from step j.
    mask: bool [b, R], False is pruned. keep: (n, m), at every m-th step the n largest W1^2 score of the next m are kept, score
    float32 [b] = V_ii^2; ties keep the later step, and what `mask` prunes goes first. scale, low, high: float32 [b, R], the
    grid: level = clamp(round(w / scale), low, high), a pruned weight has level 0.
    Returns values float32 [b, R] (levels on a grid, weights otherwise), kept bool [b, R] or None without mask and keep, and
    errors float32 [b, R], compensated weight - final weight.
    """
    b = W1.shape[0]
    values, errors = torch.empty_like(W1), torch.empty_like(W1)
    kept = None
    if mask is not None or keep is not None:
        kept = torch.ones_like(W1, dtype=torch.bool) if mask is None else mask.clone()
    span = SPAN if keep is None else keep[1] * max(1, SPAN // keep[1])
    for start in range(0, b, span):
        stop = min(start + span, b)
        for i in range(start, stop):
            if keep is not None and i % keep[1] == 0:
                _keep_largest(kept[i : i + keep[1]], W1[i : i + keep[1]], score[i : i + keep[1]], keep)
            _finish(W1[i], values[i], errors[i], _row(kept, i), _row(scale, i), _row(low, i), _row(high, i))
            W1[i:stop].addr_(steps[i, i:stop], errors[i], alpha=-1)
        W1[stop:].addmm_(steps[start:stop, stop:].t(), errors[start:stop], alpha=-1)
    return values.add_(0.0), kept, errors  # + 0.0 turns -0.0 into 0.0


def _row(tensor: Tensor | None, i: int) -> Tensor | None:
    return None if tensor is None else tensor[i]


def _keep_largest(kept: Tensor, group: Tensor, score: Tensor, keep: tuple[int, int]) -> None:
    """Mark in kept [t, R] what keep n of m prunes of one group [t, R]."""
    importance = (group.square() * score[:, None]).masked_fill_(~kept, -1)
    kept &= ~lowest_in_columns(importance, group.shape[0] - kept_of_tail(keep, group.shape[0]))


def _finish(w, value, error, kept, scale, low, high) -> None:
    """Write one step's value and error, all [R]."""
    if scale is None:
        value.copy_(w)
    else:
        torch.div(w, scale, out=value)
        torch.clamp(value.round_(), low, high, out=value)
    if kept is not None:
        value.masked_fill_(~kept, 0)
    if scale is None:
        torch.sub(w, value, out=error)
    else:
        torch.addcmul(w, value, scale, value=-1, out=error)
