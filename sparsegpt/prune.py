"""The pruning methods by name: a weight and its H in, mask and values out."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sparsegpt.admm import admm, alps
from sparsegpt.factor import Factor
from sparsegpt.pattern import Pattern, alone, lowest
from sparsegpt.refine import refine
from sparsegpt.scores import choose
from sparsegpt.solution import Solution, by_step, energy, relative
from sparsegpt.solve import solve
from sparsegpt.sweep import sweep as torch_sweep


def _by_sweep(W, H, factor, pattern, sweep, rows):
    found = solve(W, factor, pattern=pattern, sweep=sweep, **rows)
    return found.weight, found.mask


def _by_score(method):
    def run(W, H, factor, pattern, sweep, rows):
        mask = choose(W, H, pattern, method=method, **rows)
        return torch.where(mask, W.float(), 0), mask

    return run


def _by_admm(W, H, factor, pattern, sweep, rows):
    start, _ = _by_sweep(W, H, factor, pattern, sweep, rows)
    return admm(W, H, pattern, start=start, damp=factor.damp, **rows)


def _by_alps(W, H, factor, pattern, sweep, rows):
    return alps(W, H, pattern, damp=factor.damp, **rows)


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
    fine: Tensor | None = None,
    clip: bool = False,
    parts: list[int] | None = None,
    sweep: Callable = torch_sweep,
    lowest: Callable = lowest,
    total: Callable = alone,
) -> Solution:
    """Prune W float [R, C] by `method` (METHODS), then refine, then quantize on the mask.

    H float [C, C], factor its `factor`. refine_steps: conjugate gradient steps on the kept weights. bits, sizes, fine, clip: as for
    `solve`: one more sweep with the mask fixed (arXiv 2301.00774, eq. 7), whose target and grids are the pruned weights where these make
    up for what is gone: at the least-squares optimum W_r on the mask the error of any Q with that mask splits into that of W_r and
    tr((W_r - Q) H (W_r - Q)^T). Weights that only lost some of their number (SCORES, not refined) are swept from W instead.
    parts: rows of the weights stacked in W, each with its own budget. sweep, lowest, total: as for `solve`.
    Raises ValueError for an unknown method and what `solve`, `choose` and `refine` refuse.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    rows = {"parts": parts, "lowest": lowest, "total": total}
    if method == "sparsegpt" and not refine_steps and bits is None:
        return solve(W, factor, pattern=pattern, sweep=sweep, parts=parts, lowest=lowest, total=total)
    weight, mask = METHODS[method](W, H, factor, pattern, sweep, rows)
    if refine_steps:
        weight = refine(W, weight, mask, H, steps=refine_steps, damp=factor.damp)
    compensated = refine_steps > 0 or method not in SCORES
    found = Solution(weight, mask=mask)
    if bits is not None:
        grid = {"bits": bits, "sizes": sizes, "fine": fine, "clip": clip}
        found = solve(weight if compensated else W, factor, mask=mask, **grid, sweep=sweep, total=total)
    energies = [energy(by_step(D, factor), factor) for D in (W.float() - found.weight, W)]
    loss, reference = total(torch.tensor(energies, dtype=torch.float64)).tolist()
    return replace(found, loss=loss, relative_error=relative(loss, reference))
