"""Compress the weights of a block, site by site: one factor of H for all linears that share an input."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import lowbit
import torch
from lowbit.modules import Linear
from torch import nn

import sparsegpt
from ptq import distributed
from ptq.errors import BadInput, NumericalFailure
from ptq.recipe import Recipe, keep_of, pruned_blocks, prunes
from ptq.reorder import Orders, order_of
from ptq.sites import InputSite


@dataclass(frozen=True)
class LayerFact:
    """What the report says of one linear. `relative_error` is that of all linears sharing its input, in the H norm.

    fine_share: share of the weights with twice the bits.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    groups: int
    fine_share: float
    sparsity: float | None
    keep: str | None
    storage: str
    effective_bits: float
    relative_error: float | None
    damp: float | None
    attempts: int
    tokens: int | None
    failure: str | None
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """How a site's weights were found. `failure`: why they were left as they are."""

    relative_error: float | None = None
    damp: float | None = None
    attempts: int = 0
    failure: str | None = None


def compress_site(
    block: nn.Module,
    site: InputSite,
    recipe: Recipe,
    H: torch.Tensor | None,
    orders: Orders,
    prefix: str,
    *,
    pattern: sparsegpt.Pattern | None = None,
    tokens: int | None = None,
    drift: torch.Tensor | None = None,
    fine: dict[str, torch.Tensor] | None = None,
) -> list[LayerFact]:
    """Compress the linears of one site in place.

    Args:
        H: float32 [C, C] = sum x x^T of the site's input, None where the recipe needs none.
        pattern: what to prune, None for nothing.
        tokens: how many tokens H is made of.
        drift: float32 [C, C], sum (x - xhat) xhat^T, where targets are asymmetric.
        fine: by linear bool [G], weight groups with more bits, where some have.

    Raises:
        NumericalFailure: H could not be factored, with the module and the damping tried; with on_failure "skip" the
            linears stay as they are and the facts say so.
        BadInput: weights that do not fit the group size or the pattern.
    """
    started = time.monotonic()
    linears = [block.get_submodule(path) for path in site.linears]
    name = f"{prefix}.{site.linears[0]}"
    if recipe.weights.solver == "group4" and recipe.weights.bits < 16:
        for linear in linears:
            linear.pack_group4_()
        outcome = Outcome()
    elif recipe.weights.bits == 16 and pattern is None:
        outcome = Outcome()
    else:
        try:
            sizes = group_sizes(linears[0].in_features, site, recipe, orders)
            flags = [fine[path] for path in site.linears] if fine else None
            outcome = _solve(linears, H, sizes, recipe, pattern, drift, flags)
        except sparsegpt.SolveError as err:
            if recipe.on_failure != "skip":
                raise NumericalFailure(f"{name}: {err}") from err
            outcome = Outcome(failure=str(err))
        except ValueError as err:
            raise BadInput(f"{name}: {err}") from err
    seconds = (time.monotonic() - started) / len(linears)
    pruned = None if outcome.failure else pattern
    return [
        fact_of(f"{prefix}.{path}", linear, outcome, seconds=seconds, pattern=pruned, tokens=tokens)
        for path, linear in zip(site.linears, linears)
    ]


def wants_hessian(recipe: Recipe) -> bool:
    """Whether the recipe's solver reads H."""
    return prunes(recipe) or (recipe.weights.bits < 16 and recipe.weights.solver == "gptq")


def pattern_for(recipe: Recipe, site: str, i: int, blocks: int, shares: dict[str, float]) -> sparsegpt.Pattern | None:
    """What to prune at a site ("model.layers.0.R5") of block i of `blocks`; `shares` gives some sites a sparsity of their own."""
    p = recipe.pruning
    if not prunes(recipe) or i >= pruned_blocks(p, blocks):
        return None
    if p.keep is not None:
        return sparsegpt.Pattern(keep=keep_of(p), preserve=p.preserve)
    return sparsegpt.Pattern(sparsity=shares.get(site, p.sparsity), scope=p.scope, block=p.block, preserve=p.preserve)


