"""Quantize the weights of a block: one factor of H for all linears that share an input."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from lowbit.modules import Linear
from torch import nn

import sparsegpt
from ptq.architectures import Spec
from ptq.errors import BadInput, NumericalFailure
from ptq.recipe import Recipe
from ptq.reorder import Orders, input_order
from ptq.sites import InputSite, input_sites


@dataclass(frozen=True)
class LayerFact:
    """What the report says of one linear. `relative_error` is that of all linears sharing its input, in the H norm."""

    name: str
    shape: tuple[int, int]
    bits: int
    groups: int
    effective_bits: float
    relative_error: float | None
    damp: float | None
    attempts: int
    seconds: float


def quantize(
    block: nn.Module, spec: Spec, recipe: Recipe, H: dict[str, torch.Tensor], orders: Orders, prefix: str
) -> list[LayerFact]:
    """Pack every linear of the block in place; H is consumed site by site so that its memory goes early.

    Raises:
        NumericalFailure: H could not be factored, with the module and the damping tried.
        BadInput: weights that do not fit the group size.
    """
    facts = []
    for site in input_sites(spec):
        started = time.monotonic()
        linears = [block.get_submodule(path) for path in site.linears]
        name = f"{prefix}.{site.linears[0]}"
        if recipe.weights.bits == 16:
            outcome = (None, None, 0)
        elif recipe.weights.solver == "group4":
            for linear in linears:
                linear.pack_group4_()
            outcome = (None, None, 0)
        else:
            sizes = group_sizes(linears[0].in_features, site, recipe, orders)
            outcome = _solve(linears, H.pop(site.name, None), sizes, recipe, name)
        seconds = (time.monotonic() - started) / len(linears)
        facts += [_fact(f"{prefix}.{path}", linear, *outcome, seconds) for path, linear in zip(site.linears, linears)]
    return facts


def group_sizes(C: int, site: InputSite, recipe: Recipe, orders: Orders) -> torch.Tensor:
    """int64 [G]: the weight groups along a linear's C input channels. A group never straddles two clusters.

    "cluster": the clusters; "channel": one group; N: the clusters cut into near-equal groups of at most N channels. "auto": N is the
    tile where clusters are tiles, else max(16, C / 128), because k-means leaves a few clusters with most of the channels.
    """
    groups = recipe.weights.groups
    order = input_order(orders, site.name)
    whole = torch.tensor([C])
    if groups == "channel":
        return whole
    clusters = whole if order is None else order.sizes.cpu()
    if groups == "cluster":
        return clusters
    return _cut(clusters, (recipe.clusters.tile or max(16, C // 128)) if groups == "auto" else groups)


def _cut(sizes: torch.Tensor, most: int) -> torch.Tensor:
    """Each size cut into the fewest parts of at most `most`, larger parts first: 70 -> 24, 23, 23 for 32."""
    parts = [torch.tensor_split(torch.arange(size), -(-size // most)) for size in sizes.tolist()]
    return torch.tensor([len(part) for cluster in parts for part in cluster])


def _solve(
    linears: list[Linear], H, sizes: torch.Tensor, recipe: Recipe, name: str
) -> tuple[float | None, float | None, int]:
    """Pack `linears`; returns (relative error, damping that worked, factorization attempts)."""
    W = torch.cat([linear.weight for linear in linears])  # L x [R, C] -> [sum R, C]
    bits, sizes = recipe.weights.bits, sizes.to(W.device)
    try:
        if recipe.weights.solver == "rtn":
            solution, factor = sparsegpt.round_to_nearest(W, sizes=sizes, bits=bits), None
        else:
            # Across groups, not inside each: all grids are fixed before the sweep, so storage is the same and the error lower.
            whole = torch.tensor([W.shape[1]], device=W.device)
            order = sparsegpt.activation_order(H.diagonal(), whole) if recipe.weights.act_order else None
            factor = sparsegpt.factor(H, damp=recipe.weights.damp, order=order)
            del H
            solution = sparsegpt.solve(W, factor, sizes=sizes, bits=bits)
    except sparsegpt.SolveError as err:
        raise NumericalFailure(f"{name}: {err}") from err
    except ValueError as err:
        raise BadInput(f"{name}: {err}") from err
    rows = [linear.out_features for linear in linears]
    parts = zip(linears, *(t.split(rows) for t in (solution.codes, solution.grid.scale, solution.grid.zero)))
    for linear, codes, scale, zero in parts:
        linear.pack_(codes, scale.contiguous(), zero, sizes, bits)
    return (
        solution.relative_error,
        None if factor is None else factor.damp,
        0 if factor is None else len(factor.attempts),
    )


def _fact(
    name: str, linear: Linear, error: float | None, damp: float | None, attempts: int, seconds: float
) -> LayerFact:
    R, C = linear.out_features, linear.in_features
    effective = 8 * linear.stored_bytes() / (R * C)
    return LayerFact(name, (R, C), linear.bits, linear.groups, effective, error, damp, attempts, seconds)


def as_rows(facts: list[LayerFact]) -> list[dict[str, Any]]:
    """Plain dicts for report.json."""
    return [{**vars(fact), "shape": list(fact.shape)} for fact in facts]
