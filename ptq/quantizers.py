"""Put the activation quantizers of a recipe into a reordered block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lowbit.modules import ActivationQuantizer
from torch import nn

import rptq
from ptq import wide
from ptq.architectures import FusedQKV, Geometry, Spec
from ptq.errors import UnsupportedModel
from ptq.recipe import Recipe
from ptq.reorder import Orders, order_of
from ptq.sites import InputSite, Statistics, input_sites, output_sites

FULL = 16
# Of queries, keys and values the largest matter more than their share of the squared error: at 4 bits clipping them costs perplexity.
CLIP_BELOW = 4


@dataclass(frozen=True)
class SiteFact:
    """What the report says of one site."""

    site: str
    channels: int
    clusters: int
    bits: int
    grid: str
    permuted: bool
    note: str | None
    effective_bits: float
    rotation: int = 1


def attach(
    block: nn.Module, spec: Spec, geometry: Geometry, recipe: Recipe, found: Statistics, orders: Orders
) -> list[SiteFact]:
    """Fit the grids and attach them; returns one fact a site.

    found: ranges, and samples where grids are clipped or clusters compete for bits, of the block with `orders` (and rotations) folded in.
    """
    sites = input_sites(spec)
    widths = _widths(block, sites, recipe, found, orders)
    facts = [_attach_input(block, site, recipe, found, orders, widths[site.name]) for site in sites]
    return facts + _attach_outputs(block, spec, geometry, recipe, found, orders)


def _sizes(site: InputSite, found: Statistics, orders: Orders) -> torch.Tensor:
    """int64 [G]: the clusters of a site, one if it has none."""
    order = order_of(orders, site.name)
    return torch.tensor([found.ranges[site.name].min.numel()]) if order is None else order.sizes


def site_bits(site: InputSite, recipe: Recipe) -> int:
    """What the recipe asks of a linear's input."""
    return recipe.activations.bits if site.norm is None else recipe.activations.norm_bits


def _widths(
    block: nn.Module, sites: tuple[InputSite, ...], recipe: Recipe, found: Statistics, orders: Orders
) -> dict[str, torch.Tensor]:
    """int64 [G]: the bits of every cluster, by site."""
    share, compete = recipe.clusters.wide or 0.0, recipe.clusters.allot == "block"
    if compete and recipe.activations.grid in ("tile", "cluster"):
        return _competing(block, sites, recipe, found, orders, share)
    widths = {}
    for site in sites:  # R3's are no wider than others: each is a head, not a part of sorted channels
        of_site = 0.0 if site.name == "R3" else share
        widths[site.name] = wide.widest(_sizes(site, found, orders), site_bits(site, recipe), of_site)
    return widths


def _competing(block: nn.Module, sites, recipe: Recipe, found: Statistics, orders: Orders, share: float):
    """`_widths` where the clusters of all sites below 8 bits compete for a share of 8-bit ones."""
    sizes = {site.name: _sizes(site, found, orders) for site in sites}
    narrow = {site.name: torch.full_like(sizes[site.name], site_bits(site, recipe)) for site in sites}
    competing = [site for site in sites if site_bits(site, recipe) < wide.WIDE_BITS]
    if not competing:
        return narrow
    energies, costs = wide.branch_energies(block, sites, found.samples), {}
    for site in competing:
        quantizer = _input_quantizer(block, site, recipe, found, sizes[site.name], narrow[site.name])
        cost = wide.rounding_costs(block, site, found.samples[site.name], quantizer)
        costs[site.name] = cost * energies[site.name]
    return narrow | wide.costliest(costs, narrow, share)


def _attach_input(block: nn.Module, site: InputSite, recipe: Recipe, found, orders, widths: torch.Tensor) -> SiteFact:
    bits, order, sizes = site_bits(site, recipe), order_of(orders, site.name), _sizes(site, found, orders)
    kind = recipe.activations.grid if bits < FULL else "none"
    if bits < FULL:
        quantizer = _input_quantizer(block, site, recipe, found, sizes, widths)
        quantizer.sinks = recipe.activations.sinks
        if site.norm is not None:
            block.get_submodule(site.norm).quantizer = quantizer
        else:
            for path in site.linears:
                block.get_submodule(path).input_quantizer = quantizer
    ragged = recipe.clusters.tile is not None and recipe.clusters.wide is None and site.name == "R3"
    note = "not aligned to tiles: channels stay inside their heads" if ragged else None
    C, effective = int(sizes.sum()), effective_bits(widths, sizes, kind)
    turner = block.get_submodule(site.norm or site.linears[0])
    return SiteFact(site.name, C, sizes.numel(), bits, kind, order is not None, note, effective, turner.rotation)


def _input_quantizer(block: nn.Module, site: InputSite, recipe: Recipe, found: Statistics, sizes, widths):
    """The quantizer of a site with `widths` bits int64 [G] in clusters of `sizes`, without sinks."""
    kind = recipe.activations.grid
    if kind == "token":
        return ActivationQuantizer("token", token_bits=site_bits(site, recipe))
    if kind == "tile":
        return ActivationQuantizer.tiles(widths, sizes)
    if kind == "cluster":
        energy = sum(block.get_submodule(path).weight.float().square().sum(0) for path in site.linears)  # [C]
        return _static(_fit(found, site.name, sizes, widths, recipe, energy))
    return _static(rptq.tensor_grid(found.ranges[site.name], site_bits(site, recipe)))


def effective_bits(widths: torch.Tensor, sizes: torch.Tensor, kind: str) -> float:
    """Bits of a value: its code, and its share of a dynamic grid's scale (16 bits) and zero point (as wide as a code)."""
    codes = (widths * sizes).sum().item()
    grids = {"tile": (16 + widths).sum().item(), "token": 16 + widths[0].item()}.get(kind, 0)
    return (codes + grids) / sizes.sum().item()


