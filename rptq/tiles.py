"""Clusters whose boundaries fall on the tiles of a kernel, and what padding ragged clusters to tiles would cost."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rptq.grid import cost_of_range
from rptq.order import Order, check_sizes
from rptq.ranges import ChannelRange


def tile_aligned_order(
    ranges: ChannelRange, n_clusters: int, tile: int, *, bits: int, weight: Tensor | None = None
) -> Order:
    """Reorder C channels into at most n_clusters clusters of whole tiles, at the least quantization_cost found.

    ranges: [C]. weight: [C], what a channel's error counts (default 1). The channels are sorted by several keys; for
    each, dynamic programming places the boundaries on multiples of `tile` where
        sum over clusters of w_g s_g^2 / 12,  s_g = (M_g - m_g) / (2^bits - 1),  w_g = sum of weight over the cluster
    is least, and the cheapest of these orders is kept. If C is no multiple of tile, the last tile is short.
    ValueError if C is 0, n_clusters or tile is below 1, or weight is not [C], finite and non-negative.
    """
    channels = ranges.min.numel()
    if channels == 0 or n_clusters < 1 or tile < 1:
        raise ValueError(f"{channels} channels, {n_clusters} clusters, tiles of {tile}: each must be at least 1")
    w = torch.ones_like(ranges.min) if weight is None else weight
    if w.shape != ranges.min.shape or not (torch.isfinite(w) & (w >= 0)).all():
        raise ValueError(f"weight must be [{channels}], finite and not negative, got {list(w.shape)}")
    found = []
    for key in _sort_keys(ranges):
        perm = key.argsort(stable=True)
        low, high, w_g = _tile_runs(ranges.permuted(perm), w[perm], tile)
        cost, ends = _cheapest_cut(cost_of_range(low, high, w_g, bits).cpu(), n_clusters)
        found.append((cost, perm, ends))
    _, perm, ends = min(found, key=lambda candidate: candidate[0])
    bounds = torch.tensor([0, *ends], device=perm.device) * tile
    return Order(perm, bounds.clamp(max=channels).diff())


def sorted_tiles(ranges: ChannelRange, tile: int) -> Order:
    """Reorder C channels by their largest magnitude, ascending, and make every tile a cluster.

    The widest channels end up together in the last tiles, where they can have more bits; with a grid for each tile, sorting alone
    is what boundaries can give. If C is no multiple of tile, the first tile is short.
    ranges: [C]. ValueError if C is 0 or tile is below 1.
    """
    channels = ranges.min.numel()
    if channels == 0 or tile < 1:
        raise ValueError(f"{channels} channels, tiles of {tile}: each must be at least 1")
    perm = torch.maximum(ranges.min.abs(), ranges.max.abs()).argsort(stable=True)
    sizes = [channels % tile] * (channels % tile > 0) + [tile] * (channels // tile)
    return Order(perm, torch.tensor(sizes, device=perm.device))


def pad_to_tiles(sizes: Tensor, tile: int) -> Tensor:
    """Cluster sizes int64 [G] rounded up to whole tiles, int64 [G]; minus sizes, the pad channels of each cluster.

    ValueError if a size or tile is below 1.
    """
    check_sizes(sizes, int(sizes.sum()))
    if tile < 1:
        raise ValueError(f"a tile has at least 1 channel, got {tile}")
    return (sizes + tile - 1) // tile * tile


def padding_cost(sizes: Tensor, tile: int) -> float:
    """Channels that padding each cluster to whole tiles adds, as a fraction of the channels. Raises as pad_to_tiles."""
    channels = int(sizes.sum())
    return (int(pad_to_tiles(sizes, tile).sum()) - channels) / max(channels, 1)


def _sort_keys(ranges: ChannelRange) -> tuple[Tensor, ...]:
    """Magnitude does best on heavy tails, one end of the range where offsets outweigh widths, the width on outliers."""
    low, high = ranges.min, ranges.max
    return torch.maximum(low.abs(), high.abs()), high - low, high, -low


def _tile_runs(ranges: ChannelRange, weight: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """min, max and summed weight of every run of tiles i .. j, [N, N] each; empty runs (i > j) are inf, -inf, 0."""
    short = -ranges.min.numel() % tile
    low = pad(ranges.min, (0, short), value=torch.inf).view(-1, tile).amin(1)  # [C] -> [N, tile] -> [N]
    high = pad(ranges.max, (0, short), value=-torch.inf).view(-1, tile).amax(1)  # [C] -> [N, tile] -> [N]
    w = pad(weight.double(), (0, short)).view(-1, tile).sum(1)  # [C] -> [N, tile] -> [N]
    n = low.numel()
    run = torch.ones(n, n, dtype=torch.bool, device=low.device).triu()
    return (
        low.expand(n, n).where(run, torch.inf).cummin(1).values,
        high.expand(n, n).where(run, -torch.inf).cummax(1).values,
        w.expand(n, n).where(run, 0.0).cumsum(1),
    )


def _cheapest_cut(cost: Tensor, n_clusters: int) -> tuple[float, list[int]]:
    """Cut N tiles into at most n_clusters runs of least total cost.

    cost: float64 [N, N], cost[i, j] of the run i .. j. Returns the total and the end (exclusive) of each run.
    Extra clusters that gain nothing are not used.
    """
    n = cost.shape[0]
    cost = cost.where(torch.ones(n, n, dtype=torch.bool).triu(), torch.inf)
    best = cost[0]  # [N]: the least cost of tiles 0 .. j, so far in one run
    cuts = []
    for _ in range(min(n_clusters, n) - 1):
        total, last = (best[:-1, None] + cost[1:]).min(0)  # [N-1, N] -> [N]: tiles 0 .. last, then one more run to j
        better = total < best
        cuts.append(last.where(better, -1))
        best = total.where(better, best)
    ends, j = [n], n - 1
    for cut in reversed(cuts):
        if cut[j] >= 0:
            j = int(cut[j])
            ends.append(j + 1)
    return float(best[-1]), ends[::-1]
