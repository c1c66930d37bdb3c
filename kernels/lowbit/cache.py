"""A transformers cache that holds keys and values as packed codes on static per-channel grids.

RPTQ (arXiv 2304.01089) quantizes keys and values with scales known before the first token, so a token costs its codes
and nothing else. Keys are quantized before the rotary embedding, where a channel has one range whatever the position.
The attention module hands the cache rotated keys: the cache turns them back with the cosines and sines of their
tokens, packs the codes, and rotates what it decodes. Cosines and sines are held once for all layers that share them.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lowbit.cache_space import Rotation, Space
from lowbit.packing import PACKABLE_BITS, pack, packed_length, unpack
from lowbit.sinks import sink_rows
from lowbit.spared import Spared

# Where the two members of a rotary pair lie once the rotated channels are unflattened into two dimensions.
PAIR_DIM = {"half": -2, "interleaved": -1}


@dataclass(frozen=True, eq=False)
class KVGrid:
    """Static grids of one layer's keys (before rotary) and values: code = clamp(round(x/scale) + zero, 0, 2**bits - 1).

    key_scale, key_zero, value_scale, value_zero: float32 [H, D], H the KV heads; scales above 0, zeros whole numbers,
    not bounded. rotary: None, "half" (pairs i, i + rotary_dim/2) or "interleaved" (pairs 2i, 2i + 1); rotary_dim: how
    many leading channels of a key rotate, 0 without rotary. sinks: how many tokens of a sequence, the first, are kept in full
    precision (`lowbit.sinks`, which must then announce them).

    Raises:
        ValueError: shapes, bits, rotary or scales that do not fit the above.
    """

    key_scale: Tensor
    key_zero: Tensor
    value_scale: Tensor
    value_zero: Tensor
    bits: int
    rotary: str | None
    rotary_dim: int
    sinks: int = 0

    def __post_init__(self):
        shapes = [tuple(t.shape) for t in (self.key_scale, self.key_zero, self.value_scale, self.value_zero)]
        if len(set(shapes)) != 1 or len(shapes[0]) != 2:
            raise ValueError(
                f"key and value grids have shapes {shapes}; pass four tensors of one shape [KV heads, head dim]"
            )
        if self.bits not in PACKABLE_BITS:
            raise ValueError(f"a KV cache of {self.bits} bits cannot be packed; choose one of {PACKABLE_BITS}")
        rotates = self.rotary in PAIR_DIM and 0 < self.rotary_dim <= shapes[0][1] and self.rotary_dim % 2 == 0
        if not rotates and (self.rotary, self.rotary_dim) != (None, 0):
            raise ValueError(
                f"rotary {self.rotary!r} over {self.rotary_dim} of {shapes[0][1]} channels; "
                f"pass one of {tuple(PAIR_DIM)} with an even number of channels, or None and 0"
            )
        smallest = min(float(self.key_scale.min()), float(self.value_scale.min()))
        if not smallest > 0:
            raise ValueError(f"smallest KV scale is {smallest}; every scale must be above 0")

    def to(self, device: torch.device) -> KVGrid:
        """The same on another device, contiguous; nothing is checked again, so that no number is waited for."""
        moved = copy(self)
        for name in ("key_scale", "key_zero", "value_scale", "value_zero"):
            object.__setattr__(moved, name, getattr(self, name).to(device).contiguous())
        return moved


def rotate(keys: Tensor, cos: Tensor, sin: Tensor, rotary: str) -> Tensor:
    """Apply the rotary embedding to the leading channels of `keys`.

    The products and sums are those of the models, in the dtype of `keys`, so equal inputs give equal bits.

    Args:
        keys: [B, H, T, D].
        cos, sin: [B or 1, T, R/2], one angle per pair; the first R channels rotate.
        rotary: "half" or "interleaved".
    """
    rotated, pair = 2 * cos.shape[-1], PAIR_DIM[rotary]
    # layers on other devices share the tables; [B, T, R/2] -> [B, 1, T, R/2]
    cos, sin = (t.unsqueeze(1).to(keys) for t in (cos, sin))
    pairs = keys[..., :rotated].unflatten(-1, (2, -1) if pair == -2 else (-1, 2))  # [..., 2, R/2] or [..., R/2, 2]
    a, b = pairs.unbind(pair)  # [B, H, T, R/2]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=pair).flatten(-2)  # [B, H, T, R]
    return torch.cat([turned, keys[..., rotated:]], dim=-1)


class PackedCacheLayer(DynamicLayer):
    """One layer of a `PackedCache`: `keys` and `values` are uint8 [B, H, T, ceil(D*bits/8)].

    They may be kept in a `space`, whose tokens grow without this layer; they are views of it then, made when asked for, until one is set.
    """

    def __init__(self, grid: KVGrid):
        self._own: tuple[Tensor | None, Tensor | None] = (None, None)
        self.space: Space | None = None
        self.place = 0
        super().__init__()
        self.grid = grid
        self.rotation: Rotation | None = None
        self.spared: Spared | None = None

    @property
    def keys(self) -> Tensor | None:
        return self._own[0] if self.space is None else self.space.view(self.place, 0)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._own, self.space = (keys, self.values), None

    @property
    def values(self) -> Tensor | None:
        return self._own[1] if self.space is None else self.space.view(self.place, 1)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._own, self.space = (self.keys, values), None

    def keep_in(self, space: Space, place: int) -> None:
        """Show what lies at `place` in a space from now on."""
        self._own, self.space, self.place = (None, None), space, place

    def __getstate__(self) -> dict:
        """A copy has keys and values of its own."""
        return {**vars(self), "_own": (self.keys, self.values), "space": None}

    def get_seq_length(self) -> int:
        """Returns how many tokens are held."""
        return super().get_seq_length() if self.space is None else self.space.tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start empty, on the device of the first keys [B, H, T, D]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, width = key_states.shape
        if (heads, width) != tuple(self.grid.key_scale.shape):
            raise ValueError(
                f"keys have {heads} heads of {width} channels, the grid {tuple(self.grid.key_scale.shape)}; "
                "pass the grid of this layer"
            )
        self._begin(batch, key_states.shape[2])
        self.is_initialized = True

    def _begin(self, batch: int, tokens: int) -> None:
        """Memory for no tokens yet; `tokens` come next."""
        grid, (heads, width) = self.grid, self.grid.key_scale.shape
        # [H, D] -> [H, 1, D]
        self._key_grid = tuple(t.to(self.device).unsqueeze(1) for t in (grid.key_scale, grid.key_zero))
        self._value_grid = tuple(t.to(self.device).unsqueeze(1) for t in (grid.value_scale, grid.value_zero))
        shape = (batch, heads, 0, packed_length(width, grid.bits))
        self.keys, self.values = (torch.empty(shape, dtype=torch.uint8, device=self.device) for _ in range(2))

    @property
    def bytes(self) -> int:
        """Bytes held: codes, and sinks in full precision."""
        codes = 0 if self.keys is None else self.keys.numel() + self.values.numel()
        return codes + (0 if self.spared is None else self.spared.bytes)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Pack and append new tokens; return everything held, decoded.

        Args:
            key_states, value_states: [B, H, T, D], keys after rotary; off-grid values are rounded to the grid. In
                bfloat16 turning back costs up to about 2**-7 of a key, a code or so at 8 bits, nothing at 4 and below
                for grids around zero.

        Returns:
            keys (rotated) and values [B, H, all tokens, D] in the dtype of `key_states`.

        Raises:
            ValueError: the rotation of exactly these tokens was not announced (see `PackedCache.announce`).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, new = self.get_seq_length(), key_states.shape[-2]
        if self.grid.sinks:
            rows = sink_rows(key_states[:, 0]).squeeze(-1)  # [B, T, 1] -> [B, T]
            sinks = Spared.of(key_states, value_states, rows, held)
            self.spared = sinks if self.spared is None else self.spared.append(sinks)
        if self.grid.rotary is not None:
            self._check_rotation(held, new)
        self._append(key_states, value_states, held)
        return self._seen(key_states)

    def _append(self, keys: Tensor, values: Tensor, held: int) -> None:
        """Pack keys, rotated, and values [B, H, T, D] behind the tokens held."""
        if self.grid.rotary is not None:
            keys = self._turn_back(keys.float(), held)
        self.keys = torch.cat([self.keys, self._encode(keys, self._key_grid)], dim=-2)
        self.values = torch.cat([self.values, self._encode(values, self._value_grid)], dim=-2)

    def _seen(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """What `update` returns when it has appended keys `new`."""
        return self.decoded()

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values [B, H, all tokens, D], sinks among them."""
        keys, values = self._codes_decoded()
        if self.grid.rotary is not None:
            keys = rotate(keys, self.rotation.cos, self.rotation.sin, self.grid.rotary)
        return (keys, values) if self.spared is None else self.spared.restore(keys, values)

    def _codes_decoded(self) -> tuple[Tensor, Tensor]:
        return self._decode(self.keys, self._key_grid), self._decode(self.values, self._value_grid)

    def reset(self) -> None:
        """Forget every token and the rotation they shared."""
        super().reset()
        self.rotation = self.spared = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; the count is negative, as transformers asks."""
        super().crop(tokens_to_remove)
        self._crop_spared()

    def _crop_spared(self) -> None:
        if self.spared is not None:
            self.spared = self.spared.first(self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx` [B] of the batch."""
        self._transform_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        self._transform_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` of the batch."""
        self._transform_rows(lambda t: t[indices])

    def _transform_rows(self, change) -> None:
        if self.get_seq_length() > 0:
            self._transform_codes(change)
        if self.spared is not None:
            self.spared = self.spared.of_rows(change)

    def _transform_codes(self, change) -> None:
        self.keys, self.values = change(self.keys), change(self.values)

    def _check_rotation(self, held: int, new: int) -> None:
        known = 0 if self.rotation is None else len(self.rotation)
        if known != held + new:
            raise ValueError(
                f"the rotation of {known} tokens is known, {held} are cached and {new} arrive; "
                "call attach_packed_cache(model, blocks, grids), or PackedCache.announce before each update"
            )

    def _turn_back(self, keys: Tensor, held: int) -> Tensor:
        """Undo the rotation of the newest tokens; some models scale cos and sin, so divide by their square sum."""
        cos, sin = (t[:, held:].float() for t in (self.rotation.cos, self.rotation.sin))  # [B, new, R/2]
        norm = cos.square() + sin.square()
        return rotate(keys, cos / norm, -sin / norm, self.grid.rotary)

    def _encode(self, x: Tensor, grid: tuple[Tensor, Tensor]) -> Tensor:
        scale, zero = grid
        codes = ((x.float() / scale).round() + zero).clamp(0, 2**self.grid.bits - 1)  # [B, H, T, D]
        return pack(codes.to(torch.uint8), self.grid.bits)  # [B, H, T, ceil(D*bits/8)]

    def _decode(self, packed: Tensor, grid: tuple[Tensor, Tensor]) -> Tensor:
        scale, zero = grid
        codes = unpack(packed, self.grid.bits, scale.shape[-1])  # [B, H, T, D]
        return ((codes - zero) * scale).to(self.dtype)


class PackedCache(Cache):
    """A growing cache over `grids`, one per layer; None keeps that layer in full precision.

    Layers with a sliding window keep every token and leave the window to the mask.
    """

    def __init__(self, grids: list[KVGrid | None]):
        super().__init__(layers=[DynamicLayer() if grid is None else PackedCacheLayer(grid) for grid in grids])
        self.rotations: list[Rotation] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens to a layer, which is laid out for the kernels of their device if it is empty; see its `update`."""
        layer = self.layers[layer_idx]
        if isinstance(layer, PackedCacheLayer) and not layer.is_initialized:
            self.layers[layer_idx] = _laid_out(layer, key_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def announce(self, layer_idx: int, source: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Say how the tokens that layer `layer_idx` is about to append are rotated.

        Layers first announced with the same `source` object share one table from then on, which grows with the first
        of them that reaches a new token.

        Args:
            cos, sin: [B or 1, T, R/2], one angle per pair, as the model uses them.

        Raises:
            ValueError: the width does not match the grid.
        """
        layer = self.layers[layer_idx]
        if cos.shape[-1] * 2 != layer.grid.rotary_dim:
            raise ValueError(
                f"layer {layer_idx} rotates {cos.shape[-1] * 2} channels, its grid says {layer.grid.rotary_dim}; "
                "correct the grid's rotary_dim"
            )
        if layer.rotation is None:
            known = next((r for r in self.rotations if r.source() is source), None)
            layer.rotation = self._add(source) if known is None else known  # one that knows no token yet is falsy
        if len(layer.rotation) == layer.get_seq_length():
            layer.rotation.append(cos, sin)

    def _add(self, source: Tensor) -> Rotation:
        self.rotations.append(Rotation(source))
        return self.rotations[-1]

    @property
    def packed_bytes(self) -> int:
        """Bytes held: codes, full-precision layers, sinks, and the shared cosines and sines; grids belong to the model."""
        packed = [layer for layer in self.layers if isinstance(layer, PackedCacheLayer)]
        full = [t for layer in self.layers if layer not in packed for t in (layer.keys, layer.values)]
        tables = [t for rotation in self.rotations for t in (rotation.cos, rotation.sin)]
        others = sum(t.numel() * t.element_size() for t in (*full, *tables) if t is not None)
        return others + sum(layer.bytes for layer in packed)

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self.rotations.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; the count is negative, as transformers asks."""
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self._transform_rotations(lambda table: table[:, :tokens_to_remove])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx` [B] of the batch, as beam search does after each step."""
        super().reorder_cache(beam_idx)
        self._transform_rows(lambda table: table.index_select(0, beam_idx.to(table.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._transform_rows(lambda table: table.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` of the batch."""
        super().batch_select_indices(indices)
        self._transform_rows(lambda table: table[indices])

    def _transform_rotations(self, change) -> None:
        for rotation in self.rotations:
            rotation.transform(change)

    def _transform_rows(self, change) -> None:
        # A table of one row serves any batch, and its row is the same for all, so it stays.
        self._transform_rotations(lambda table: table if table.shape[0] == 1 else change(table))


