"""One block of the walk: collect -> reorder -> solve -> pack -> propagate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from lowbit.modules import Linear
from torch import nn

import rptq
from ptq import distributed, experts, quantizers, reorder, weights
from ptq.architectures import Geometry, Spec
from ptq.balance import balance
from ptq.blocks import Call, load_block, run_block
from ptq.errors import NumericalFailure
from ptq.fine import fine_groups
from ptq.gram import Drift, Gram
from ptq.recipe import Recipe, has_fine_groups, moves_channels, quantizes_activations, wants_sample
from ptq.sample import every_of
from ptq.sequential import Forwards, run_again, run_paused
from ptq.sites import InputSite, Statistics, block_sites, collect, input_sites, until_last_input
from ptq.source import Checkpoint, not_finite

# Bytes of stopped forwards that a true-sequential run may hold; with more calibration tokens it runs up to each site anew.
PAUSED_BYTES = 4 << 30

Sum = TypeVar("Sum", Gram, Drift)


@dataclass(frozen=True)
class Run:
    """What stays the same over the blocks of one run. `shares`: the sparsity of sites that have one of their own."""

    recipe: Recipe
    checkpoint: Checkpoint
    model: nn.Module
    spec: Spec
    geometry: Geometry
    names: dict[str, str]
    device: torch.device
    calls: list[dict[int, Call]]
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return len(self.model.get_submodule(self.spec.blocks))


@dataclass
class Compressed:
    """One compressed block, the hidden states that leave it and what there is to report."""

    block: nn.Module
    states: list[torch.Tensor]
    ranges: dict[str, rptq.ChannelRange]
    orders: reorder.Orders
    modules: list[weights.LayerFact]
    sites: list[Any]


@torch.no_grad()
def compress_block(run: Run, i: int, states: list[torch.Tensor]) -> Compressed:
    """Compress block i on the hidden states [B, T, C] that enter it.

    With asymmetric targets the first half of `states` comes out of the compressed blocks before, the second out of full-precision
    ones; so do the states that leave.

    Raises:
        NumericalFailure: an H that cannot be factored, or NaN or infinite values in the activations.
    """
    recipe, spec, geometry = run.recipe, run.spec, run.geometry
    prefix = f"{spec.blocks}.{i}"
    block = load_block(run.model, spec, i, run.names, run.checkpoint, device=run.device)
    compressed = states[: len(states) // 2] if recipe.weights.asymmetric else states
    forwards = forwards_of(run, i, block, compressed)
    # Experts are solved one after another, which only the true-sequential walk does.
    in_order = recipe.true_sequential or spec.experts is not None
    by_block = weights.wants_hessian(recipe) and not in_order
    # Where no linear's input changes between the passes, one pass gives ranges and H.
    rotates = recipe.clusters.rotate
    one_pass = by_block and not (quantizes_activations(recipe) or recipe.smooth is not None or rotates)
    moves = moves_channels(recipe)
    found = Statistics({}, {})
    if moves or quantizes_activations(recipe) or not in_order:
        found = _measured(run, forwards, prefix, ranges=True, hessians=one_pass)
    H = found.H
    orders, folded = _fold(run, forwards, found, prefix) if moves else ({}, found)
    beside = []
    if recipe.weights.asymmetric:  # its channels are in the new order, nothing in it is quantized
        beside = [forwards_of(run, i, copy.deepcopy(block), states[len(compressed) :])]
    sites = []
    if found.ranges:
        try:
            sites = quantizers.attach(block, spec, geometry, recipe, folded, orders)
        except ValueError as err:
            raise NumericalFailure(f"{prefix}: {err}") from err
    set_softmax_bits(block, spec, recipe.activations.softmax_bits)
    fine = _fine_groups(run, block, folded, orders) if has_fine_groups(recipe) else {}
    if in_order:
        facts, out = _solve_in_order(run, i, [forwards, *beside], orders, fine, prefix, strategy(block, states))
    else:
        if by_block and not one_pass:
            H = _measured(run, forwards, prefix, ranges=False, hessians=True).H
        elif by_block:
            for name in H:  # one at a time: two copies of every H would set the peak of memory
                H[name] = permuted_h(name, H[name], orders)
        tokens = int(distributed.total(torch.tensor(sum(x.shape[0] * x.shape[1] for x in states))))
        facts = []
        for site in block_sites(spec, block):
            facts += _compress_site(run, i, block, site, H.pop(site.name, None), orders, prefix, tokens, fine=fine)
        out = [forward() for forward in forwards.each]
    out = [x.cpu() for x in out]
    bad = sum(map(not_finite, out))
    if bad:
        raise NumericalFailure(
            f"{prefix}: {bad} NaN or infinite values leave the compressed block; use more bits or less sparsity"
        )
    return Compressed(block, out, found.ranges, orders, facts, sites)


def _measured(run: Run, forwards: Forwards, prefix: str, *, ranges: bool, hessians: bool) -> Statistics:
    """One pass over the block as it is now."""
    a, calibration = run.recipe.activations, run.recipe.calibration

    def passes() -> None:
        for forward in forwards.each:
            until_last_input(forward)

    every = every_of(calibration.nsamples * calibration.seqlen) if ranges and wants_sample(run.recipe) else None
    how = {"ranges": ranges, "hessians": hessians}
    return collect(forwards.block, run.spec, run.geometry, passes, **how, where=prefix, sinks=a.sinks, every=every)


def _fold(run: Run, forwards: Forwards, found: Statistics, prefix: str) -> tuple[reorder.Orders, Statistics]:
    """Smooth, reorder and rotate the block in place; returns the orders, and `found` as it is now. Smoothing changes found.ranges."""
    recipe, spec, block = run.recipe, run.spec, forwards.block
    if recipe.smooth is not None:  # before the orders: the clusters are those of the smoothed channels
        found.ranges = reorder.smooth(block, spec, found.ranges, recipe.smooth)
        found.samples.clear()
    if recipe.clusters.balance:
        found = balance(block, spec, run.geometry, found)
    orders = reorder.plan_orders(found.ranges, recipe, spec, run.geometry, prefix)
    reorder.fold_orders(block, spec, run.geometry, orders)
    turned = reorder.fold_rotations(block, spec, orders) if recipe.clusters.rotate else {}
    if not found.samples and (turned or wants_sample(recipe)):  # ranges alone do not tell those of a turned channel
        return orders, _measured(run, forwards, prefix, ranges=True, hessians=False)
    return orders, reorder.folded_statistics(found, orders, turned)


def _fine_groups(run: Run, block: nn.Module, found: Statistics, orders: reorder.Orders) -> dict[str, torch.Tensor]:
    """By linear, which weight groups have more bits; `found` is of the block as it is now."""
    sites, w = input_sites(run.spec), run.recipe.weights
    channels = {site.name: block.get_submodule(site.linears[0]).in_features for site in sites}
    sizes = {site.name: weights.group_sizes(channels[site.name], site, run.recipe, orders) for site in sites}
    return fine_groups(block, sites, found.samples, sizes, bits=w.bits, share=w.fine)


def _compress_site(
    run: Run, i: int, block, site: InputSite, H, orders, prefix: str, tokens: int, drift=None, fine=None
):
    pattern = weights.pattern_for(run.recipe, f"{prefix}.{site.name}", i, run.blocks, run.shares)
    return weights.compress_site(
        block, site, run.recipe, H, orders, prefix, pattern=pattern, tokens=tokens, drift=drift, fine=fine
    )


def forwards_of(run: Run, i: int, block: nn.Module, states: list[torch.Tensor]) -> Forwards:
    """Calls of `block` as block i on each of `states`."""
    sinks = run.recipe.activations.sinks

    def forward(x: torch.Tensor) -> torch.Tensor:
        return run_block(block, x.to(run.device), run.calls[i][x.shape[0]], sinks=sinks)

    return Forwards(block, [partial(forward, x) for x in states])


def _solve_in_order(
    run: Run, i: int, runs: list[Forwards], orders: reorder.Orders, fine: dict, prefix: str, run_all: Callable
) -> tuple[list[weights.LayerFact], list[torch.Tensor]]:
    """Every site of the first run's block on what the compressed sites before it make; returns the facts and all runs' outputs."""
    block = runs[0].block
    grams: dict[str, Gram] = {}
    drifts: dict[str, Drift] = {}
    facts: list[weights.LayerFact] = []
    wants_h = weights.wants_hessian(run.recipe)
    layer = None  # H and tokens at the router, toward which those of its experts are shrunk

    def measure(site: InputSite, x: torch.Tensor, *full: torch.Tensor) -> None:
        if wants_h:
            sum_of(Gram, block, site, grams).add(x)
        if full:
            sum_of(Drift, block, site, drifts).add(x, *full)

    def finish(site: InputSite) -> None:
        """Solve the site's linears on all that was measured there."""
        nonlocal layer
        # Also of a site that nothing reached here: another process may have tokens for it, and all take together.
        H, tokens = sum_of(Gram, block, site, grams).take() if wants_h else (None, 0)
        grams.pop(site.name, None)
        if site.router is not None:
            layer = (H, tokens)
        if wants_h and site.expert is not None:
            H = _expert_hessian(site, H, tokens, layer)
        drift = None
        if run.recipe.weights.asymmetric and site.expert is None:
            drift = sum_of(Drift, block, site, drifts).take()
            del drifts[site.name]
        if site.linears:
            facts.extend(_compress_site(run, i, block, site, H, orders, prefix, tokens, drift, fine))

    outputs = run_all(runs, block_sites(run.spec, block), measure=measure, finish=finish)
    return facts, [x for out in outputs for x in out]


