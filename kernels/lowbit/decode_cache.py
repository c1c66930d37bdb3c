"""Room behind a cache's tensors: a decoded token is written where the next one goes, and nothing held is copied.

The layers of a transformers cache hold `keys` and `values` that just fit. A `Room` takes over what they hold, with capacity to spare, and
leaves views of it in the layers, so that the cache stays what it is: any module may go on with it, crop or reorder it. Whoever
replaces a view in a layer ends the room.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lowbit.cache import PackedCacheLayer

SLACK = 8  # bytes past the end that may be read with the last codes
LEAST = 64  # tokens of capacity to spare


def obstacle(cache: Cache, layers: range, shape, rotary: str | None) -> str | None:
    """Why no native step can append to these layers of the cache; None if one can. shape: `lowbit.decode.Shape`."""
    if not isinstance(cache, Cache) or len(cache.layers) < layers.stop:
        return f"a cache of {type(cache).__name__} has no layers {layers.start} to {layers.stop - 1}"
    held = [cache.layers[i] for i in layers]
    kinds = {type(layer) for layer in held}
    if len(kinds) > 1 or not kinds <= {DynamicLayer, PackedCacheLayer}:
        return f"cache layers of {sorted(kind.__name__ for kind in kinds)}: only one kind, that keeps every token"
    if not all(layer.is_initialized for layer in held) or held[0].get_seq_length() == 0:
        return "the cache is empty"
    if len({layer.keys.shape for layer in held} | {layer.values.shape for layer in held}) > 1:
        return "cache layers hold keys and values of several shapes"
    return _packed_obstacle(held, shape, rotary) if kinds == {PackedCacheLayer} else _plain_obstacle(held, shape)


def _plain_obstacle(layers: list[DynamicLayer], shape) -> str | None:
    keys = layers[0].keys
    if keys.dtype != torch.float32 or not keys.is_cpu:
        return f"the cache holds {keys.dtype} on {keys.device}, not float32 on the CPU"
    if (keys.shape[1], keys.shape[3]) != (shape.kv_heads, shape.head_dim):
        return f"the cache has {keys.shape[1]} heads of {keys.shape[3]} channels"
    return None


def _packed_obstacle(layers: list[PackedCacheLayer], shape, rotary: str | None) -> str | None:
    first = layers[0].grid
    if {(layer.grid.bits, layer.grid.rotary, layer.grid.rotary_dim) for layer in layers} != {
        (first.bits, rotary, shape.rotary_dim)
    }:
        return f"key and value grids differ from block to block, or do not say rotary {rotary!r} of {shape.rotary_dim} channels"
    if tuple(first.key_scale.shape) != (shape.kv_heads, shape.head_dim):
        return f"the grids are for {tuple(first.key_scale.shape)} heads and channels"
    if not layers[0].keys.is_cpu or layers[0].dtype != torch.float32:
        return f"the cache serves {layers[0].dtype} on {layers[0].keys.device}, not float32 on the CPU"
    if any(layer.rotation is not layers[0].rotation for layer in layers):
        return "blocks rotate keys by different tables"
    if rotary is not None and len(layers[0].rotation) != layers[0].get_seq_length():
        return "the cache does not know how its tokens are rotated"
    return None


class Room:
    """What some layers of a cache hold, of one shape and kind, in one tensor `held` [layers, 2, B, H, capacity, bytes or D].

    `tokens` of the capacity are taken. `cos`, `sin` float32 [B or 1, capacity, R/2] where keys are stored before rotation, else None.
    """

    def __init__(self, layers: list[DynamicLayer], *, rows: int):
        """rows: 1 if one row of the rotation's tables is to serve all sequences, else how many there are."""
        self.layers, self.rows = layers, rows
        self.rotation = getattr(layers[0], "rotation", None)
        self.tokens = layers[0].get_seq_length()
        self.capacity = self.tokens + max(LEAST, self.tokens // 2)
        batch, heads, _, width = layers[0].keys.shape
        shape = (len(layers), 2, batch, heads, self.capacity, width)
        self.held = _with_slack(shape, layers[0].keys.dtype)
        for room, layer in zip(self.held, layers):
            room[0, :, :, : self.tokens] = layer.keys
            room[1, :, :, : self.tokens] = layer.values
        self.cos, self.sin = (
            (None, None) if self.rotation is None else map(self._table, (self.rotation.cos, self.rotation.sin))
        )
        self.show(self.tokens)

    def _table(self, known: Tensor) -> Tensor:
        """[B or 1, T, R/2] -> [rows, capacity, R/2]."""
        table = known.new_empty(self.rows, self.capacity, known.shape[2], dtype=torch.float32)
        table[:, : self.tokens] = known
        return table

    def shown_in(self, layers: list[DynamicLayer]) -> bool:
        """Whether the layers hold what was last shown."""
        shown = zip(layers, self.layers, self.keys, self.values)
        same = all(a is b and a.keys is keys and a.values is values for a, b, keys, values in shown)
        return same and (self.rotation is None or self.rotation.cos is self.shown_cos)

    def takes(self, rows: int) -> bool:
        """Whether another token fits, turned by tables of so many rows."""
        return self.tokens < self.capacity and (self.rotation is None or self.rows == rows)

    def turn(self, cos: Tensor, sin: Tensor) -> None:
        """Note how the next token is rotated: [rows, R/2] each."""
        self.cos[:, self.tokens], self.sin[:, self.tokens] = cos, sin

    def show(self, tokens: int) -> None:
        """Let the layers hold the first `tokens`."""
        self.tokens = tokens
        views = self.held[:, :, :, :, :tokens].flatten(0, 1).unbind()  # [layers, 2, ...] -> 2 layers x [B, H, T, bytes]
        self.keys, self.values = views[0::2], views[1::2]
        for layer, keys, values in zip(self.layers, self.keys, self.values):
            layer.keys, layer.values = keys, values
        if self.rotation is not None:
            self.rotation.cos, self.rotation.sin = self.cos[:, :tokens], self.sin[:, :tokens]
            self.shown_cos = self.rotation.cos


def _with_slack(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    entries = torch.Size(shape).numel()
    return torch.empty(entries + SLACK, dtype=dtype)[:entries].view(shape)
