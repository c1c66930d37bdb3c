"""The smallest entries of a tensor of scores, by the fastest way that the tensor's device and dtype have."""

from __future__ import annotations

import torch

from lowbit.cpu import native
from lowbit.cpu.lowest import lowest as native_lowest


def lowest(score: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` smallest entries of `score` are: what one threshold over a mask block prunes (SparseGPT, arXiv
    2301.00774, section 3.3), exactly as many as asked for.

    Args:
        score: floating point, any shape, strides and device, without NaN, which has no place in the order. -0 equals 0.
            A float32 matrix on the CPU whose rows are contiguous (columns of a wider one, say) is not copied.
        count: how many; less than 0 is 0, more than there are is all.

    Returns:
        bool in score's shape, contiguous: True for the smallest, of equal entries the first in row-major order. Does not
        depend on the number of threads.

    Raises:
        ValueError: score is not floating point, count no whole number.
    """
    if not score.is_floating_point():
        raise ValueError(f"score must be floating point, got {score.dtype}: convert it, for example by .float()")
    if not isinstance(count, int):
        raise ValueError(f"count must be a whole number, got {count!r}: round it")
    if count <= 0 or count >= score.numel():
        return torch.full(score.shape, count > 0, dtype=torch.bool, device=score.device)
    if score.dtype == torch.float32 and score.device.type == "cpu" and native.library():
        return native_lowest(score, count)
    return _lowest_by_threshold(score, count)


def _lowest_by_threshold(score: torch.Tensor, count: int) -> torch.Tensor:
    flat = score.reshape(-1)  # [n]
    threshold = flat.kthvalue(count).values
    chosen = flat < threshold
    missing = count - int(chosen.sum())
    chosen[(flat == threshold).nonzero()[:missing, 0]] = True
    return chosen.view(score.shape)
