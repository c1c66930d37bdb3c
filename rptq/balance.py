"""Per-channel scales that share a channel's size evenly between the activation and the weight."""

from __future__ import annotations

import torch
from torch import Tensor


def balance_factors(energy: Tensor, weight_energy: Tensor) -> Tensor:
    """s_j = sqrt(rms(X_j) / ||W_j||), float32 [C]: use X / s and W * s, and X W^T is unchanged.

    Channels whose errors are spread evenly over a tile, as after a Hadamard transform, make an output error that goes with
    sum_j E[X_j^2] / s_j^2 times sum_j s_j^2 ||W_j||^2, whether the activation is rounded or the weight. It is least at
    s_j^2 = rms(X_j) / ||W_j|| (Cauchy-Schwarz), where it is (sum_j rms(X_j) ||W_j||)^2. SmoothQuant (arXiv 2211.10438, eq. 4) at
    alpha 1/2 is the same with maxima.
    energy: E[X_j^2] up to a common factor, [C]. weight_energy: ||W_j||^2, over all linears fed by X, [C]. The geometric mean of s is
    1; a channel that is zero in X or in W gets 1. ValueError if shapes differ or values are negative or not finite.
    """
    if energy.shape != weight_energy.shape or energy.ndim != 1:
        raise ValueError(f"energies {list(energy.shape)} and {list(weight_energy.shape)} must both be [C]")
    for what in (energy, weight_energy):
        if not (torch.isfinite(what) & (what >= 0)).all():
            raise ValueError(
                f"{int((~(torch.isfinite(what) & (what >= 0))).sum())} energies are negative or not finite"
            )
    live = (energy > 0) & (weight_energy > 0)
    exponent = (energy.double().log2() - weight_energy.double().log2()).where(live, 0.0) / 4
    mean = exponent[live].mean() if live.any() else exponent.new_zeros(())
    return torch.exp2(exponent - mean).where(live, 1.0).float()
