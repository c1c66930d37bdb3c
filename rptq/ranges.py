"""Per-channel ranges of an activation, kept as a running minimum and maximum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ChannelRange:
    """Smallest and largest value of each channel over every token seen.

    min, max: float32 [C], finite, min <= max. ValueError if the shapes differ, a value is not finite or min > max.
    """

    min: Tensor
    max: Tensor

    def __post_init__(self) -> None:
        if self.min.ndim != 1 or self.min.shape != self.max.shape:
            raise ValueError(
                f"range needs min and max of one shape [C], got {list(self.min.shape)} and {list(self.max.shape)}"
            )
        wrong = ~(torch.isfinite(self.min) & torch.isfinite(self.max) & (self.min <= self.max))
        if wrong.any():
            raise ValueError(f"channel range is not finite or has min > max in channels {_some(wrong)}")

    def merge(self, other: ChannelRange) -> ChannelRange:
        """The range over the tokens of both. ValueError if the channel counts differ."""
        if self.min.shape != other.min.shape:
            raise ValueError(f"cannot merge ranges of {self.min.numel()} and {other.min.numel()} channels")
        return ChannelRange(torch.minimum(self.min, other.min), torch.maximum(self.max, other.max))

    def permuted(self, perm: Tensor) -> ChannelRange:
        """The range of x[..., perm]; perm int64 [C]."""
        return ChannelRange(self.min[perm], self.max[perm])


def update(ranges: ChannelRange | None, x: Tensor) -> ChannelRange | None:
    """The range after seeing x as well (RPTQ, arXiv 2304.01089: a true minimum and maximum, no averaging).

    x: [..., C], any float dtype; the leading dims are tokens. ranges: what came before, None at the start.
    Returns float32 on x's device; with no tokens in x, `ranges` itself. ValueError on NaN or infinity (also when a
    float64 value does not fit float32) or on a channel count other than that of `ranges`.
    """
    if x.ndim == 0:
        raise ValueError("an activation needs a channel dimension, got a scalar; pass [..., C]")
    channels = x.shape[-1]
    if ranges is not None and ranges.min.numel() != channels:
        raise ValueError(f"activation has {channels} channels, its range so far has {ranges.min.numel()}")
    tokens = x.detach().reshape(-1, channels) if x.numel() else x.new_empty(0, channels)  # [..., C] -> [T, C]
    if tokens.shape[0] == 0:
        return ranges
    low, high = tokens.amin(0).float(), tokens.amax(0).float()
    # amin and amax carry NaN and infinity through, so the full scan below is paid for only when something is wrong.
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        bad = ~torch.isfinite(tokens.float())
        raise ValueError(
            f"activation has {int(bad.sum())} NaN or infinite values, in {int(bad.any(0).sum())} of {channels} "
            f"channels ({_some(bad.any(0))}); calibrate in a wider dtype or drop the text that causes them"
        )
    seen = ChannelRange(low, high)
    return seen if ranges is None else ranges.merge(seen)


def _some(mask: Tensor) -> str:
    """The first few true positions of a mask [C], for a message."""
    where = mask.nonzero().flatten().tolist()
    return ", ".join(map(str, where[:8])) + (", ..." if len(where) > 8 else "")
