"""What a solver hands back, and the layer error it is judged by."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsegpt.factor import Factor
from sparsegpt.grid import WeightGrid

# Columns of the product held at once, so that it never needs a second [C, R].
BLOCK = 512


@dataclass(frozen=True)
class Solution:
    """A compressed weight, in the original column order.

    weight: float32 [R, C]. mask: bool [R, C], False where pruned, None where nothing was to be pruned.
    codes: uint8 [R, C] and grid: its WeightGrid, weight being exactly dequantize(codes, grid); None without quantization.
    loss: ||(W - weight) V||_F^2 over live channels, which is tr((W - weight)(H + lambda I)(W - weight)^T): damping is
    included, units are those of H. relative_error: loss / ||W V||_F^2, 0 for W = 0,
    over evenly spaced rows where there are more than 512. Both None when no factor was given.
    """

    weight: Tensor
    mask: Tensor | None = None
    codes: Tensor | None = None
    grid: WeightGrid | None = None
    loss: float | None = None
    relative_error: float | None = None


def check_finite(W: Tensor) -> None:
    """ValueError unless every weight is a finite float32 (a float64 may be beyond it)."""
    W = W.float()
    # A finite sum has finite terms, and is faster to have than a test of each.
    if not torch.isfinite(W.sum()) and not torch.isfinite(W).all():
        raise ValueError(f"W {list(W.shape)} holds NaN, Inf or values beyond float32: look at the checkpoint")


def by_step(D: Tensor, factor: Factor) -> Tensor:
    """D [R, C] laid out for the sweep: float32 [C, R], a fresh copy, one contiguous row for each processing step."""
    # Rows of a contiguous matrix are gathered several times faster than columns.
    by_channel = D.t().contiguous()  # [C, R]
    return by_channel.index_select(0, factor.order).float()


def energy(D: Tensor, factor: Factor) -> float:
    """||D^T V||_F^2 over live channels for D [C, R] from `by_step`: layer error of D^T (arXiv 2301.00774, eq. 1)."""
    live = ~factor.dead[factor.order]
    total = torch.zeros((), dtype=torch.float64, device=D.device)
    for start in range(0, D.shape[0], BLOCK):
        columns = slice(start, min(start + BLOCK, D.shape[0]))
        product = factor.V[: columns.stop, columns].t() @ D[: columns.stop]  # [block, R]
        total += product.square_().sum(1, dtype=torch.float64)[live[columns]].sum()
    return total.item()


def relative(loss: float, reference: float) -> float:
    """loss / reference, and 0 where both vanish: V is regular, so a zero reference means there was nothing to lose."""
    return loss / reference if reference > 0 else 0.0
