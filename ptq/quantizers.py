"""Put the activation quantizers of a recipe into a reordered block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lowbit.modules import ActivationQuantizer
from torch import nn

import rptq
from ptq.architectures import FusedQKV, Geometry, Spec
from ptq.errors import UnsupportedModel
from ptq.recipe import Recipe
from ptq.reorder import Orders, input_order
from ptq.sites import input_sites, output_sites

FULL = 16


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


def attach(
    block: nn.Module,
    spec: Spec,
    geometry: Geometry,
    recipe: Recipe,
    ranges: dict[str, rptq.ChannelRange],
    orders: Orders,
) -> list[SiteFact]:
    """Fit the grids (ranges are of the *unpermuted* channels) and attach them; returns one fact a site."""
    facts = [_attach_input(block, site, recipe, ranges[site.name], orders) for site in input_sites(spec)]
    return facts + _attach_outputs(block, spec, geometry, recipe, ranges, orders)


def _attach_input(block: nn.Module, site, recipe: Recipe, ranges: rptq.ChannelRange, orders: Orders) -> SiteFact:
    bits = recipe.activations.bits if site.norm is None else recipe.activations.norm_bits
    order = input_order(orders, site.name)
    if order is not None:
        ranges = ranges.permuted(order.perm)
    C, kind = ranges.min.numel(), recipe.activations.grid if bits < FULL else "none"
    clusters = order.sizes.numel() if order is not None else 1
    if bits < FULL:
        if kind == "token":
            quantizer = ActivationQuantizer("token", token_bits=bits)
        else:
            grid = rptq.fit_grid(ranges, order.sizes, bits) if kind == "cluster" else rptq.tensor_grid(ranges, bits)
            quantizer = _static(grid)
        if site.norm is not None:
            block.get_submodule(site.norm).quantizer = quantizer
        else:
            for path in site.linears:
                block.get_submodule(path).input_quantizer = quantizer
    ragged = recipe.clusters.tile is not None and site.name == "R3"
    note = "not aligned to tiles: channels stay inside their heads" if ragged else None
    return SiteFact(site.name, C, clusters, bits, kind, order is not None, note)


def _static(grid: rptq.ActivationGrid) -> ActivationQuantizer:
    return ActivationQuantizer.static(grid.scale, grid.zero, torch.full_like(grid.scale, grid.bits), grid.sizes)


def _attach_outputs(block, spec: Spec, geometry: Geometry, recipe: Recipe, ranges, orders: Orders) -> list[SiteFact]:
    bits = {"q": recipe.activations.q_bits, "k": recipe.activations.kv_bits, "v": recipe.activations.kv_bits}
    if recipe.method == "group4":
        return _attach_group4(block, spec, geometry, recipe)
    facts, parts = [], {}
    for site in output_sites(spec, geometry):
        order = orders.get({"q": "q", "k": "R2", "v": "R3"}[site.name])
        fact, grid = _output_grid(site.name, ranges[site.name], order, bits[site.name], recipe, spec)
        facts.append(fact)
        if grid is not None:
            parts.setdefault(site.module, []).append((site.rows, grid))
    for path, pieces in parts.items():
        module = block.get_submodule(path)
        if path in (spec.head_norms or ()):
            module.quantizer = _static(pieces[0][1])
        else:
            module.output_quantizer = _by_rows(module.out_features, pieces)
    return facts


def _output_grid(name: str, ranges: rptq.ChannelRange, order, bits: int, recipe: Recipe, spec: Spec):
    """(fact, grid or None) of q, k or v. Under rotary embeddings q and k are not permuted: one grid a channel."""
    note = None
    if recipe.reorder and order is None:
        why = "rotary embeddings" if spec.rotary else "head norms"
        note = (
            f"not permuted ({why}): one static grid a channel, before the rotation"
            if spec.rotary
            else f"not permuted ({why})"
        )
    if bits >= FULL:
        clusters = order.sizes.numel() if order is not None else 1
        return SiteFact(name, ranges.min.numel(), clusters, FULL, "none", order is not None, note), None
    if recipe.activations.grid != "cluster":
        grid, kind = rptq.tensor_grid(ranges, bits), "tensor"
        if recipe.activations.grid == "token":
            note = "static per tensor: the packed cache holds no scale per token"
    elif order is None:
        grid, kind = rptq.channel_grid(ranges, bits), "channel"
    else:
        grid, kind = rptq.fit_grid(ranges.permuted(order.perm), order.sizes, bits), "cluster"
    return SiteFact(name, ranges.min.numel(), grid.scale.numel(), bits, kind, order is not None, note), grid


def _by_rows(R: int, pieces: list[tuple[torch.Tensor, rptq.ActivationGrid]]) -> ActivationQuantizer:
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
        bits[rows] = grid.bits
    channel = torch.stack((scale, zero, bits.float()), 1)  # [R, 3]
    runs, sizes = torch.unique_consecutive(channel, dim=0, return_counts=True)  # [G, 3], [G]
    return ActivationQuantizer.static(runs[:, 0].clone(), runs[:, 1].clone(), runs[:, 2], sizes)


def _attach_group4(block: nn.Module, spec: Spec, geometry: Geometry, recipe: Recipe) -> list[SiteFact]:
    """FlexGen's codec on keys and values: groups of 64 channels of each token, dynamic."""
    bits = recipe.activations.kv_bits
    facts = [SiteFact("q", geometry.heads * geometry.head_dim, 1, FULL, "none", False, None)]
    for site in output_sites(spec, geometry)[1:]:
        C = geometry.kv_heads * geometry.head_dim
        facts.append(
            SiteFact(site.name, C, -(-C // 64), bits, "token" if bits < FULL else "none", False, "groups of 64")
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
