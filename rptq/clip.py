"""Narrower grids: at few bits it pays to clip the tails, so that the bulk gets a smaller step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rptq.grid import ActivationGrid, cluster_range, fake_quantize, fit_grid
from rptq.ranges import ChannelRange

# Both ends together first, then each end alone around the best; the grid fitted to the whole range is always in the running.
TOGETHER = tuple(1 - 0.05 * i for i in range(1, 17))
APART = (0.7, 0.8, 0.9, 1.1, 1.2)


def clip_ranges(
    ranges: ChannelRange, sample: Tensor, sizes: Tensor, bits: int | Tensor, *, weight: Tensor | None = None
) -> ChannelRange:
    """Ranges cut to the [m', M'] of each cluster whose grid has the least weighted squared error on a sample.

    Minimizes, cluster by cluster, sum_t sum_{c in g} w_c (x_tc - xhat_tc)^2 over m' = a m, M' = b M, 0.2 <= a, b <= 1, found by a line
    search on a = b and then on either. A cluster whose error no cut lowers keeps its range.
    ranges: of the reordered channels [C]. sample: [T, C], some of the tokens they were taken from. sizes: int64 [G]. weight: [C],
    what a channel's error counts, for instance the energy of its weight column (default 1).
    ValueError if shapes do not fit.
    """
    if sample.ndim != 2 or sample.shape[1] != ranges.min.numel():
        raise ValueError(f"a sample of {list(sample.shape)} does not fit ranges of {ranges.min.numel()} channels")
    w = torch.ones_like(ranges.min) if weight is None else weight.float()
    cluster = torch.arange(sizes.numel(), device=sizes.device).repeat_interleave(sizes)  # [C]
    x = sample.float()

    def error(low: Tensor, high: Tensor) -> Tensor:
        """[G], float64: the weighted squared error of the grids on [low, high]."""
        by_channel = (fake_quantize(x, _grid(low, high, sizes, bits)) - x).square().sum(0) * w  # [C]
        return torch.zeros_like(low, dtype=torch.float64).index_add(0, cluster, by_channel.double())

    low, high = cluster_range(ranges, sizes)
    best_low, best_high = low, high
    least = error(low, high)

    def consider(a: Tensor, b: Tensor) -> None:
        nonlocal best_low, best_high, least
        a = torch.maximum(a, low)
        b = torch.maximum(torch.minimum(b, high), a)
        found = error(a, b)
        better = found < least
        best_low, best_high, least = (
            torch.where(better, new, old) for new, old in ((a, best_low), (b, best_high), (found, least))
        )

    for share in TOGETHER:
        consider(low * share, high * share)
    for share in APART:
        consider(best_low * share, best_high)
        consider(best_low, best_high * share)
    return ChannelRange(
        torch.minimum(torch.maximum(ranges.min, best_low[cluster]), best_high[cluster]),
        torch.maximum(torch.minimum(ranges.max, best_high[cluster]), best_low[cluster]),
    )


def _grid(low: Tensor, high: Tensor, sizes: Tensor, bits: int | Tensor) -> ActivationGrid:
    one = fit_grid(ChannelRange(low, high), torch.ones_like(sizes), bits)
    return replace(one, sizes=sizes)
