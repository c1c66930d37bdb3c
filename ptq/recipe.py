"""The recipe: frozen dataclasses that say everything about one run.

A recipe is built from the command line, from YAML or from Python; the resolved copy is written into the output folder and its
hash guards `--resume`. Presets carry the RPTQ paper's names (arXiv 2304.01089, section 4) and methods name the baselines.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ptq.errors import BadInput

WEIGHT_BITS = (2, 3, 4, 8, 16)
ACTIVATION_BITS = (2, 3, 4, 5, 6, 8, 16)
KV_BITS = (2, 3, 4, 8, 16)
WEIGHT_SOLVERS = ("gptq", "rtn", "group4")
ALLOCATIONS = ("uniform", "owl", "error")
STORAGES = ("dense", "packed")
ACTIVATION_GRIDS = ("cluster", "tile", "tensor", "token")


@dataclass(frozen=True)
class Weights:
    """How weights are stored.

    `groups`: "auto" (the input's clusters, wide ones cut: see `ptq.weights.group_sizes`), "cluster" (the clusters, as in the paper),
    "channel" (one grid a row) or a group size. `solver`: "gptq", "rtn" (round to nearest) or "group4" (FlexGen's codec).
    `clip`: let gptq's grids leave out the ends of their ranges where that lowers the error. `descend`: turns of coordinate descent
    that each code takes after gptq's sweep.
    `asymmetric`: how far the solver aims, from 0 to 1, at what full precision makes of its own inputs, and not of the compressed
    model's: see `sparsegpt.asymmetric_target`. Needs true_sequential, and a second forward in full precision; leaves experts out.
    """

    bits: int = 16
    groups: str | int = "auto"
    solver: str = "gptq"
    damp: float = 0.01
    act_order: bool = True
    clip: bool = False
    descend: int = 0
    asymmetric: float = 0.0


@dataclass(frozen=True)
class Activations:
    """Bits per site; 16 leaves the site in full precision.

    `bits` inputs of the output and down projections, `norm_bits` norm outputs, `q_bits` queries, `kv_bits` keys and values
    (and so the cache), `softmax_bits` attention probabilities. `grid` of the linears' inputs is "cluster" (static, the method),
    "tile" (each token's own in each cluster), "tensor" (static) or "token" (each token's own). `clip` narrows static grids where
    that lowers the squared error on calibration tokens, of queries, keys and values only below 4 bits. `sinks`: so many tokens of a
    sequence, the first, keep full precision in every site and in the cache, and ranges leave them out.
    """

    bits: int = 16
    norm_bits: int = 16
    q_bits: int = 16
    kv_bits: int = 16
    softmax_bits: int = 16
    grid: str = "cluster"
    clip: bool = False
    sinks: int = 0


@dataclass(frozen=True)
class Clusters:
    """Cluster counts at the sites R1..R5 (R2 and R3: per head). `tile` puts boundaries on whole tiles of so many channels.

    `wide`: sort the channels by magnitude, make every tile a cluster whatever the counts say, and give this share of the tiles, the
    widest, 8 bits, at least one of them if it is above 0 (none at R3). Keys, values and queries have a grid a channel then.
    `rotate`: turn the channels of each cluster by a Hadamard matrix, without reordering all channels by one.
    """

    R1: int = 32
    R2: int = 4
    R3: int = 4
    R4: int = 32
    R5: int = 32
    tile: int | None = None
    wide: float | None = None
    rotate: bool = False


@dataclass(frozen=True)
class Pruning:
    """Which weights of the decoder linears become zero; nothing is pruned by default.

    `sparsity`: share of zeros, or `keep`: "n:m" keeps n of every m. `method`, `scope`, `block`, `preserve`: see `sparsegpt.prune` and
    `sparsegpt.Pattern`. `refine`: conjugate gradient steps on the kept weights. `allocation` of the sparsity over the linears: "uniform",
    "owl" (arXiv 2310.05175) or "error". `first`: only this share of the blocks, from the first on. `storage`: "dense" keeps the zeros
    and the source's layout, which loads anywhere; "packed" stores what is kept.
    """

    sparsity: float = 0.0
    keep: str | None = None
    method: str = "sparsegpt"
    refine: int = 10
    scope: str = "block"
    block: int = 128
    preserve: bool = False
    allocation: str = "uniform"
    first: float = 1.0
    storage: str = "dense"


@dataclass(frozen=True)
class CalibrationSpec:
    """Which text calibrates: `text` is a name, a file, or several joined by commas; windows of `seqlen` tokens."""

    text: str = "bundled"
    nsamples: int = 16
    seqlen: int = 512
    mode: str = "random"


@dataclass(frozen=True)
class Recipe:
    """One run, complete.

    `reorder` clusters and permutes channels; `smooth` is SmoothQuant's alpha, None for none. `true_sequential` solves each linear on
    inputs that the compressed linears before it made, also inside a block. `on_failure` "skip" leaves a module whose H cannot be
    factored as it is, and says so; "stop" ends the run.
    """

    model: str = ""
    method: str = "rptq"
    preset: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    reorder: bool = True
    smooth: float | None = None
    true_sequential: bool = False
    on_failure: str = "stop"
    pruning: Pruning = field(default_factory=Pruning)
    weights: Weights = field(default_factory=Weights)
    activations: Activations = field(default_factory=Activations)
    clusters: Clusters = field(default_factory=Clusters)
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    version: int = 1


def _bits(w: int, norm: int, q: int, kv: int, inputs: int, softmax: int) -> dict[str, dict[str, int]]:
    return {
        "weights": {"bits": w},
        "activations": {"bits": inputs, "norm_bits": norm, "q_bits": q, "kv_bits": kv, "softmax_bits": softmax},
    }


# The paper's settings, spelled out per site: W4A4 keeps norm outputs and softmax at 8 bits; "KV" settings touch only keys and values.
# W4A4KV4 is what later papers mean by it: the input of every linear, norm outputs too.
PRESETS: dict[str, dict[str, dict[str, int]]] = {
    "W4A16": _bits(w=4, norm=16, q=16, kv=16, inputs=16, softmax=16),
    "W4A8": _bits(w=4, norm=8, q=8, kv=8, inputs=8, softmax=8),
    "W4A4": _bits(w=4, norm=8, q=4, kv=4, inputs=4, softmax=8),
    "W4A4KV": _bits(w=4, norm=16, q=16, kv=4, inputs=16, softmax=16),
    "W4A3KV": _bits(w=4, norm=16, q=16, kv=3, inputs=16, softmax=16),
    "W3A3KV": _bits(w=3, norm=16, q=16, kv=3, inputs=16, softmax=16),
    "W4A4KV4": _bits(w=4, norm=4, q=16, kv=4, inputs=4, softmax=16),
}

METHODS: dict[str, dict[str, Any]] = {
    "rptq": {},
    "rptq+": {
        "true_sequential": True,
        "weights": {"asymmetric": 0.5, "clip": True, "descend": 3},
        "activations": {"grid": "tile", "clip": True, "sinks": 1},
        "clusters": {"tile": 64, "wide": 0.125, "rotate": True},
    },
    "rtn": {"reorder": False, "weights": {"solver": "rtn", "groups": "channel"}, "activations": {"grid": "tensor"}},
    "gptq": {"reorder": False, "weights": {"solver": "gptq", "groups": "channel"}, "activations": {"grid": "tensor"}},
    "smoothquant": {
        "reorder": False,
        "smooth": 0.5,
        "weights": {"solver": "rtn", "groups": "channel"},
        "activations": {"grid": "tensor"},
    },
    "peg": {
        "weights": {"solver": "rtn"},
        "activations": {"grid": "cluster"},
        "clusters": {"tile": 64, "wide": 0},
    },
    "atom": {
        "activations": {"grid": "tile"},
        "clusters": {"tile": 64, "wide": 0.125},
    },
    "quarot": {
        "reorder": False,
        "weights": {"solver": "gptq", "groups": 64},
        "activations": {"grid": "token"},
        "clusters": {"rotate": True},
    },
    "group4": {"reorder": False, "weights": {"solver": "group4"}, "activations": {"grid": "token"}},
}


def _pruning(method: str, refine: int, asymmetric: float) -> dict[str, Any]:
    weights = {"groups": "channel", "act_order": False, "asymmetric": asymmetric}
    return {
        "reorder": False,
        "true_sequential": True,
        "weights": weights,
        "pruning": {"method": method, "refine": refine},
    }


PRUNING_METHODS: dict[str, dict[str, Any]] = {
    "sparsegpt": _pruning("sparsegpt", 10, 0.5),
    "admm": _pruning("admm", 15, 0.5),
    "alps": _pruning("alps", 10, 0.5),
    "wanda": _pruning("wanda", 0, 0.0),
    "magnitude": _pruning("magnitude", 0, 0.0),
}

METHOD_NOTES = {
    "rptq": "reorder channels into clusters, one static grid a cluster, GPTQ weights (the paper's method)",
    "rptq+": "sort channels into tiles, a Hadamard matrix in each, the widest tile at 8 bits, first token spared, GPTQ weights that "
    "aim at full precision's outputs; grids a token and tile, or static with --act-grid cluster",
    "rtn": "round to nearest: weights per output channel, activations per tensor (or --act-grid token)",
    "gptq": "GPTQ weights per output channel, activations per tensor (or --act-grid token)",
    "smoothquant": "SmoothQuant, alpha 0.5, round-to-nearest weights, activations per tensor (or --act-grid token)",
    "peg": "sorted channels in equal groups, a static grid each (PEG, arXiv 2109.12948), round-to-nearest weights",
    "atom": "sorted channels in tiles, the widest at 8 bits, grids a token and tile (after Atom, arXiv 2310.19102), GPTQ weights",
    "quarot": "a Hadamard matrix over all channels before each linear (after QuaRot, arXiv 2404.00456), grids a token, GPTQ weights "
    "in groups of 64",
    "group4": "FlexGen's codec: 4 bits in groups of 64 for weights and, with --kv-bits 4, for keys and values",
    "sparsegpt": "SparseGPT's sweep toward full precision's outputs, then conjugate gradients on the kept weights",
    "admm": "the same, mask and weights by a short ADMM from SparseGPT's result",
    "alps": "the same, ADMM until the mask stands (ALPS)",
    "wanda": "|w| times the norm of its input, row by row; kept weights stay as they are",
    "magnitude": "|w|; kept weights stay as they are (the baseline)",
}


def suggest(name: str, known) -> str:
    """`" (did you mean 'x'?)"` or the list of what is known."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(map(str, known))})"


def merge(base: Any, overrides: dict[str, Any], where: str = "recipe") -> Any:
    """A copy of the dataclass `base` with `overrides` applied recursively. An unknown key is a BadInput with a suggestion."""
    known = {f.name: getattr(base, f.name) for f in fields(base)}
    changes = {}
    for key, value in overrides.items():
        if key not in known:
            raise BadInput(f"{where}: unknown key {key!r}{suggest(key, known)}")
        nested = dataclasses.is_dataclass(known[key])
        if nested and not isinstance(value, dict):
            raise BadInput(
                f"{where}.{key}: expected a mapping with keys {', '.join(f.name for f in fields(known[key]))}, got {value!r}"
            )
        changes[key] = merge(known[key], value, f"{where}.{key}") if nested else value
    return replace(base, **changes)


def build(*, method: str = "rptq", preset: str | None = None, **overrides: Any) -> Recipe:
    """A validated recipe: the method's defaults, then the preset's bits, then `overrides` (nested dicts).

    Raises:
        BadInput: unknown method, preset or key (with a suggestion), or a value outside its range.
    """
    methods = METHODS | PRUNING_METHODS
    if not isinstance(method, str) or method not in methods:
        raise BadInput(f"unknown method {method!r}{suggest(method, methods)}")
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise BadInput(f"unknown preset {preset!r}{suggest(preset, PRESETS)}")
    recipe = merge(Recipe(method=method, preset=preset), methods[method])
    if preset is not None:
        recipe = merge(recipe, PRESETS[preset])
    return check(merge(recipe, overrides))


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
    _share(w.damp, "weights.damp")
    if w.damp in (0, 1):
        raise BadInput(f"weights.damp: {w.damp!r} must lie inside 0 and 1, for instance 0.01")
    if recipe.smooth is not None:
        _share(recipe.smooth, "smooth")
    _at_least(recipe.seed, 0, "seed")
    switches = {
        "reorder": recipe.reorder,
        "clusters.rotate": c.rotate,
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
    for where, value in texts.items():
        if not isinstance(value, str):
            raise BadInput(f"{where}: {value!r} is not text; put it in quotes")
    return recipe


def _check_tiles(recipe: Recipe) -> None:
    a, c = recipe.activations, recipe.clusters
    _at_least(a.sinks, 0, "activations.sinks")
    if c.wide is not None:
        _share(c.wide, "clusters.wide")
        if c.tile is None:
            raise BadInput("clusters.wide: is a share of tiles; set clusters.tile to 64, for instance")
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


def prunes(recipe: Recipe) -> bool:
    """Whether the recipe makes zeros."""
    return recipe.pruning.sparsity > 0 or recipe.pruning.keep is not None


def quantizes(recipe: Recipe) -> bool:
    """Whether any weight or activation has fewer than 16 bits."""
    return recipe.weights.bits < 16 or quantizes_activations(recipe)


def quantizes_activations(recipe: Recipe) -> bool:
    """Whether any activation has fewer than 16 bits."""
    a = recipe.activations
    return min(a.bits, a.norm_bits, a.q_bits, a.kv_bits, a.softmax_bits) < 16


def pruned_blocks(pruning: Pruning, blocks: int) -> int:
    """How many of `blocks`, from the first on: the share `first` of them, rounded up."""
    return math.ceil(round(pruning.first * blocks, 9))  # 0.7 * 10 is a little more than 7


def keep_of(pruning: Pruning) -> tuple[int, int]:
    """(n, m) of "n:m". Raises BadInput unless 0 < n < m <= 16."""
    if not isinstance(pruning.keep, str):  # YAML reads 2:4 as a number in base 60
        raise BadInput(f"pruning.keep: {pruning.keep!r} is not text; put n:m in quotes, for instance '2:4'")
    found = re.fullmatch(r"([0-9]{1,2}):([0-9]{1,2})", pruning.keep)
    if found:
        n, m = int(found[1]), int(found[2])
        if 0 < n < m <= 16:
            return n, m
    raise BadInput(f"pruning.keep: {pruning.keep!r} is not n:m with 0 < n < m <= 16; 2:4 keeps 2 of every 4")


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


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain nested dict, ready for YAML or JSON."""
    return dataclasses.asdict(recipe)


def fingerprint(recipe: Recipe) -> str:
    """sha256 of what the recipe sets: two runs with the same recipe, model and calibration tokens write the same bytes."""
    # Only what differs from the defaults, so that a key of a later release changes no older fingerprint.
    changed = _difference(to_dict(recipe), to_dict(Recipe())) | {"version": recipe.version}
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()


def _difference(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The entries of nested `values` that `defaults` has otherwise."""
    nested = {key: _difference(value, defaults[key]) for key, value in values.items() if isinstance(value, dict)}
    plain = {key: value for key, value in values.items() if key not in nested and value != defaults[key]}
    return plain | {key: value for key, value in nested.items() if value}


def load_yaml(path: str | Path) -> Recipe:
    """Read a recipe file. Keys as in `Recipe`; `method` and `preset` fill in what is not spelled out.

    Raises:
        BadInput: unreadable file, not a mapping, an unknown key or a bad value.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError) as err:
        raise BadInput(f"recipe {path}: cannot be read: {err}") from err
    except yaml.YAMLError as err:
        raise BadInput(f"recipe {path}: not YAML: {' '.join(str(err).split())}") from err
    if not isinstance(data, dict):
        raise BadInput(f"recipe {path}: expected a mapping at the top, got {type(data).__name__}")
    odd = [key for key in data if not isinstance(key, str)]
    if odd:
        raise BadInput(f"recipe {path}: unknown key {odd[0]!r}{suggest(odd[0], [f.name for f in fields(Recipe)])}")
    return build(**{"method": "rptq", **data})


def dump_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML text."""
    import yaml

    return yaml.safe_dump(to_dict(recipe), sort_keys=False)
