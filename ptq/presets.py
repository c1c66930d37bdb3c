"""Methods and presets by name: what each sets in a recipe.

Presets carry the RPTQ paper's names (arXiv 2304.01089, section 4) and methods name the baselines.
"""

from __future__ import annotations

from typing import Any


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
        "weights": {"damp": 0.1, "asymmetric": 0.5, "clip": True, "descend": 3, "fine": 0.041},
        "activations": {"grid": "tile", "clip": True, "sinks": 1},
        "clusters": {"tile": 64, "wide": 0.16, "allot": "block", "rotate": True},
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
    "rptq+": "sort channels into tiles, a Hadamard matrix in each, the costliest tiles at 8 bits, first token spared, GPTQ weights that "
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
