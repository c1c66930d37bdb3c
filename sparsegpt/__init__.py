"""The layer solver: a weight and its H in, quantized codes out. Tensors only, no model."""

from sparsegpt.errors import SolveError
from sparsegpt.factor import Factor, activation_order, factor
from sparsegpt.grid import WeightGrid, dequantize, encode, fit_grid, quantize_codes
from sparsegpt.nearest import round_to_nearest
from sparsegpt.solution import Solution
from sparsegpt.solve import solve

__all__ = [
    "Factor",
    "Solution",
    "SolveError",
    "WeightGrid",
    "activation_order",
    "dequantize",
    "encode",
    "factor",
    "fit_grid",
    "quantize_codes",
    "round_to_nearest",
    "solve",
]
