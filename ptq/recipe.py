"""The recipe: frozen dataclasses that say everything about one run.

The resolved copy is written into the output folder and its hash guards `--resume`. `ptq.recipe_build` makes one from the command
line, from YAML or from Python.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from ptq.errors import BadInput

WEIGHT_BITS = (2, 3, 4, 8, 16)
HEAD_BITS = (4, 8, 16)
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
    `fine`: this share of a block's weights, in the groups whose rounding costs most for their bits (`ptq.fine`), has twice the bits, at
    most 8; of weights at 8 and 16 bits none has. `head`: bits of the output head, an untied copy in groups of 64 (`ptq.head`).
    """

    bits: int = 16
    groups: str | int = "auto"
    solver: str = "gptq"
    damp: float = 0.01
    act_order: bool = True
    clip: bool = False
    descend: int = 0
    asymmetric: float = 0.0
    fine: float = 0.0
    head: int = 16


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

    `wide`: sort the channels by magnitude, make every tile a cluster whatever the counts say, and give this share of the tiles 8 bits,
    at least one of them if it is above 0. Keys, values and queries have a grid a channel then. `allot`: "site" gives them to the widest
    of each site's tiles (none at R3), "block" to those of the block whose rounding costs most (`ptq.wide.rounding_costs`).
    `balance`: scale the channels first, so that activation and weight share their size (`rptq.balance_factors`).
    `rotate`: turn the channels of each cluster by a Hadamard matrix, without reordering all channels by one.
    """

    R1: int = 32
    R2: int = 4
    R3: int = 4
    R4: int = 32
    R5: int = 32
    tile: int | None = None
    wide: float | None = None
    allot: str = "site"
    rotate: bool = False
    balance: bool = False


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


def prunes(recipe: Recipe) -> bool:
    """Whether the recipe makes zeros."""
    return recipe.pruning.sparsity > 0 or recipe.pruning.keep is not None


def quantizes(recipe: Recipe) -> bool:
    """Whether any weight or activation has fewer than 16 bits."""
    return min(recipe.weights.bits, recipe.weights.head) < 16 or quantizes_activations(recipe)


def quantizes_activations(recipe: Recipe) -> bool:
    """Whether any activation has fewer than 16 bits."""
    a = recipe.activations
    return min(a.bits, a.norm_bits, a.q_bits, a.kv_bits, a.softmax_bits) < 16


def moves_channels(recipe: Recipe) -> bool:
    """Whether channels are permuted, rotated or scaled."""
    return recipe.reorder or recipe.clusters.rotate or recipe.smooth is not None


def wants_sample(recipe: Recipe) -> bool:
    """Whether some of the tokens themselves tell grids or bits, not ranges alone."""
    clusters = recipe.clusters
    return recipe.activations.clip or clusters.allot == "block" or clusters.balance or has_fine_groups(recipe)


def has_fine_groups(recipe: Recipe) -> bool:
    """Whether some weight groups have more bits than others."""
    return recipe.weights.fine > 0 and recipe.weights.bits <= 4


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
