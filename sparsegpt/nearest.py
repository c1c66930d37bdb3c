"""Round to nearest: the baseline that every solver must beat."""

import torch
from torch import Tensor

from sparsegpt.factor import Factor
from sparsegpt.grid import dequantize, encode, fit_grid
from sparsegpt.solution import Solution, by_step, energy, relative


def round_to_nearest(
    W: Tensor, *, sizes: Tensor, bits: int, scale_dtype: torch.dtype = torch.float16, factor: Factor | None = None
) -> Solution:
    """Quantize W float [R, C] with no compensation, on the same grids as `solve`. The factor is used only for the loss.

    Raises ValueError for W that is not a finite matrix, bits outside 2..8, bad sizes, or a factor of another width.
    """
    grid = fit_grid(W, sizes, bits, scale_dtype=scale_dtype)
    codes = encode(W, grid)
    weight = dequantize(codes, grid)
    if factor is None:
        return Solution(weight, codes=codes, grid=grid)
    if W.shape[1] != factor.order.numel():
        raise ValueError(f"W has {W.shape[1]} columns, the factor {factor.order.numel()}: both must read one input")
    loss = energy(by_step(W.float() - weight, factor), factor)
    error = relative(loss, energy(by_step(W, factor), factor))
    return Solution(weight, codes=codes, grid=grid, loss=loss, relative_error=error)