def sum_of(kind: type[Sum], block: nn.Module, site: InputSite, sums: dict[str, Sum]) -> Sum:
    """The site's own in `sums`, begun where it has none."""
    if site.name not in sums:
        weight = block.get_submodule(site.entry).weight  # [R, C]
        sums[site.name] = kind(weight.shape[1], weight.device)
    return sums[site.name]


def _expert_hessian(site: InputSite, own: torch.Tensor, tokens: int, layer: tuple[torch.Tensor, int]) -> torch.Tensor:
    """An expert's H, shrunk because few tokens may have come to it, or none."""
    return experts.gate_up_hessian(own, tokens, *layer) if len(site.linears) == 2 else experts.down_hessian(own, tokens)


def strategy(block: nn.Module, states: list[torch.Tensor]) -> Callable:
    """`run_paused`, or `run_again` where stopped forwards would hold too much memory."""
    return run_paused if paused_bytes(block, states) <= PAUSED_BYTES else run_again


def paused_bytes(block: nn.Module, states: list[torch.Tensor]) -> int:
    """Roughly what forwards of `states` hold while they are stopped: residual, norm output and the widest linear's input, float32."""
    tokens = sum(x.shape[0] * x.shape[1] for x in states)
    widest = max(module.in_features for module in block.modules() if isinstance(module, Linear))
    return 4 * tokens * (3 * max((x.shape[-1] for x in states), default=0) + widest)


def permuted_h(name: str, H: torch.Tensor, orders: reorder.Orders) -> torch.Tensor:
    """H of the permuted input: x' = x[perm] gives H' = H[perm][:, perm]."""
    order = reorder.order_of(orders, name)
    return H if order is None else H[order.perm[:, None], order.perm]  # [C, C]


def set_softmax_bits(block: nn.Module, spec: Spec, bits: int) -> None:
    """Tell the block's attention module how many bits its probabilities have (read by the attention function "lowbit")."""
    block.get_submodule(spec.output.rpartition(".")[0]).softmax_bits = bits if spec.attention_interface else 16
