"""One sparsity for the whole model, spread unevenly over its sites (the linears that share an input).

"owl" (arXiv 2310.05175, eq. 2): a block with more outlying |w| ||x|| keeps more. "error": each site is pruned at several levels, all from
one factor of its H, and the budget goes where the layer error grows least.
"""

from __future__ import annotations

from dataclasses import dataclass

import lowbit
import torch
from torch import nn

import sparsegpt
from ptq import distributed
from ptq.blocks import load_block
from ptq.errors import NumericalFailure
from ptq.gram import Gram
from ptq.recipe import Recipe, pruned_blocks
from ptq.sites import InputSite, block_sites
from ptq.walk import Run, forwards_of, strategy, sum_of

OUTLIER = 5.0  # times the mean of |w| ||x||: OWL's M
SPREAD = 0.08  # most that OWL moves a block from the mean: its lambda
STEP, REACH = 0.05, 0.25  # levels of "error": the sparsity and multiples of STEP around it
MOST = 0.95  # highest level, unless the sparsity is near it


@dataclass(frozen=True)
class Measured:
    """What the full-precision model shows of one site: weights, OWL's share of outliers, error at each level."""

    block: int
    weights: int
    outliers: float
    errors: tuple[float, ...]


def allocate(run: Run, states: list[torch.Tensor]) -> dict[str, float]:
    """Sparsity of every site that has one of its own, by name ("model.layers.0.R5"); none under uniform allocation.

    Args:
        states: the hidden states [B, T, C] entering block 0; the model is walked in full precision.
    """
    p = run.recipe.pruning
    if p.allocation == "uniform" or not p.sparsity:
        return {}
    found = measure(run, states)
    if p.allocation == "owl":
        return owl_shares(found, p.sparsity)
    return error_shares(found, levels(p.sparsity), p.sparsity)


def levels(sparsity: float) -> tuple[float, ...]:
    """The sparsities at which errors are measured, ascending, from 0 to less than 1, some of them on either side of `sparsity`."""
    count = round(REACH / STEP)
    most = max(MOST, (1 + sparsity) / 2)
    return tuple(sorted({min(max(0.0, sparsity + STEP * i), most) for i in range(-count, count + 1)}))


@torch.no_grad()
def measure(run: Run, states: list[torch.Tensor]) -> dict[str, Measured]:
    """Statistics of all sites of the blocks that are to be pruned."""
    found: dict[str, Measured] = {}
    for i in range(pruned_blocks(run.recipe.pruning, run.blocks)):
        block = load_block(run.model, run.spec, i, run.names, run.checkpoint, device=run.device)
        grams: dict[str, Gram] = {}
        scores: dict[str, torch.Tensor] = {}

        def see(site: InputSite, x: torch.Tensor, block=block, grams=grams) -> None:
            sum_of(Gram, block, site, grams).add(x)

        def finish(site: InputSite, i=i, block=block, grams=grams, scores=scores) -> None:
            """Take the site's score from all that was measured there."""
            name = f"{run.spec.blocks}.{i}.{site.name}"
            H, tokens = sum_of(Gram, block, site, grams).take()
            del grams[site.name]
            if not site.linears or not tokens:
                return
            if run.recipe.pruning.allocation == "owl":
                scores[name] = stacked(block, site).abs() * H.diagonal().sqrt()
                return
            try:
                found[name] = _measure_site(block, site, H, run.recipe, i)
            except sparsegpt.SolveError as err:  # under "skip" the walk says so, when it comes to leave the site whole
                if run.recipe.on_failure != "skip":
                    raise NumericalFailure(f"{name}: {err}") from err

        forwards, run_all = forwards_of(run, i, block, states), strategy(block, states)
        (outputs,) = run_all([forwards], block_sites(run.spec, block), measure=see, finish=finish)
        states = [x.cpu() for x in outputs]
        for name, share in outlying(scores).items():
            found[name] = Measured(i, scores[name].numel(), share, ())
    return found


