"""Plan the permutations of a block and fold them in (RPTQ, arXiv 2304.01089, sections 3.3 and 3.4).

R1, R4   norm's output gathered, consumers' columns permuted
R2       rows of q and k, head by head; never under rotary embeddings or head norms
R3       rows of v, columns of the output projection, one order per KV head shared by its query heads
R5       rows of up (and gate), columns of down

With `clusters.wide` every tile of the sorted channels is a cluster, R2 is not used (keys and values have a grid a channel), and with
`clusters.rotate` each cluster's channels are then turned by a Hadamard matrix, in the norm at R1 and R4, before the linear at R3 and R5.
"""

from __future__ import annotations

import math

import torch
from lowbit.hadamard import largest_block, rotate
from lowbit.modules import Linear
from torch import nn

import rptq
from ptq.architectures import Geometry, Spec
from ptq.architectures.geometry import qkv_rows
from ptq.balance import divide_norm, multiply_columns
from ptq.errors import BadInput
from ptq.recipe import Recipe
from ptq.sites import InputSite, Statistics, input_sites, norm_of

# Keys: R1, R4, R5; R3 and "o", the same order for the KV heads' channels and spelled out for the query heads; R2 and "q" likewise.
Orders = dict[str, rptq.Order]


def order_of(orders: Orders, site: str) -> rptq.Order | None:
    """The order of the channels seen at a site (an input, or q, k, v), None where they are not permuted."""
    return orders.get({"R3": "o", "k": "R2", "v": "R3"}.get(site, site))


def folded_statistics(found: Statistics, orders: Orders, turned: dict[str, int]) -> Statistics:
    """The ranges and samples of every site once `orders` and rotations are folded in.

    turned: site -> block of its Hadamard transform; its range is then that of the sample.
    """
    folded = Statistics({}, {})
    for name, ranges in found.ranges.items():
        order = order_of(orders, name)
        folded.ranges[name] = ranges if order is None else ranges.permuted(order.perm)
        if name not in found.samples:
            continue
        sample = found.samples[name] if order is None else found.samples[name][:, order.perm]
        if name in turned:
            sample = rotate(sample, turned[name])
            folded.ranges[name] = rptq.update(None, sample)
        folded.samples[name] = sample
    return folded


