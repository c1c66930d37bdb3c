"""The arithmetic of RPTQ (arXiv 2304.01089): ranges, clusters, permutations and grids. Tensors in, tensors out."""

from rptq.balance import balance_factors
from rptq.clip import clip_ranges
from rptq.cluster import kmeans_order, per_head_order
from rptq.features import joint_features, range_features
from rptq.fold import permute_columns, permute_rows, rotary_pairs_kept
from rptq.grid import ActivationGrid, channel_grid, fake_quantize, fit_grid, quantization_cost, tensor_grid
from rptq.heads import expand_to_query_groups, join_heads, merge_query_groups
from rptq.order import Order, check_permutation, compose, inverse
from rptq.ranges import ChannelRange, update
from rptq.smooth import smooth_factors
from rptq.tiles import pad_to_tiles, padding_cost, sorted_tiles, tile_aligned_order

__all__ = [
    "ActivationGrid",
    "ChannelRange",
    "Order",
    "balance_factors",
    "channel_grid",
    "check_permutation",
    "clip_ranges",
    "compose",
    "expand_to_query_groups",
    "fake_quantize",
    "fit_grid",
    "inverse",
    "join_heads",
    "joint_features",
    "kmeans_order",
    "merge_query_groups",
    "pad_to_tiles",
    "padding_cost",
    "per_head_order",
    "permute_columns",
    "permute_rows",
    "quantization_cost",
    "range_features",
    "rotary_pairs_kept",
    "smooth_factors",
    "sorted_tiles",
    "tensor_grid",
    "tile_aligned_order",
    "update",
]
