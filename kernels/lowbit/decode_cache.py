"""Room behind a cache's tensors: new tokens are written where the next ones go, and nothing held is copied.

The layers of a transformers cache hold `keys` and `values` that just fit. A `Room` takes over what they hold, with capacity to spare, and
leaves views of it in the layers, or lets them make the views when asked, so that the cache stays what it is: any module may go on with
it, crop or reorder it. Whoever replaces a view in a layer ends the room.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lowbit.cache import PackedCache, PackedCacheLayer
from lowbit.cache_space import Space
from lowbit.spared import Spared

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
    lengths = {layer.get_seq_length() for layer in held}
    if lengths == {0}:
        return _empty_obstacle(held, shape, rotary)
    if 0 in lengths or len({layer.keys.shape for layer in held} | {layer.values.shape for layer in held}) > 1:
        return "cache layers hold keys and values of several shapes"
    if held[0].dtype != torch.float32 or not held[0].keys.is_cpu:
        return f"the cache serves {held[0].dtype} on {held[0].keys.device}, not float32 on the CPU"
    if kinds == {PackedCacheLayer}:
        return _grid_obstacle(held, shape, rotary) or _rotation_obstacle(held, rotary)
    if (held[0].keys.shape[1], held[0].keys.shape[3]) != (shape.kv_heads, shape.head_dim):
        return f"the cache has {held[0].keys.shape[1]} heads of {held[0].keys.shape[3]} channels"
    return None


def _empty_obstacle(layers: list[DynamicLayer], shape, rotary: str | None) -> str | None:
    """Layers that have seen nothing yet, which `start` can begin."""
    if any(layer.is_initialized for layer in layers):
        return "the cache held tokens that were taken out again"
    return _grid_obstacle(layers, shape, rotary) if isinstance(layers[0], PackedCacheLayer) else None


def _grid_obstacle(layers: list[PackedCacheLayer], shape, rotary: str | None) -> str | None:
    first = layers[0].grid
    if {(layer.grid.bits, layer.grid.rotary, layer.grid.rotary_dim) for layer in layers} != {
        (first.bits, rotary, shape.rotary_dim)
    }:
        return f"key and value grids differ from block to block, or do not say rotary {rotary!r} of {shape.rotary_dim} channels"
    if tuple(first.key_scale.shape) != (shape.kv_heads, shape.head_dim):
        return f"the grids are for {tuple(first.key_scale.shape)} heads and channels"
    return None


def _rotation_obstacle(layers: list[PackedCacheLayer], rotary: str | None) -> str | None:
    if any(layer.rotation is not layers[0].rotation for layer in layers):
        return "blocks rotate keys by different tables"
    if rotary is not None and len(layers[0].rotation) != layers[0].get_seq_length():
        return "the cache does not know how its tokens are rotated"
    return None


def start(layers: list[DynamicLayer], batch: int, shape) -> None:
    """Let layers that have seen nothing hold no tokens of `batch` sequences. shape: `lowbit.decode.Shape`."""
    nothing = torch.empty(batch, shape.kv_heads, 0, shape.head_dim)
    for layer in layers:
        layer.lazy_initialization(nothing, nothing)
        if not isinstance(layer, PackedCacheLayer):
            layer.keys = layer.values = nothing


def spare(layers: list[PackedCacheLayer], count: int, turn: tuple[Tensor, Tensor] | None) -> Tensor:
    """Let layers that hold no tokens hold `count` of each sequence, all of them attention sinks.

    turn: [B or 1, count, R/2] each, where keys are stored before rotation.

    Returns:
        float32 [layers, 2, B, H, count, D] for their keys and values, which are to be written yet.
    """
    (batch, heads, _, octets), width = layers[0].keys.shape, layers[0].grid.key_scale.shape[1]
    kept = _with_slack((len(layers), 2, batch, heads, count, width), torch.float32)
    rows, at = torch.ones(batch, count, dtype=torch.bool), torch.arange(count)
    for layer, (keys, values) in zip(layers, kept):
        layer.spared = Spared(keys, values, rows, at)
        layer.keys, layer.values = (torch.zeros(batch, heads, count, octets, dtype=torch.uint8) for _ in range(2))
    if layers[0].rotation is not None:
        layers[0].rotation.append(*turn)
    return kept


@contextmanager
def unless_it_fails(cache: Cache, layers: range) -> Iterator[None]:
    """Within, an error leaves these layers of the cache, and how its tokens are rotated, as they were."""
    rotations = list(cache.rotations) if isinstance(cache, PackedCache) else []
    held = [cache.layers[i] for i in layers]
    space = getattr(held[0], "space", None)
    before = [(one, vars(one).copy()) for one in (*held, *rotations, *([] if space is None else [space]))]
    try:
        yield
    except BaseException:
        if isinstance(cache, PackedCache):
            cache.rotations[:] = rotations
        for one, attributes in before:
            vars(one).clear()
            vars(one).update(attributes)
        raise


class Room:
    """What some layers of a cache hold, of one shape and kind, in one `space` [layers, 2, B, H, capacity, bytes or D].

    Its `cos`, `sin` are float32 [B or 1, capacity, R/2] where keys are stored before rotation, else None.
    """

    def __init__(self, layers: list[DynamicLayer], *, rows: int, more: int):
        """rows: 1 if one row of the rotation's tables is to serve all sequences, else how many there are. more: tokens to come next."""
        self.layers, self.rows = layers, rows
        self.rotation = getattr(layers[0], "rotation", None)
        self.lazy = isinstance(layers[0], PackedCacheLayer)  # layers that make their views when asked
        batch, heads, tokens, width = layers[0].keys.shape
        self.capacity = tokens + more + max(LEAST, (tokens + more) // 2)
        held = _with_slack((len(layers), 2, batch, heads, self.capacity, width), layers[0].keys.dtype)
        for room, layer in zip(held, layers):
            room[0, :, :, :tokens] = layer.keys
            room[1, :, :, :tokens] = layer.values
        # from a space there is no way back to the layers: a cycle would outlive the cache
        self.space = Space(held, tokens)
        if self.rotation is not None:
            self.space.cos, self.space.sin = map(self._table, (self.rotation.cos, self.rotation.sin))
        if self.lazy:
            self._move_in()
        self.show(tokens)

    def _table(self, known: Tensor) -> Tensor:
        """[B or 1, T, R/2] -> [rows, capacity, R/2]."""
        table = known.new_empty(self.rows, self.capacity, known.shape[2], dtype=torch.float32)
        table[:, : known.shape[1]] = known
        return table

    def _move_in(self) -> None:
        for place, layer in enumerate(self.layers):
            layer.keep_in(self.space, place)
        if self.rotation is not None:
            self.rotation.keep_in(self.space)

    def shown_in(self, layers: list[DynamicLayer]) -> bool:
        """Whether the layers hold what was last shown."""
        if self.lazy:
            same = layers == self.layers and all(layer.space is self.space for layer in layers)
            return same and (self.rotation is None or self.rotation.space is self.space)
        shown = zip(layers, self.layers, self.keys, self.values)
        return all(a is b and a.keys is keys and a.values is values for a, b, keys, values in shown)

    def takes(self, tokens: int, rows: int) -> bool:
        """Whether so many more tokens fit, turned by tables of so many rows."""
        return self.space.tokens + tokens <= self.capacity and (self.rotation is None or self.rows == rows)

    def turn(self, cos: Tensor, sin: Tensor) -> None:
        """Note how the next tokens are rotated: [rows or 1, T, R/2] each."""
        to = slice(self.space.tokens, self.space.tokens + cos.shape[1])
        self.space.cos[:, to], self.space.sin[:, to] = cos, sin

    def show(self, tokens: int) -> None:
        """Let the layers hold the first `tokens`."""
        self.space.tokens = tokens
        if self.lazy:
            return
        views = (
            self.space.held[:, :, :, :, :tokens].flatten(0, 1).unbind()
        )  # [layers, 2, ...] -> 2 layers x [B, H, T, D]
        self.keys, self.values = views[0::2], views[1::2]
        for layer, keys, values in zip(self.layers, self.keys, self.values):
            layer.keys, layer.values = keys, values


def _with_slack(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    entries = torch.Size(shape).numel()
    return torch.empty(entries + SLACK, dtype=dtype)[:entries].view(shape)
