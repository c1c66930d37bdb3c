from itertools import combinations

import pytest
import torch

from rptq import (
    ChannelRange,
    channel_grid,
    pad_to_tiles,
    padding_cost,
    quantization_cost,
    sorted_tiles,
    tensor_grid,
    tile_aligned_order,
)


def heavy_tailed(channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal, uniform = torch.randn(2, channels, generator=generator), torch.rand(2, channels, generator=generator)
    width, offset = normal / uniform
    return ChannelRange(offset - width.abs(), offset + width.abs())


def cost(ranges, order, **options):
    return quantization_cost(ranges.permuted(order.perm), order.sizes, 4, **options)


@pytest.mark.parametrize("channels, tile", [(768, 64), (700, 64), (256, 128), (130, 64), (10, 64), (1, 64), (64, 64)])
@pytest.mark.parametrize("n_clusters", [1, 3, 32])
def test_boundaries_are_whole_tiles(channels, tile, n_clusters):
    order = tile_aligned_order(heavy_tailed(channels), n_clusters, tile, bits=4)
    assert order.sizes.sum() == channels and order.sizes.numel() <= n_clusters
    assert (order.sizes.cumsum(0)[:-1] % tile == 0).all()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n_clusters", [1, 2, 3, 5, 9])
def test_cut_is_the_best_of_all_cuts(seed, n_clusters):
    ranges, tile = heavy_tailed(26, seed), 4  # 7 tiles, the last of 2
    weight = torch.rand(26, generator=torch.Generator().manual_seed(seed))
    order = tile_aligned_order(ranges, n_clusters, tile, bits=4, weight=weight)
    costs = []
    for count in range(min(n_clusters, 7)):
        for cut in combinations(range(tile, 26, tile), count):
            sizes = torch.tensor([0, *cut, 26]).diff()
            costs.append(quantization_cost(ranges.permuted(order.perm), sizes, 4, weight=weight[order.perm]))
    # Both sum the same float64 terms, in another order.
    assert cost(ranges, order, weight=weight[order.perm]) == pytest.approx(min(costs), rel=1e-12)


@pytest.mark.parametrize("kind", ["heavy", "one_sided", "offset"])
def test_no_worse_than_sorting_by_any_one_key(kind):
    ranges = heavy_tailed(512)
    if kind == "one_sided":
        ranges = ChannelRange(torch.zeros(512), ranges.max.abs())
    if kind == "offset":
        ranges = ChannelRange(ranges.max - 0.1, ranges.max + 0.1)
    best = cost(ranges, tile_aligned_order(ranges, 8, 64, bits=4))
    for key in (ranges.max - ranges.min, ranges.max.abs(), ranges.max):
        equal = quantization_cost(ranges.permuted(key.argsort()), torch.full((8,), 64), 4)
        assert best <= equal * (1 + 1e-12)  # the same terms summed in another order


def test_clusters_lie_between_one_grid_and_one_grid_a_channel():
    ranges = heavy_tailed(512)
    order = tile_aligned_order(ranges, 8, 64, bits=4)
    one = quantization_cost(ranges, tensor_grid(ranges, 4).sizes, 4)
    each = quantization_cost(ranges, channel_grid(ranges, 4).sizes, 4)
    assert each < cost(ranges, order) < one / 4


def test_more_clusters_never_cost_more():
    ranges = heavy_tailed(700)
    costs = [cost(ranges, tile_aligned_order(ranges, k, 64, bits=4)) for k in (1, 2, 4, 8, 16)]
    assert costs == sorted(costs, reverse=True) and costs[-1] < costs[0]


def test_equal_channels_need_one_cluster():
    ranges = ChannelRange(-torch.ones(256), torch.ones(256))
    order = tile_aligned_order(ranges, 4, 64, bits=4)
    assert order.sizes.tolist() == [256] and torch.equal(order.perm, torch.arange(256))


def test_short_tile_holds_no_zeros():
    # Wholly above zero: filled up with zeros, the short tile would look wide and be cut off alone.
    ranges = ChannelRange(torch.full((10,), 10.0), torch.tensor([11.0] * 4 + [14.0] * 4 + [14.1] * 2))
    assert tile_aligned_order(ranges, 2, 4, bits=4).sizes.tolist() == [4, 6]


def test_weight_draws_the_boundary():
    # Channels of width 1, 2 and 4, one to a tile: two clusters split off the 4, unless the 1 carries all the weight.
    ranges = ChannelRange(torch.zeros(3), torch.tensor([2.0, 4.0, 1.0]))
    assert tile_aligned_order(ranges, 2, 1, bits=4).sizes.tolist() == [2, 1]
    weight = torch.tensor([1.0, 1.0, 100.0])
    assert tile_aligned_order(ranges, 2, 1, bits=4, weight=weight).sizes.tolist() == [1, 2]


def test_same_input_same_order():
    first, second = (tile_aligned_order(heavy_tailed(700), 8, 64, bits=4) for _ in range(2))
    assert torch.equal(first.perm, second.perm) and torch.equal(first.sizes, second.sizes)


def test_padding_counts_what_alignment_saves():
    sizes = torch.tensor([1, 64, 65, 126])
    assert pad_to_tiles(sizes, 64).tolist() == [64, 64, 128, 128]
    assert padding_cost(sizes, 64) == 128 / 256
    assert padding_cost(torch.tensor([64, 128]), 64) == 0
    with pytest.raises(ValueError, match="positive"):
        pad_to_tiles(torch.tensor([0, 3]), 64)


def test_refusals():
    ranges = ChannelRange(torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match="4 channels, 0 clusters"):
        tile_aligned_order(ranges, 0, 64, bits=4)
    with pytest.raises(ValueError, match="tiles of 0"):
        tile_aligned_order(ranges, 1, 0, bits=4)
    with pytest.raises(ValueError, match=r"weight must be \[4\]"):
        tile_aligned_order(ranges, 1, 2, bits=4, weight=torch.tensor([1.0, 1.0, -1.0, 1.0]))


@pytest.mark.parametrize("channels, tile, sizes", [(8, 4, [4, 4]), (10, 4, [2, 4, 4]), (3, 4, [3])])
def test_sorted_tiles_ascend_in_magnitude_and_the_last_is_whole(channels, tile, sizes):
    ranges = heavy_tailed(channels)
    order = sorted_tiles(ranges, tile)
    magnitude = torch.maximum(ranges.min.abs(), ranges.max.abs())[order.perm]
    assert order.sizes.tolist() == sizes and torch.equal(magnitude, magnitude.sort().values)


def test_sorted_tiles_of_nothing_are_refused():
    with pytest.raises(ValueError, match="0 channels, tiles of 4"):
        sorted_tiles(ChannelRange(torch.zeros(0), torch.zeros(0)), 4)