def plan_orders(
    ranges: dict[str, rptq.ChannelRange], recipe: Recipe, spec: Spec, geometry: Geometry, where: str
) -> Orders:
    """The order of every site that may be permuted, by name; "o" is R3 spelled out for the query heads.

    Raises:
        BadInput: more clusters than channels, with both numbers.
    """
    if not recipe.reorder:
        return {}
    groups = {"n_kv": geometry.kv_heads, "n_query_per_kv": geometry.heads // geometry.kv_heads}
    orders: Orders = {}
    try:
        for site in input_sites(spec):
            if site.name != "R3":
                orders[site.name] = _site_order(ranges[site.name], site, recipe)
        v_and_o = rptq.joint_features(ranges["v"], rptq.merge_query_groups(ranges["R3"], **groups))
        orders["R3"] = _head_order(v_and_o, geometry, recipe.clusters.R3, recipe)
        orders["o"] = rptq.expand_to_query_groups(orders["R3"], **groups)
        if spec.rotary is None and spec.head_norms is None and recipe.clusters.wide is None:
            q_and_k = rptq.joint_features(rptq.merge_query_groups(ranges["q"], **groups), ranges["k"])
            orders["R2"] = _head_order(q_and_k, geometry, recipe.clusters.R2, recipe)
            orders["q"] = rptq.expand_to_query_groups(orders["R2"], **groups)
    except ValueError as err:
        raise BadInput(f"{where}: {err}; lower the count with --set clusters.R1=N (R1 to R5)") from err
    return orders


def _site_order(ranges: rptq.ChannelRange, site: InputSite, recipe: Recipe) -> rptq.Order:
    n_clusters, tile = getattr(recipe.clusters, site.name), recipe.clusters.tile
    if recipe.clusters.wide is not None:
        return rptq.sorted_tiles(ranges, tile)
    if tile is None:
        return rptq.kmeans_order(rptq.range_features(ranges), n_clusters, seed=recipe.seed)
    bits = recipe.activations.bits if site.norm is None else recipe.activations.norm_bits
    return rptq.tile_aligned_order(ranges, n_clusters, tile, bits=bits)


def _head_order(features: torch.Tensor, geometry: Geometry, n_clusters: int, recipe: Recipe) -> rptq.Order:
    by_head = features.view(geometry.kv_heads, geometry.head_dim, -1)  # [H D, F] -> [H, D, F]
    if recipe.clusters.wide is None:
        return rptq.per_head_order(by_head, n_clusters, seed=recipe.seed)
    width = by_head.abs().amax(-1)  # [H, D]
    return rptq.join_heads([rptq.sorted_tiles(rptq.ChannelRange(-w, w), recipe.clusters.tile) for w in width])


def fold_orders(block: nn.Module, spec: Spec, geometry: Geometry, orders: Orders) -> None:
    """Permute the block's full-precision weights in place; the block's function stays the same."""
    q, k, v = qkv_rows(spec, geometry)
    for site in input_sites(spec):
        order = order_of(orders, site.name)
        if order is not None:
            _permute_input(block, site, order.perm)
    if "R5" in orders:
        for path in spec.up:
            linear = block.get_submodule(path)
            _permute_rows(linear, torch.arange(linear.out_features), orders["R5"].perm)
    if "R3" in orders:
        _permute_rows(block.get_submodule(v[0]), v[1], orders["R3"].perm)
    if "R2" in orders:
        _permute_rows(block.get_submodule(q[0]), q[1], orders["q"].perm)
        _permute_rows(block.get_submodule(k[0]), k[1], orders["R2"].perm)


def fold_rotations(block: nn.Module, spec: Spec, orders: Orders) -> dict[str, int]:
    """Turn every input by a block Hadamard transform inside its clusters, in place; the block's function stays the same.

    (x H)(W H)^T = x W^T for the orthogonal H of `lowbit.hadamard`. What turns x: at R1 and R4 the norm, at R3 and R5 the linear. At R3
    the rows of the value projection could, but values on a grid a channel lose more by it than the output projection gains. Without
    clusters all channels are turned together, as in QuaRot (arXiv 2404.00456). Returns site -> block.
    """
    turned = {}
    for site in input_sites(spec):
        order = order_of(orders, site.name)
        linears = [block.get_submodule(path) for path in site.linears]
        block_size = largest_block(linears[0].in_features if order is None else math.gcd(*order.sizes.tolist()))
        for linear in linears:
            linear.weight = rotate(linear.weight, block_size)
        norm, turned[site.name] = norm_of(block, site), block_size
        for module in linears if norm is None else [norm]:
            module.rotation = block_size
    return turned


def _permute_input(block: nn.Module, site: InputSite, perm: torch.Tensor) -> None:
    norm = norm_of(block, site)
    if norm is not None:
        norm.permutation = perm.to(torch.int32)
    for path in site.linears:
        linear = block.get_submodule(path)
        linear.weight = rptq.permute_columns(linear.weight, perm)


def _permute_rows(linear: Linear, rows: torch.Tensor, perm: torch.Tensor) -> None:
    rows = rows.to(perm.device)
    source = torch.arange(linear.out_features, device=perm.device)
    source[rows] = rows[perm]
    linear.weight, linear.bias = rptq.permute_rows(linear.weight, linear.bias, source)


def smooth(
    block: nn.Module, spec: Spec, ranges: dict[str, rptq.ChannelRange], alpha: float
) -> dict[str, rptq.ChannelRange]:
    """SmoothQuant (arXiv 2211.10438, eq. 4) at the norm sites: norm / s, consumers' columns * s. Returns the new ranges."""
    smoothed = dict(ranges)
    for site in input_sites(spec):
        norm = norm_of(block, site)
        if norm is None or norm.weight is None:
            continue
        linears = [block.get_submodule(path) for path in site.linears]
        weight_max = torch.stack([linear.weight.float().abs().amax(0) for linear in linears]).amax(0)  # [L, C] -> [C]
        s = rptq.smooth_factors(ranges[site.name], weight_max, alpha=alpha)
        divide_norm(norm, s)
        multiply_columns(block, site, s)
        smoothed[site.name] = rptq.ChannelRange(ranges[site.name].min / s, ranges[site.name].max / s)
    return smoothed