def _laid_out(layer: PackedCacheLayer, keys: Tensor) -> PackedCacheLayer:
    """An empty layer like `layer`, or itself, of the kind that keys like these [B, H, T, D] are best held in."""
    from lowbit.planar_cache import kind_for  # which is made of what is here

    kind = kind_for(layer.grid, keys)
    if type(layer) is kind:
        return layer
    new = kind(layer.grid)
    new.rotation = layer.rotation
    return new


def attach_packed_cache(model: nn.Module, blocks: list[nn.Module], grids: list[KVGrid | None]) -> list[RemovableHandle]:
    """Make `model` use a `PackedCache` wherever it would start a `DynamicCache`, in forward calls and in `generate`.

    A forward pre-hook on the module that owns the blocks swaps the cache; one on each block announces the rotation.
    A cache that already holds tokens, or of another class, is left as it is.

    Args:
        model: the model, or any module that contains the blocks.
        blocks: decoder layers, in order.
        grids: one per block.

    Returns:
        handles whose `remove()` undoes this.

    Raises:
        ValueError: a different number of grids than blocks, or blocks that are not inside `model`.
    """
    if len(blocks) != len(grids) or not blocks:
        raise ValueError(f"{len(grids)} grids for {len(blocks)} blocks; pass one grid (or None) for each block")
    name = next((n for n, module in model.named_modules() if module is blocks[0]), None)
    if not name:
        raise ValueError(
            f"blocks[0] ({type(blocks[0]).__name__}) is not inside {type(model).__name__}; pass the model's own blocks"
        )
    owner = model.get_submodule(".".join(name.split(".")[:-2]))
    handles = [owner.register_forward_pre_hook(_cache_hook(grids), with_kwargs=True)]
    for index, (block, grid) in enumerate(zip(blocks, grids, strict=True)):
        if grid is not None and grid.rotary is not None:
            handles.append(block.register_forward_pre_hook(_rotation_hook(index, grid), with_kwargs=True))
    return handles


