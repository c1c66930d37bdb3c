"""The layer solver: a weight and its H in, pruned or quantized weights out. Tensors only, no model."""

from sparsegpt.admm import admm, alps
from sparsegpt.descend import descend
from sparsegpt.errors import SolveError
from sparsegpt.factor import Factor, activation_order, factor
from sparsegpt.grid import WeightGrid, dequantize, encode, equal_groups, fit_grid, group_index
from sparsegpt.nearest import round_to_nearest
from sparsegpt.pattern import Pattern, lowest
from sparsegpt.prune import METHODS, prune
from sparsegpt.refine import refine
from sparsegpt.scores import choose
from sparsegpt.solution import Solution
from sparsegpt.solve import solve
from sparsegpt.sweep import sweep
from sparsegpt.target import asymmetric_target

__all__ = [
    "METHODS",
    "Factor",
    "Pattern",
    "Solution",
    "SolveError",
    "WeightGrid",
    "activation_order",
    "admm",
    "alps",
    "asymmetric_target",
    "choose",
    "dequantize",
    "descend",
    "encode",
    "equal_groups",
    "factor",
    "fit_grid",
    "group_index",
    "lowest",
    "prune",
    "refine",
    "round_to_nearest",
    "solve",
    "sweep",
]
