"""Per-channel scales that move an activation's outliers into the weights (SmoothQuant, arXiv 2211.10438)."""

from __future__ import annotations

import torch
from torch import Tensor

from rptq.ranges import ChannelRange

LARGEST_FACTOR = 1e5


def smooth_factors(ranges: ChannelRange, weight_max: Tensor, *, alpha: float = 0.5) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (SmoothQuant, arXiv 2211.10438, equation 4), float32 [C].

    ranges: of the linear's input X [C]. weight_max: [C], largest |W| of each input column, over every linear fed by X.
    Use X / s and W * s: X W^T is unchanged. Factors lie within 1e-5 .. 1e5; a channel that is zero in X or in W gets 1,
    for there is nothing to balance. ValueError if the shapes differ, alpha is outside 0 .. 1, or weight_max is negative
    or not finite.
    """
    if weight_max.shape != ranges.min.shape:
        raise ValueError(f"weight maxima {list(weight_max.shape)} do not match {ranges.min.numel()} channels")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in 0 .. 1, got {alpha}")
    w = weight_max.float()
    if not (torch.isfinite(w) & (w >= 0)).all():
        raise ValueError(f"{int((~(torch.isfinite(w) & (w >= 0))).sum())} weight maxima are negative or not finite")
    x = torch.maximum(ranges.min.abs(), ranges.max.abs())
    s = (x**alpha / w ** (1 - alpha)).clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)
    return torch.where((x > 0) & (w > 0), s, torch.ones_like(s))
