"""A decoder block on a few sequences of its batch at a time, so that what it holds inside stays bounded while the batch grows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lowbit.cache import PackedCache, PackedCacheLayer
from lowbit.cache_space import Rotation
from lowbit.kv_planar import PlanarKV
from lowbit.planar_cache import PlanarCacheLayer
from lowbit.sinks import of_sequences
from lowbit.spared import Spared


def in_micro_batches(run: Callable, args: tuple, kwargs: dict[str, Any], *, layer: int, tokens: int) -> Any:
    """run(*args, **kwargs) of a block, on as many sequences at a time as have at most `tokens` tokens together, at least one.

    args[0] are the hidden states [B, T, C]; tensors of two dimensions or more are divided along their first, B, or serve all
    sequences if it is 1. All at once runs what cannot be divided: arguments of other shapes, and a cache whose layer number `layer`,
    which is the block's, already holds tokens or is of a kind other than those of `PackedCache` and DynamicCache.
    """
    hidden = args[0]
    batch, few = hidden.shape[0], max(1, tokens // hidden.shape[1])
    cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
    if batch <= few or not _divisible((args, kwargs), batch) or not (cache is None or _fillable(cache, layer)):
        return run(*args, **kwargs)
    outs, parts = [], []
    for start in range(0, batch, few):
        rows = slice(start, start + few)
        part = None if cache is None else _part(cache, layer, rows)
        some, more = _rows_of((args, kwargs), rows, batch, part)
        with of_sequences(rows):
            outs.append(run(*some, **more))
        parts.append(part)
    if cache is not None:
        cache.layers[layer] = _joined_layer(cache.layers[layer], [part.layers[layer] for part in parts])
    return _joined(outs)


def _divisible(value: Any, batch: int) -> bool:
    if isinstance(value, Tensor):
        return value.ndim < 2 or value.shape[0] in (1, batch)
    if isinstance(value, dict):
        value = tuple(value.values())
    return not isinstance(value, (tuple, list)) or all(_divisible(one, batch) for one in value)


def _rows_of(value: Any, rows: slice, batch: int, part: Cache | None) -> Any:
    """`value` for some of the sequences, `part` in the place of the cache."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim > 1 and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {name: _rows_of(one, rows, batch, part) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_rows_of(one, rows, batch, part) for one in value)
    return part if isinstance(value, Cache) else value


def _fillable(cache: Cache, layer: int) -> bool:
    known = type(cache) in (DynamicCache, PackedCache) and layer < len(cache.layers)
    return (
        known
        and type(cache.layers[layer]) in (DynamicLayer, PackedCacheLayer, PlanarCacheLayer)
        and not cache.layers[layer].is_initialized
    )


def _part(cache: Cache, layer: int, rows: slice) -> Cache:
    """A cache like `cache`, whose layer is as empty and knows how the tokens of these sequences are rotated."""
    part = copy.copy(cache)
    part.layers = list(cache.layers)
    part.layers[layer] = copy.copy(cache.layers[layer])
    rotation = getattr(cache.layers[layer], "rotation", None)
    if rotation is not None and len(rotation.cos) > 1:
        some = Rotation(rotation.cos)
        some.put(rotation.cos[rows], rotation.sin[rows])
        part.layers[layer].rotation = some
    return part


def _joined_layer(empty: DynamicLayer, parts: list[DynamicLayer]) -> DynamicLayer:
    """A layer that holds what its parts hold, one batch after another, in the place of an empty one."""
    layer = parts[0]
    if isinstance(layer, PlanarCacheLayer):
        layer.kv = PlanarKV.of_batches([part.kv for part in parts])
    else:
        layer.keys, layer.values = (torch.cat([getattr(part, name) for part in parts]) for name in ("keys", "values"))
    if isinstance(layer, PackedCacheLayer):
        layer.rotation = empty.rotation  # that of all sequences
    if getattr(layer, "spared", None) is not None:
        layer.spared = Spared.of_batches([part.spared for part in parts])
    return layer


def _joined(outs: list[Any]) -> Any:
    """Outputs of the micro-batches as one: tensors, or tuples of tensors and None."""
    if isinstance(outs[0], tuple):
        return tuple(_joined(list(each)) for each in zip(*outs))
    return None if outs[0] is None else torch.cat(outs)