def outlying(scores: dict[str, torch.Tensor]) -> dict[str, float]:
    """The share of each site's scores beyond OUTLIER times the mean over all sites of the block."""
    total = sum(score.sum().item() for score in scores.values())
    mean = total / max(1, sum(score.numel() for score in scores.values()))
    return {name: (score > OUTLIER * mean).float().mean().item() for name, score in scores.items()}


def stacked(block: nn.Module, site: InputSite) -> torch.Tensor:
    """The weights of a site's linears, float32: L x [R, C] -> [sum R, C]."""
    return torch.cat([block.get_submodule(path).weight for path in site.linears]).float()


def _measure_site(block: nn.Module, site: InputSite, H: torch.Tensor, recipe: Recipe, i: int) -> Measured:
    W, p = stacked(block, site), recipe.pruning
    factor = sparsegpt.factor(H, damp=recipe.weights.damp)
    parts = [block.get_submodule(path).out_features for path in site.linears]
    errors = torch.zeros(len(levels(p.sparsity)), dtype=torch.float64)
    for n, level in distributed.mine(list(enumerate(levels(p.sparsity)))):
        pattern = sparsegpt.Pattern(sparsity=level, scope=p.scope, block=p.block)
        found = sparsegpt.solve(W, factor, pattern=pattern, parts=parts, sweep=lowbit.sweep, lowest=lowbit.lowest)
        errors[n] = found.relative_error
    return Measured(i, W.numel(), 0.0, tuple(distributed.total(errors).tolist()))


def owl_shares(found: dict[str, Measured], sparsity: float) -> dict[str, float]:
    """Sparsity of each site, equal within a block: density 2 lambda (D - min D) / (max D - min D), shifted to the mean that was asked.

    Near a sparsity of 0 or 1 lambda is smaller, so that no block leaves that range.
    """
    blocks = sorted({site.block for site in found.values()})
    weights = [sum(s.weights for s in found.values() if s.block == b) for b in blocks]
    outliers = [
        sum(s.weights * s.outliers for s in found.values() if s.block == b) / w for b, w in zip(blocks, weights)
    ]
    low, high = min(outliers), max(outliers)
    moved = [2 * SPREAD * (d - low) / (high - low) if high > low else 0.0 for d in outliers]
    mean = sum(w * m for w, m in zip(weights, moved)) / sum(weights)
    room = min([1.0, *((1 - sparsity if mean > m else sparsity) / abs(mean - m) for m in moved if m != mean)])
    share = {b: min(1.0, max(0.0, sparsity + room * (mean - m))) for b, m in zip(blocks, moved)}
    return {name: share[site.block] for name, site in found.items()}


def error_shares(found: dict[str, Measured], levels: tuple[float, ...], sparsity: float) -> dict[str, float]:
    """Sparsity of each site that minimizes the sum of relative errors at the budget sparsity x weights.

    Starts from the lowest level everywhere and takes the step with the least error for each further zero, on the convex hull of each
    site's errors, where that greedy choice is optimal. The last step is cut to meet the budget.
    """
    steps = sorted(
        (slope, name, below, above)
        for name, site in found.items()
        for slope, below, above in _hull(levels, site.errors, site.weights)
    )
    shares = dict.fromkeys(found, levels[0])
    left = sum(site.weights * (sparsity - levels[0]) for site in found.values())
    for _, name, below, above in steps:
        if left <= 0:
            break
        gained = found[name].weights * (above - below)
        shares[name] = below + (above - below) * min(1.0, left / gained)
        left -= gained
    return shares


def _hull(levels: tuple[float, ...], errors: tuple[float, ...], weights: int) -> list[tuple[float, float, float]]:
    """(error per zero, from level, to level) along the lower convex hull of the points (level, error), slopes ascending."""
    hull = [0]
    for j in range(1, len(levels)):
        while len(hull) > 1 and _slope(levels, errors, hull[-2], hull[-1]) >= _slope(levels, errors, hull[-1], j):
            hull.pop()
        hull.append(j)
    return [(_slope(levels, errors, a, b) / weights, levels[a], levels[b]) for a, b in zip(hull, hull[1:])]


def _slope(levels: tuple[float, ...], errors: tuple[float, ...], a: int, b: int) -> float:
    return (errors[b] - errors[a]) / (levels[b] - levels[a])