def group_sizes(C: int, site: InputSite, recipe: Recipe, orders: Orders) -> torch.Tensor:
    """int64 [G]: the weight groups along a linear's C input channels. A group never straddles two clusters.

    "cluster": the clusters; "channel": one group; N: the clusters cut into near-equal groups of at most N channels. "auto": N is the
    tile where clusters are tiles, else max(16, C / 128), because k-means leaves a few clusters with most of the channels.
    """
    order = order_of(orders, site.name)
    return groups_of_clusters(torch.tensor([C]) if order is None else order.sizes.cpu(), recipe)


def groups_of_clusters(clusters: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """int64 [G]: the weight groups that clusters of int64 [K] channels make, see `group_sizes`."""
    groups, C = recipe.weights.groups, int(clusters.sum())
    if groups == "channel":
        return torch.tensor([C])
    return clusters if groups == "cluster" else _cut(clusters, widest_group(C, recipe))


def widest_group(C: int, recipe: Recipe) -> int:
    """Channels of the widest weight group that is cut from clusters of C channels."""
    groups = recipe.weights.groups
    return groups if isinstance(groups, int) else recipe.clusters.tile or max(16, C // 128)


def _cut(sizes: torch.Tensor, most: int) -> torch.Tensor:
    """Each size cut into the fewest parts of at most `most`, larger parts first: 70 -> 24, 23, 23 for 32."""
    parts = [torch.tensor_split(torch.arange(size), -(-size // most)) for size in sizes.tolist()]
    return torch.tensor([len(part) for cluster in parts for part in cluster])


def _solve(
    linears: list[Linear],
    H: torch.Tensor | None,
    sizes: torch.Tensor,
    recipe: Recipe,
    pattern: sparsegpt.Pattern | None,
    drift: torch.Tensor | None,
    fine: list[torch.Tensor] | None,
) -> Outcome:
    """Compress `linears`, stacked along their rows, of which each process solves its share."""
    bits, sizes = recipe.weights.bits, sizes.to(linears[0].weight.device)
    grid: dict[str, Any] = {} if bits == 16 else {"bits": bits, "sizes": sizes}
    if recipe.weights.solver == "rtn":
        W = torch.cat([linear.weight for linear in linears])  # L x [R, C] -> [sum R, C]
        solution, factor = sparsegpt.round_to_nearest(W, **grid), None
    else:
        shares = [linear.weight[distributed.share(linear.out_features)] for linear in linears]
        W = torch.cat(shares)  # L x [R, C] -> [sum R, C]
        if fine is not None:
            grid["fine"] = torch.cat(
                [flags.expand(len(rows), -1) for flags, rows in zip(fine, shares)]
            )  # L x [G] -> [sum R, G]
        lowest = lowbit.lowest if distributed.size() == 1 else distributed.lowest
        kernels: dict[str, Any] = {
            "sweep": lowbit.sweep,
            "lowest": lowest,
            "total": distributed.total,
            "clip": recipe.weights.clip,
        }
        # Across groups, not inside each: all grids are fixed before the sweep, so storage is the same and the error lower.
        whole = torch.tensor([W.shape[1]], device=W.device)
        order = sparsegpt.activation_order(H.diagonal(), whole) if recipe.weights.act_order and grid else None
        factor = sparsegpt.factor(H, damp=recipe.weights.damp, order=order)
        if drift is not None:
            W = sparsegpt.asymmetric_target(W, drift, factor, strength=recipe.weights.asymmetric)
        if pattern is None:
            solution = sparsegpt.solve(W, factor, **grid, **kernels)
        else:
            p = recipe.pruning
            how: dict[str, Any] = {
                "method": p.method,
                "refine_steps": p.refine,
                "parts": [len(part) for part in shares],
            }
            solution = sparsegpt.prune(W, H, factor, pattern, **how, **grid, **kernels)
        if grid and recipe.weights.descend:
            passes = recipe.weights.descend
            solution = sparsegpt.descend(W, solution, H, factor, passes=passes, total=distributed.total)
        solution = _of_all(solution, linears)
    store(linears, solution, sizes, recipe, keep=None if pattern is None else pattern.keep)
    damp, attempts = (None, 0) if factor is None else (factor.damp, len(factor.attempts))
    return Outcome(solution.relative_error, damp, attempts)


def _of_all(solution: sparsegpt.Solution, linears: list[Linear]) -> sparsegpt.Solution:
    """The solution for all rows of the stacked weights, put together from every process's share of them."""
    if distributed.size() == 1:
        return solution
    rows = [linear.out_features for linear in linears]
    mine = [len(range(R)[distributed.share(R)]) for R in rows]

    def whole(x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None:
            return None
        return torch.cat([distributed.whole(part, R) for part, R in zip(x.split(mine), rows)])  # [r, C] -> [sum R, C]

    grid = solution.grid
    if grid is not None:
        grid = replace(grid, scale=whole(grid.scale), zero=whole(grid.zero), fine=whole(grid.fine))
    return replace(
        solution, weight=whole(solution.weight), mask=whole(solution.mask), codes=whole(solution.codes), grid=grid
    )


def store(
    linears: list[Linear],
    solution: sparsegpt.Solution,
    sizes: torch.Tensor,
    recipe: Recipe,
    *,
    keep: tuple[int, int] | None,
) -> None:
    """Put a solution for the stacked weights into the linears, packed as the recipe says."""
    rows = [linear.out_features for linear in linears]
    masks = [None] * len(rows) if solution.mask is None else solution.mask.split(rows)
    packed = recipe.pruning.storage == "packed"
    for i, (linear, weight, kept) in enumerate(zip(linears, solution.weight.split(rows), masks)):
        if solution.codes is not None:
            codes, scale, zero = (t.split(rows)[i] for t in (solution.codes, solution.grid.scale, solution.grid.zero))
            fine = None if solution.grid.fine is None else solution.grid.fine.split(rows)[i][0]  # one for all rows
            how = {"fine": fine, "kept": kept, "keep": keep}
            linear.pack_(codes, scale.contiguous(), zero, sizes, solution.grid.bits, **how)
        else:
            linear.weight = weight.to(linear.weight.dtype)
            if packed and kept is not None:
                linear.pack_sparse_(kept, keep)
        if kept is not None:
            linear.skip_zeros_()


def fact_of(
    name: str,
    linear: Linear,
    outcome: Outcome,
    *,
    seconds: float,
    pattern: sparsegpt.Pattern | None = None,
    tokens: int | None = None,
) -> LayerFact:
    """What the report says of a linear as it is now, and of how it came to be."""
    R, C = linear.out_features, linear.in_features
    sparse = getattr(linear, "sparse", None)
    return LayerFact(
        name=name,
        shape=(R, C),
        bits=linear.bits,
        groups=linear.groups,
        fine_share=linear.fine["channels"] / C if linear.fine else 0.0,
        sparsity=None if pattern is None else 1 - linear.kept().sum().item() / (R * C),
        keep=None if pattern is None or pattern.keep is None else "{}:{}".format(*pattern.keep),
        storage="dense" if linear.bits == 16 and sparse is None else "packed",
        effective_bits=8 * linear.stored_bytes() / (R * C),
        relative_error=outcome.relative_error,
        damp=outcome.damp,
        attempts=outcome.attempts,
        tokens=tokens,
        failure=outcome.failure,
        seconds=seconds,
    )


def as_rows(facts: list[LayerFact]) -> list[dict[str, Any]]:
    """Plain dicts for report.json."""
    return [{**vars(fact), "shape": list(fact.shape)} for fact in facts]
