"""x^T x of activations, one half of it: the Hessian of a linear's squared error (SparseGPT, arXiv 2301.00774, section 3.2)."""

from __future__ import annotations

import torch

from lowbit.cpu import native

# Panels of columns: more of them skip more of the mirrored half, fewer keep the products large. Eight do 9/16 of the work.
PANELS = 8


def add_gram(upper: torch.Tensor, x: torch.Tensor) -> None:
    """upper[i, j] += sum_t x[t, i] x[t, j] for j >= i; what is below the diagonal afterwards has no meaning.

    The products of one call are summed in float32, calls in float64.

    Args:
        upper: float64 [C, C], contiguous, changed in place.
        x: float32 [T, C].

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    C = x.shape[-1]
    if x.dim() != 2 or x.dtype != torch.float32:
        raise ValueError(f"x must be float32 [T, C], got {x.dtype} {list(x.shape)}")
    if upper.shape != (C, C) or upper.dtype != torch.float64 or upper.device != x.device or not upper.is_contiguous():
        found = f"{upper.dtype} {list(upper.shape)} on {upper.device}"
        raise ValueError(f"upper must be contiguous float64 [{C}, {C}] on {x.device}, got {found}")
    if x.device.type == "cpu" and native.fast_avx2():
        from lowbit.cpu.gram import add_gram as kernel

        return kernel(upper, x.contiguous())
    for columns in panels(C):
        upper[: columns.stop, columns] += x[:, : columns.stop].t() @ x[:, columns]


def panels(channels: int) -> list[slice]:
    """Column slices of near-equal width, at most PANELS of at least 64."""
    width = max(64, -(-channels // PANELS))
    return [slice(start, min(start + width, channels)) for start in range(0, channels, width)]