def _fit(found: Statistics, name: str, sizes, bits, recipe: Recipe, weight=None, clip=True) -> rptq.ActivationGrid:
    """The grids of a site's clusters, clipped if the recipe says so and `clip` does."""
    ranges = found.ranges[name]
    if recipe.activations.clip and clip:
        ranges = rptq.clip_ranges(ranges, found.samples[name], sizes, bits, weight=weight)
    return rptq.fit_grid(ranges, sizes, bits)


def _static(grid: rptq.ActivationGrid, sinks: int = 0) -> ActivationQuantizer:
    return ActivationQuantizer.static(grid.scale, grid.zero, grid.bits, grid.sizes, sinks=sinks)


def _attach_outputs(block, spec: Spec, geometry: Geometry, recipe: Recipe, found: Statistics, orders: Orders):
    bits = {"q": recipe.activations.q_bits, "k": recipe.activations.kv_bits, "v": recipe.activations.kv_bits}
    if recipe.method == "group4":
        return _attach_group4(block, spec, geometry, recipe)
    facts, parts = [], {}
    for site in output_sites(spec, geometry):
        order = order_of(orders, site.name)
        fact, grid = _output_grid(site.name, found, order, bits[site.name], recipe, spec)
        facts.append(fact)
        if grid is not None:
            parts.setdefault(site.module, []).append((site.rows, grid))
    for path, pieces in parts.items():
        module = block.get_submodule(path)
        if path in (spec.head_norms or ()):
            module.quantizer = _static(pieces[0][1], recipe.activations.sinks)
        else:
            module.output_quantizer = _by_rows(module.out_features, pieces, recipe.activations.sinks)
    return facts


def _output_grid(name: str, found: Statistics, order, bits: int, recipe: Recipe, spec: Spec):
    """(fact, grid or None) of q, k or v: one grid a channel under rotary embeddings, where q and k stay, and in sorted tiles."""
    C, note = found.ranges[name].min.numel(), None
    if recipe.reorder and order is None and recipe.clusters.wide is None:
        why = "rotary embeddings" if spec.rotary else "head norms"
        note = (
            f"not permuted ({why}): one static grid a channel, before the rotation"
            if spec.rotary
            else f"not permuted ({why})"
        )
    if bits >= FULL:
        clusters = order.sizes.numel() if order is not None else 1
        return SiteFact(name, C, clusters, FULL, "none", order is not None, note, FULL), None
    each = torch.ones(C, dtype=torch.int64, device=found.ranges[name].min.device)
    if recipe.activations.grid == "token":
        note = "one static grid a channel: the packed cache holds no scale per token"
    if recipe.activations.grid == "tensor":
        grid, kind = rptq.tensor_grid(found.ranges[name], bits), "tensor"
    elif order is None or recipe.clusters.wide is not None:
        grid, kind = _fit(found, name, each, bits, recipe, clip=bits < CLIP_BELOW), "channel"
    else:
        grid, kind = _fit(found, name, order.sizes, bits, recipe, clip=bits < CLIP_BELOW), "cluster"
    return SiteFact(name, C, grid.scale.numel(), bits, kind, order is not None, note, bits), grid


def _by_rows(R: int, pieces: list[tuple[torch.Tensor, rptq.ActivationGrid]], sinks: int) -> ActivationQuantizer:
    """One quantizer over R output channels from grids on subsets of them; channels on no grid stay as they are."""
    device = pieces[0][1].scale.device
    scale, zero, bits = (
        torch.ones(R, device=device),
        torch.zeros(R, device=device),
        torch.full((R,), FULL, device=device),
    )
    for rows, grid in pieces:
        rows = rows.to(device)
        scale[rows] = grid.scale.repeat_interleave(grid.sizes)  # [G] -> [C]
        zero[rows] = grid.zero.repeat_interleave(grid.sizes)  # [G] -> [C]
        bits[rows] = grid.bits.repeat_interleave(grid.sizes).to(bits)  # [G] -> [C]
    channel = torch.stack((scale, zero, bits.float()), 1)  # [R, 3]
    runs, sizes = torch.unique_consecutive(channel, dim=0, return_counts=True)  # [G, 3], [G]
    return ActivationQuantizer.static(runs[:, 0].clone(), runs[:, 1].clone(), runs[:, 2], sizes, sinks=sinks)


def _attach_group4(block: nn.Module, spec: Spec, geometry: Geometry, recipe: Recipe) -> list[SiteFact]:
    """FlexGen's codec on keys and values: groups of 64 channels of each token, dynamic."""
    bits = recipe.activations.kv_bits
    facts = [SiteFact("q", geometry.heads * geometry.head_dim, 1, FULL, "none", False, None, FULL)]
    for site in output_sites(spec, geometry)[1:]:
        C = geometry.kv_heads * geometry.head_dim
        facts.append(
            SiteFact(
                site.name,
                C,
                -(-C // 64),
                bits,
                "token" if bits < FULL else "none",
                False,
                "groups of 64",
                bits + 32 / 64 if bits < FULL else FULL,
            )
        )
        if bits < FULL and (isinstance(spec.qkv, FusedQKV) or geometry.head_dim % 64):
            raise UnsupportedModel(
                f"{spec.model_type}: group4 keys and values need separate projections and heads of a multiple of 64 channels, "
                f"not {geometry.head_dim}; leave --kv-bits out"
            )
        if bits < FULL:
            module = block.get_submodule(site.module)
            attribute = "quantizer" if site.module in (spec.head_norms or ()) else "output_quantizer"
            setattr(module, attribute, ActivationQuantizer("group4"))
    return facts
