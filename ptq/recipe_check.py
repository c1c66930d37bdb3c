"""What a recipe may say: every value in its range, and nothing that excludes another."""

from __future__ import annotations

from typing import Any

from ptq.errors import BadInput
from ptq.presets import METHODS, PRUNING_METHODS
from ptq.recipe import (
    ACTIVATION_BITS,
    ACTIVATION_GRIDS,
    ALLOCATIONS,
    HEAD_BITS,
    KV_BITS,
    STORAGES,
    WEIGHT_BITS,
    WEIGHT_SOLVERS,
    Recipe,
    keep_of,
    prunes,
    quantizes,
)


def _one_of(value: Any, allowed, where: str) -> None:
    # 4.0 == 4 and True == 1, but neither is a number of bits
    if isinstance(value, (bool, float)) or value not in allowed:
        raise BadInput(f"{where}: {value!r} is not one of {', '.join(map(str, allowed))}")


def _at_least(value: Any, least: int, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BadInput(f"{where}: {value!r} is not a whole number of at least {least}")


def _share(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise BadInput(f"{where}: {value!r} is not a number between 0 and 1")


def check(recipe: Recipe) -> Recipe:
    """Return the recipe, or raise BadInput with the field, its value and what is allowed."""
    w, a, c, cal = recipe.weights, recipe.activations, recipe.clusters, recipe.calibration
    _one_of(recipe.version, (1,), "recipe.version")
    _one_of(recipe.method, METHODS | PRUNING_METHODS, "recipe.method")
    _one_of(recipe.on_failure, ("stop", "skip"), "on_failure")
    _one_of(w.bits, WEIGHT_BITS, "weights.bits")
    _one_of(w.head, HEAD_BITS, "weights.head")
    _one_of(w.solver, WEIGHT_SOLVERS, "weights.solver")
    _one_of(a.grid, ACTIVATION_GRIDS, "activations.grid")
    _one_of(a.kv_bits, KV_BITS, "activations.kv_bits")
    for name in ("bits", "norm_bits", "q_bits", "softmax_bits"):
        _one_of(getattr(a, name), ACTIVATION_BITS, f"activations.{name}")
    for name in ("R1", "R2", "R3", "R4", "R5"):
        _at_least(getattr(c, name), 1, f"clusters.{name}")
    if c.tile is not None:
        _one_of(c.tile, (32, 64, 128), "clusters.tile")
    _check_tiles(recipe)
    for name in ("nsamples", "seqlen"):
        _at_least(getattr(cal, name), 1, f"calibration.{name}")
    _one_of(cal.mode, ("random", "first"), "calibration.mode")
    if w.groups not in ("auto", "cluster", "channel"):
        _at_least(w.groups, 8, "weights.groups")
    _check_pruning(recipe)
    _check_asymmetric(recipe)
    if not recipe.reorder:
        _check_unordered(recipe)
    if w.solver == "group4" and w.bits not in (4, 16):
        raise BadInput(f"weights.bits: method group4 stores 4 bits, not {w.bits}; use --wbits 4 or another method")
    if recipe.method == "group4" and a.kv_bits not in (4, 16):
        raise BadInput(f"activations.kv_bits: method group4 stores 4 bits, not {a.kv_bits}; use --kv-bits 4")
    if recipe.method == "group4" and a.q_bits != 16:
        raise BadInput(
            f"activations.q_bits: method group4 leaves queries at 16 bits, not {a.q_bits}; add --set activations.q_bits=16"
        )
    _at_least(w.descend, 0, "weights.descend")
    _share(w.fine, "weights.fine")
    if w.fine and (c.wide is None or w.solver != "gptq"):
        raise BadInput(
            "weights.fine: chooses among sorted tiles for gptq; use --method rptq+, or set clusters.wide and --set weights.solver=gptq"
        )
    _share(w.damp, "weights.damp")
    if w.damp in (0, 1):
        raise BadInput(f"weights.damp: {w.damp!r} must lie inside 0 and 1, for instance 0.01")
    if recipe.smooth is not None:
        _share(recipe.smooth, "smooth")
    _at_least(recipe.seed, 0, "seed")
    switches = {
        "reorder": recipe.reorder,
        "clusters.rotate": c.rotate,
        "clusters.balance": c.balance,
        "activations.clip": a.clip,
        "weights.clip": w.clip,
        "true_sequential": recipe.true_sequential,
        "pruning.preserve": recipe.pruning.preserve,
        "weights.act_order": w.act_order,
        "trust_remote_code": recipe.trust_remote_code,
    }
    for where, value in switches.items():
        if not isinstance(value, bool):
            raise BadInput(f"{where}: {value!r} is neither true nor false")
    texts = {"model": recipe.model, "calibration.text": cal.text, "revision": recipe.revision or ""}
    for where, text in texts.items():
        if not isinstance(text, str):
            raise BadInput(f"{where}: {text!r} is not text; put it in quotes")
    return recipe


def _check_tiles(recipe: Recipe) -> None:
    a, c = recipe.activations, recipe.clusters
    _at_least(a.sinks, 0, "activations.sinks")
    if c.wide is not None:
        _share(c.wide, "clusters.wide")
        if c.tile is None:
            raise BadInput("clusters.wide: is a share of tiles; set clusters.tile to 64, for instance")
    _one_of(c.allot, ("site", "block"), "clusters.allot")
    if c.allot == "block" and c.wide is None:
        raise BadInput("clusters.allot: block needs tiles that compete; set clusters.wide, or leave it site")
    if c.balance and (c.wide is None or recipe.smooth is not None):
        raise BadInput(
            "clusters.balance: scales sorted tiles, and smooth does it otherwise; use --method rptq+ without smooth"
        )
    if c.wide is None and ((c.rotate and recipe.reorder) or a.grid == "tile"):
        what = "clusters.rotate" if c.rotate else "activations.grid: tile"
        raise BadInput(f"{what}: needs sorted tiles; use --method rptq+, or set clusters.tile and clusters.wide")


def _check_pruning(recipe: Recipe) -> None:
    p = recipe.pruning
    _share(p.sparsity, "pruning.sparsity")
    _share(p.first, "pruning.first")
    _one_of(p.method, tuple(PRUNING_METHODS), "pruning.method")  # a tuple, because a value from YAML may not hash
    _one_of(p.scope, ("block", "row", "layer"), "pruning.scope")
    _one_of(p.allocation, ALLOCATIONS, "pruning.allocation")
    _one_of(p.storage, STORAGES, "pruning.storage")
    _at_least(p.refine, 0, "pruning.refine")
    _at_least(p.block, 1, "pruning.block")
    if not prunes(recipe):
        return
    if p.first == 0:
        raise BadInput("pruning.first: 0 prunes no block; give the share of the blocks, for instance 0.66")
    if p.keep is not None:
        _, m = keep_of(p)
        if p.sparsity:
            raise BadInput(f"pruning: sparsity {p.sparsity} and keep {p.keep} exclude each other; give one")
        if p.allocation != "uniform":
            raise BadInput(f"pruning.allocation: {p.allocation} spreads a sparsity, but {p.keep} is fixed; use uniform")
        if recipe.weights.act_order and recipe.weights.bits < 16:
            raise BadInput(f"weights.act_order: would split the groups of {m}; add --set weights.act_order=false")
    if p.preserve and p.allocation != "uniform":
        raise BadInput(f"pruning.allocation: {p.allocation} does not know the zeros that preserve keeps; use uniform")
    if recipe.weights.solver != "gptq":
        raise BadInput(f"weights.solver: {recipe.weights.solver} does not prune; use gptq")
    if p.storage == "dense" and (recipe.reorder or quantizes(recipe)):
        raise BadInput("pruning.storage: dense stores plain weights, not quantized or reordered ones; use packed")


def _check_asymmetric(recipe: Recipe) -> None:
    w, p = recipe.weights, recipe.pruning
    _share(w.asymmetric, "weights.asymmetric")
    if not w.asymmetric:
        return
    if not recipe.true_sequential:
        raise BadInput(
            "weights.asymmetric: needs each linear's own input; set true_sequential=true or weights.asymmetric=0"
        )
    if p.method in ("wanda", "magnitude") and not p.refine if prunes(recipe) else w.bits < 16 and w.solver != "gptq":
        raise BadInput("weights.asymmetric: no solver moves the weights; leave it 0, or refine or quantize with gptq")


def _check_unordered(recipe: Recipe) -> None:
    """Without a reorder there are no clusters: BadInput for what asks for them."""
    w, a = recipe.weights, recipe.activations
    if a.grid == "cluster" and min(a.bits, a.norm_bits, a.q_bits, a.kv_bits) < 16:
        raise BadInput(f"activations.grid: method {recipe.method} makes no clusters; use --act-grid tensor or token")
    if w.groups == "cluster" and w.bits < 16:
        raise BadInput(f"weights.groups: method {recipe.method} makes no clusters; use --groups channel or a size")
    if a.grid == "tile" or recipe.clusters.wide is not None or a.clip:
        raise BadInput(f"clusters: method {recipe.method} makes none, so no tiles and no clipping; use --method rptq+")
    if recipe.clusters.tile is not None:
        raise BadInput(f"clusters.tile: method {recipe.method} makes no clusters; leave --tile out")
