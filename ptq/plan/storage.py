"""What a run will write: its modules laid out on the meta device, so that their own layouts say what each takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from lowbit.modules import GROUP4, ActivationQuantizer, Linear
from lowbit.sparse import slots_per_row
from torch import nn

from ptq import head, weights, wide
from ptq.architectures import Geometry, Spec
from ptq.blocks import load_block
from ptq.plan.groups import Clusters, clusters_of, groups_of
from ptq.plan.headers import Headers, file_bytes
from ptq.quantizers import FULL, effective_bits, site_bits
from ptq.recipe import Recipe, has_fine_groups, moves_channels, prunes, quantizes_activations
from ptq.sites import InputSite, block_sites, input_sites, output_sites


@dataclass(frozen=True)
class Stored:
    """The result before it is made. modules, sites: rows as in report.json; blocks and head: packed modules without memory.

    rest: tensors outside the blocks by name, those of a packed head left out. bytes: of all weight files.
    """

    blocks: list[nn.Module]
    modules: list[dict[str, Any]]
    sites: list[dict[str, Any]]
    head: dict[str, Linear]
    rest: dict[str, torch.Tensor]
    bytes: int


def store(
    recipe: Recipe, model: nn.Module, spec: Spec, geometry: Geometry, names: dict[str, str], headers: Headers
) -> Stored:
    """Lay out the whole result of `recipe`.

    Raises:
        BadInput: more clusters than channels, or zeros that do not fit the weights.
    """
    blocks, facts, sites = [], [], []
    count = len(model.get_submodule(spec.blocks))
    in_order = recipe.true_sequential or spec.experts is not None
    # What the walk measures ranges for; a run that only prunes has no sites to tell of.
    measured = moves_channels(recipe) or quantizes_activations(recipe) or not in_order
    for i in range(count):
        with torch.device("meta"):
            block = load_block(model, spec, i, names, headers, device="meta")
        if measured:
            sites += _attach(block, spec, geometry, recipe, i)
        facts += _pack(block, spec, geometry, recipe, i, count)
        blocks.append(block)
    packed_head, head_facts = _head(recipe, model, names, headers)
    outside = {n: source for n, source in names.items() if not n.startswith(f"{spec.blocks}.")}
    rest = headers.read(source for n, source in outside.items() if n.rpartition(".")[0] not in packed_head)
    kept_whole = prunes(recipe) and recipe.pruning.storage == "dense"
    if kept_whole:  # under the source's names, experts fused where they are fused there
        shards = [
            headers.read(s for n, s in names.items() if n.startswith(f"{spec.blocks}.{i}.")) for i in range(count)
        ]
    else:
        shards = [{f"{spec.blocks}.{i}.{n}": t for n, t in b.state_dict().items()} for i, b in enumerate(blocks)]
    last = dict(rest)
    for name, linear in packed_head.items():
        last |= {f"{name}.{local}": tensor for local, tensor in linear.state_dict().items()}
    total = sum(map(file_bytes, shards)) + file_bytes(last)
    return Stored(blocks, weights.as_rows(facts + head_facts), sites, packed_head, rest, total)


def _attach(block: nn.Module, spec: Spec, geometry: Geometry, recipe: Recipe, i: int) -> list[dict[str, Any]]:
    """Put in the quantizers and permutations that the run will; rows of the input sites."""
    rows = []
    found = {site.name: _clusters(block, site, recipe, geometry) for site in input_sites(spec)}
    widths = _widths(found, spec, recipe)
    for site in input_sites(spec):
        clusters, bits = found[site.name], site_bits(site, recipe)
        kind = recipe.activations.grid if bits < FULL else "none"
        norm = None if site.norm is None else block.get_submodule(site.norm)
        if bits < FULL:
            quantizer = _input_quantizer(kind, clusters)
            for module in [norm] if norm is not None else map(block.get_submodule, site.linears):
                setattr(module, "quantizer" if norm is not None else "input_quantizer", quantizer)
        if norm is not None and recipe.reorder:
            norm.permutation = torch.zeros(norm.channels, dtype=torch.int32, device="meta")
        row = {"block": i, "site": site.name, "channels": int(clusters.sizes.sum()), "clusters": clusters.count}
        row |= {"bits": bits, "grid": kind, "permuted": recipe.reorder, "exact": clusters.exact}
        rows.append(row | {"effective_bits": effective_bits(widths[site.name], clusters.sizes, kind)})
    _attach_outputs(block, spec, geometry, recipe)
    return rows


def _clusters(block: nn.Module, site: InputSite, recipe: Recipe, geometry: Geometry) -> Clusters:
    return clusters_of(site, block.get_submodule(site.linears[0]).in_features, recipe, geometry)


def _widths(found: dict[str, Clusters], spec: Spec, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Bits of every cluster by site; where clusters of all sites compete, the first win, which is as many as any."""
    share, bits = recipe.clusters.wide or 0.0, {site.name: site_bits(site, recipe) for site in input_sites(spec)}
    if recipe.clusters.allot == "block" and recipe.activations.grid in ("tile", "cluster"):
        narrow = {name: torch.full_like(clusters.sizes, bits[name]) for name, clusters in found.items()}
        costs = {name: torch.zeros(found[name].count) for name in found if bits[name] < wide.WIDE_BITS}
        return narrow | (wide.costliest(costs, narrow, share) if costs else {})
    return {name: wide.widest(c.sizes, bits[name], 0.0 if name == "R3" else share) for name, c in found.items()}