def _cache_hook(grids: list[KVGrid | None]):
    def use_packed_cache(module, args, kwargs):
        wanted = kwargs.get("use_cache")
        past = kwargs.get("past_key_values")
        empty = past is None or (type(past) is DynamicCache and past.get_seq_length() == 0)
        if empty and (module.config.use_cache if wanted is None else wanted):
            return args, {**kwargs, "past_key_values": PackedCache(grids)}

    return use_packed_cache


def _rotation_hook(layer_idx: int, grid: KVGrid):
    find = {"half": _half_angles, "interleaved": _interleaved_angles}[grid.rotary]

    def announce_rotation(block, args, kwargs):
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if isinstance(cache, PackedCache):
            cache.announce(layer_idx, *find(block, kwargs))

    return announce_rotation


def _half_angles(block: nn.Module, kwargs: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Angles of models that compute `position_embeddings` = (cos, sin) [B or 1, T, R] once, both halves alike."""
    if kwargs.get("position_embeddings") is None:
        raise ValueError(
            f"{type(block).__name__} gets no position_embeddings; rotary 'half' needs cos and sin from the model"
        )
    cos, sin = kwargs["position_embeddings"]
    return cos, *(t[..., : t.shape[-1] // 2] for t in (cos, sin))  # [B, T, R] -> [B, T, R/2]


def _interleaved_angles(block: nn.Module, kwargs: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Angles of GPT-J: rows of the attention's `embed_positions` [positions, R], sines before cosines."""
    table = next((m.embed_positions for m in block.modules() if hasattr(m, "embed_positions")), None)
    if table is None or kwargs.get("position_ids") is None:
        raise ValueError(
            f"{type(block).__name__} has no embed_positions or gets no position_ids; rotary 'interleaved' needs both"
        )
    positions = kwargs["position_ids"]  # [B or 1, T]
    sin, cos = table.to(positions.device)[positions].chunk(2, dim=-1)  # [B, T, R] -> 2 x [B, T, R/2]
    return positions, cos, sin
