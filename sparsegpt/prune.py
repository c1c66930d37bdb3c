"""The pruning methods by name: a weight and its H in, mask and values out."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsegpt.admm import admm, alps
from sparsegpt.factor import Factor
from sparsegpt.pattern import Pattern
from sparsegpt.refine import refine
from sparsegpt.scores import choose
from sparsegpt.solution import Solution, by_step, energy, relative
from sparsegpt.solve import solve


def _by_sweep(W, H, factor, pattern, parts, kernels):
    found = solve(W, factor, pattern=pattern, parts=parts, **kernels)
    return found.weight, found.mask


def _by_score(method):
    def run(W, H, factor, pattern, parts, kernels):
        mask = choose(W, H, pattern, method=method, parts=parts)
        return torch.where(mask, W.float(), 0), mask

    return run


def _by_admm(W, H, factor, pattern, parts, kernels):
    start, _ = _by_sweep(W, H, factor, pattern, parts, kernels)
    return admm(W, H, pattern, start=start, damp=factor.damp, parts=parts)


def _by_alps(W, H, factor, pattern, parts, kernels):
    return alps(W, H, pattern, damp=factor.damp, parts=parts)


SCORES = ("wanda", "magnitude")
METHODS: dict[str, Callable] = {
    "sparsegpt": _by_sweep,
    "admm": _by_admm,
    "alps": _by_alps,
    "wanda": _by_score("wanda"),
    "magnitude": _by_score("magnitude"),
}


def prune(
    W: Tensor,
    H: Tensor,
    factor: Factor,
    pattern: Pattern,
    *,
    method: str = "sparsegpt",
    refine_steps: int = 0,
    bits: int | None = None,
    sizes: Tensor | None = None,
    parts: list[int] | None = None,
    **kernels: Any,
) -> Solution:
    """Prune W float [R, C] by `method` (METHODS), then refine, then quantize on the mask.

    H float [C, C], factor its `factor`. refine_steps: conjugate gradient steps on the kept weights. bits, sizes: as for `solve`: one
    more sweep with the mask fixed (arXiv 2301.00774, eq. 7), whose target and grids are the pruned weights where these make up
    for what is gone: at the least-squares optimum W_r on the mask the error of any Q with that mask splits into that of W_r and
    tr((W_r - Q) H (W_r - Q)^T). Weights that only lost some of their number (SCORES, not refined) are swept from W instead.
    parts: rows of the weights stacked in W, each with its own budget. kernels: `sweep` and `lowest` as for `solve`.
    Raises ValueError for an unknown method and what `solve`, `choose` and `refine` refuse.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "sparsegpt" and not refine_steps and bits is None:
        return solve(W, factor, pattern=pattern, parts=parts, **kernels)
    weight, mask = METHODS[method](W, H, factor, pattern, parts, kernels)
    if refine_steps:
        weight = refine(W, weight, mask, H, steps=refine_steps, damp=factor.damp)
    compensated = refine_steps > 0 or method not in SCORES
    found = Solution(weight, mask=mask)
    if bits is not None:
        found = solve(weight if compensated else W, factor, mask=mask, bits=bits, sizes=sizes, **kernels)
    loss = energy(by_step(W.float() - found.weight, factor), factor)
    error = relative(loss, energy(by_step(W, factor), factor))
    return replace(found, loss=loss, relative_error=error)
