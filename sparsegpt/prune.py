"""The pruning methods by name: a weight and its H in, mask and values out."""

from collections.abc import Callable
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

    H float [C, C], factor its `factor`. refine_steps: conjugate gradient steps on the kept weights. bits, sizes: as for `solve`;
    the grids are fitted to the pruned and refined weights, and one sweep quantizes with the mask fixed (arXiv 2301.00774, eq. 7).
    parts: rows of the weights stacked in W, each with its own budget. kernels: `sweep` and `lowest` as for `solve`.
    Raises ValueError for an unknown method and what `solve`, `choose` and `refine` refuse.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    weight, mask = METHODS[method](W, H, factor, pattern, parts, kernels)
    if refine_steps:
        weight = refine(W, weight, mask, H, steps=refine_steps, damp=factor.damp)
    if bits is not None:
        return solve(W, factor, mask=mask, bits=bits, sizes=sizes, fitted_to=weight, **kernels)
    loss = energy(by_step(W.float() - weight, factor), factor)
    error = relative(loss, energy(by_step(W, factor), factor))
    return Solution(weight, mask=mask, loss=loss, relative_error=error)
