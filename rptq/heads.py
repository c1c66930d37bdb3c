"""Grouped-query attention: several query heads share the channels of one KV head.

Query head h belongs to KV head h // n_query_per_kv, as in transformers' repeat_kv.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rptq.order import Order
from rptq.ranges import ChannelRange


def merge_query_groups(ranges: ChannelRange, *, n_kv: int, n_query_per_kv: int) -> ChannelRange:
    """Ranges of query channels [n_kv * n_query_per_kv * D] -> [n_kv * D]: over the query heads of each KV head.

    ValueError if the channel count is no multiple of the head count.
    """
    head_dim = _head_dim(ranges.min.numel(), n_kv * n_query_per_kv)
    low = ranges.min.view(n_kv, n_query_per_kv, head_dim).amin(1)  # [Hq*D] -> [Hkv, Hq/Hkv, D] -> [Hkv, D]
    high = ranges.max.view(n_kv, n_query_per_kv, head_dim).amax(1)  # [Hq*D] -> [Hkv, Hq/Hkv, D] -> [Hkv, D]
    return ChannelRange(low.flatten(), high.flatten())  # [Hkv, D] -> [Hkv*D]


def expand_to_query_groups(order: Order, *, n_kv: int, n_query_per_kv: int) -> Order:
    """Order of KV channels [n_kv * D] -> of query channels [n_kv * n_query_per_kv * D].

    Every query head of a group gets the within-head permutation and the clusters of its KV head, so that q . k is
    unchanged. ValueError if a channel or a cluster crosses a head.
    """
    head_dim = _head_dim(order.perm.numel(), n_kv)
    offsets = head_dim * torch.arange(n_kv * n_query_per_kv, device=order.perm.device)
    within = order.perm.view(n_kv, head_dim) - offsets[:n_kv, None]  # [Hkv*D] -> [Hkv, D]
    if (within < 0).any() or (within >= head_dim).any():
        raise ValueError(f"order moves channels across heads of {head_dim}; build it with per_head_order")
    perm = within.repeat_interleave(n_query_per_kv, dim=0) + offsets[:, None]  # [Hkv, D] -> [Hq, D]
    sizes = [part.repeat(n_query_per_kv) for part in _sizes_by_head(order.sizes, n_kv, head_dim)]
    return Order(perm.flatten(), torch.cat(sizes))  # [Hq, D] -> [Hq*D]


def join_heads(orders: list[Order]) -> Order:
    """Orders of single heads, all of one width D -> one over H*D channels, in which no channel leaves its head.

    ValueError if a head's width is another: the joined order is then no permutation; or if there is no head.
    """
    perm = torch.cat([order.perm + h * order.perm.numel() for h, order in enumerate(orders)])  # H x [D] -> [H*D]
    return Order(perm, torch.cat([order.sizes for order in orders]))


def _sizes_by_head(sizes: Tensor, n_heads: int, head_dim: int) -> list[Tensor]:
    """Cluster sizes [G] cut at the head boundaries: n_heads tensors, each summing to head_dim."""
    ends = sizes.cumsum(0)
    cuts = torch.searchsorted(ends, head_dim * torch.arange(1, n_heads + 1, device=sizes.device))
    if not torch.equal(ends[cuts] % head_dim, torch.zeros_like(cuts)):
        raise ValueError(f"clusters {sizes.tolist()} cross the boundaries of heads of {head_dim}")
    return list(sizes.tensor_split((cuts[:-1] + 1).tolist()))


def _head_dim(channels: int, n_heads: int) -> int:
    if n_heads < 1 or channels == 0 or channels % n_heads:
        raise ValueError(f"{channels} channels do not divide into {n_heads} heads")
    return channels // n_heads