def _input_quantizer(kind: str, clusters: Clusters) -> ActivationQuantizer:
    if kind in ("token", "tile"):
        return ActivationQuantizer(kind, clusters=clusters.count if kind == "tile" else 0)
    return ActivationQuantizer("static", clusters=clusters.count if kind == "cluster" else 1)


def _attach_outputs(block: nn.Module, spec: Spec, geometry: Geometry, recipe: Recipe) -> None:
    """Static grids of queries, keys and values: one a channel, or a cluster of a head. Dynamic ones hold no tensor."""
    a, c = recipe.activations, recipe.clusters
    if recipe.method == "group4":
        return
    bits, grids = {"q": a.q_bits, "k": a.kv_bits, "v": a.kv_bits}, {}
    for site in output_sites(spec, geometry):
        C = site.rows.numel()
        ordered = recipe.reorder and c.wide is None and (site.name == "v" or (spec.rotary or spec.head_norms) is None)
        count = 1 if a.grid == "tensor" else C
        if ordered and a.grid != "tensor":
            count = C // geometry.head_dim * (c.R3 if site.name == "v" else c.R2)
        if bits[site.name] < FULL:
            grids[site.module] = grids.get(site.module, 0) + count
    for path, count in grids.items():
        attribute = "quantizer" if path in (spec.head_norms or ()) else "output_quantizer"
        setattr(block.get_submodule(path), attribute, ActivationQuantizer("static", clusters=count))


def _pack(block: nn.Module, spec: Spec, geometry: Geometry, recipe: Recipe, i: int, count: int):
    """Replace the block's linears by what will be stored; returns their facts."""
    facts, due = [], 0.0
    prefix = f"{spec.blocks}.{i}"
    for site in block_sites(spec, block):
        pattern = weights.pattern_for(recipe, f"{prefix}.{site.name}", i, count, {})
        for path in site.linears:
            linear = block.get_submodule(path)
            R, C = linear.out_features, linear.in_features
            sizes = groups_of(site, clusters_of(site, C, recipe, geometry), recipe)
            if has_fine_groups(recipe):
                due += recipe.weights.fine * R * C  # the budget is the block's
                fine = _fine(sizes, R, due)
                due -= 0 if fine is None else R * fine["channels"]
            else:
                fine = None
            packed = _packed(linear, recipe, sizes, pattern, fine)
            owner, _, leaf = path.rpartition(".")
            setattr(block.get_submodule(owner), leaf, packed)
            fact = weights.fact_of(f"{prefix}.{path}", packed, weights.Outcome(), seconds=0.0)
            zeros = None if pattern is None else _zeros(C, pattern)
            keep = None if pattern is None or pattern.keep is None else "{}:{}".format(*pattern.keep)
            facts.append(replace(fact, sparsity=zeros, keep=keep))
    return facts


def _fine(sizes: torch.Tensor, R: int, due: float) -> dict[str, int] | None:
    """As many whole groups, the first, as fit into `due` weights of R rows."""
    ends = sizes.cumsum(0)
    groups = int((ends * R <= due).sum())
    return {"groups": groups, "channels": int(ends[groups - 1])} if groups else None


def _packed(linear: Linear, recipe: Recipe, sizes: torch.Tensor, pattern, fine: dict[str, int] | None) -> Linear:
    """The linear as it will be stored, without memory."""
    w, R, C = recipe.weights, linear.out_features, linear.in_features
    make = partial(
        Linear,
        C,
        R,
        bias=linear.bias is not None,
        dtype=linear.weight.dtype,
        input_quantizer=linear.input_quantizer,
        output_quantizer=linear.output_quantizer,
    )
    sparse = None
    if pattern is not None and recipe.pruning.storage == "packed":
        sparse = {"kind": "bitmask", "kept": round((1 - _zeros(C, pattern)) * R * C)}
        sparse = sparse if pattern.keep is None else {"kind": "n:m", "keep": list(pattern.keep)}
    with torch.device("meta"):
        if w.bits == 16:
            return make(sparse=sparse)
        if w.solver == "group4":
            return make(bits=4, groups=-(-R // GROUP4), codec="group4")
        return make(bits=w.bits, groups=sizes.numel(), sparse=sparse, fine=fine)


def _zeros(C: int, pattern) -> float:
    """Share of zeros that a pattern makes in rows of C channels."""
    return pattern.sparsity if pattern.keep is None else 1 - slots_per_row(C, pattern.keep) / C


def _head(recipe: Recipe, model: nn.Module, names: dict[str, str], headers: Headers):
    """(the head by name, its facts), both empty where it stays as it is."""
    if recipe.weights.head == 16:
        return {}, []
    name, like = head.head_name(model), model.get_output_embeddings()
    source = head.head_source(model, names)
    R, C = headers.shapes[source]
    with torch.device("meta"):
        how = {"bits": recipe.weights.head, "groups": -(-C // head.GROUP), "dtype": headers.dtypes[source]}
        linear = Linear(C, R, bias=like.bias is not None, **how)
    return {name: linear}, [weights.fact_of(name, linear, weights.Outcome(), seconds=0.0)]
