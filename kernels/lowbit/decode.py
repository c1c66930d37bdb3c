"""Decoding without Python between the modules: one native call runs one token a sequence through consecutive decoder blocks.

A `Decoder` is made of blocks whose linears run on integer kernels (`lowbit.integer.take`) and computes what the blocks compute, to
float32's accuracy. `attach` puts it into a transformers model, where it takes the steps it can; prefill, and every step that it cannot
take, is run by the modules on the same cache.
"""

from __future__ import annotations

import weakref
from ctypes import Array
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from lowbit.cache import PackedCacheLayer
from lowbit.cpu import decode as cpu
from lowbit.cpu import native
from lowbit.decode_blocks import ACTIVATIONS, block_of, most_sinks
from lowbit.decode_cache import Room
from lowbit.decode_cache import obstacle as cache_obstacle
from lowbit.sinks import sink_rows


@dataclass(frozen=True)
class Roles:
    """Which module of a block does what; paths are relative to the block.

    norm: what its norms compute (`lowbit.reference.NORMS`). qkv: query, key, value. up: the gate and up, or up alone. The module that
    owns `output` is the attention, whose `scaling` (of scores) and `softmax_bits`, if any, are read. rotary: None or "half".
    """

    norm: str
    attention_norm: str
    qkv: tuple[str, str, str]
    output: str
    mlp_norm: str
    up: tuple[str, ...]
    down: str
    rotary: str | None


@dataclass(frozen=True)
class Shape:
    """Heads, KV heads, their width D, how many of the D channels rotate, and the activation: "relu" or "silu"."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    activation: str


class CannotStep(ValueError):
    """A step that the blocks themselves must run."""


class Decoder:
    """Runs one token a sequence through `blocks` natively; they are layers `first`, `first` + 1, ... of the caches it is given.

    What the blocks compute is read now: make a new one when their tensors change.

    Raises:
        ValueError: why these blocks cannot run natively.
    """

    def __init__(self, blocks: list[nn.Module], roles: Roles, shape: Shape, *, first: int = 0):
        _check(blocks, roles, shape)
        self.roles, self.shape, self.layers = roles, shape, range(first, first + len(blocks))
        self.sinks = max(most_sinks(block) for block in blocks)
        self._keep: list[Tensor] = []
        self._blocks = (cpu.Block * len(blocks))()
        self._channels = blocks[0].get_submodule(roles.qkv[0]).in_features
        self._seats: weakref.WeakKeyDictionary[Cache, _Seat] = weakref.WeakKeyDictionary()
        self._read(blocks)

    def _read(self, blocks: list[nn.Module]) -> None:
        for i, block in enumerate(blocks):
            try:
                self._blocks[i] = block_of(block, self.roles, self.shape, self._keep)
            except ValueError as error:
                raise ValueError(f"block {self.layers[i]}: {error}") from None

    def obstacle(
        self, hidden: Tensor, cache: Cache, turn: Turn | None = None, mask: Tensor | None = None
    ) -> str | None:
        """Why `step` cannot run with these, in one line; None if it can."""
        if hidden.shape[1:] != (1, self._channels) or hidden.dtype != torch.float32 or not hidden.is_cpu:
            return f"hidden states of {list(hidden.shape)} {hidden.dtype} on {hidden.device}, not one float32 token on the CPU"
        if torch.is_grad_enabled() and hidden.requires_grad:
            return "gradients are asked for"
        why = None if self._served(cache) else cache_obstacle(cache, self.layers, self.shape, self.roles.rotary)
        if why is not None:
            return why
        batch, _, held, _ = cache.layers[self.layers.start].keys.shape
        if batch != len(hidden):
            return f"{len(hidden)} sequences, {batch} in the cache"
        if not self._turns(turn, batch):
            return f"cosines and sines do not fit one token a sequence and {self.shape.rotary_dim} channels"
        if mask is not None and mask.shape not in {(b, 1, 1, held + 1) for b in (1, batch)}:
            return f"a mask of {list(mask.shape)} for {held + 1} tokens"
        if self.sinks and sink_rows(hidden).any():
            return "a token is an attention sink"
        return None

    def _turns(self, turn: Turn | None, batch: int) -> bool:
        if turn is None or self.roles.rotary is None:
            return (turn is None) == (self.roles.rotary is None)
        return all(t.shape in {(b, 1, self.shape.rotary_dim) for b in (1, batch)} for t in turn)

    def step(
        self,
        hidden: Tensor,
        cache: Cache,
        *,
        turn: Turn | None = None,
        mask: Tensor | None = None,
        path: str = "fastest",
    ) -> Tensor:
        """The blocks' output for one token a sequence, which is appended to the cache; on torch.get_num_threads() threads.

        Args:
            hidden: float32 [B, 1, C].
            cache: a `PackedCache` or DynamicCache that holds at least one token. Its layers get views of a tensor with spare capacity.
            turn: cosines and sines of the tokens' positions, [B or 1, 1, rotary_dim] each, both halves alike; None without rotary.
            mask: [B or 1, 1, 1, held + 1], bool (true: look) or added to the scores.
            path: as for the sweep.

        Returns:
            float32 [B, 1, C].

        Raises:
            CannotStep: what `obstacle` says.
            ValueError: a path that this machine lacks.
        """
        why = self.obstacle(hidden, cache, turn, mask)
        if why is not None:
            raise CannotStep(f"no native step: {why}; run the blocks")
        return self._run(hidden, cache, turn, mask, path)

    def _run(self, hidden: Tensor, cache: Cache, turn: Turn | None, mask: Tensor | None, path: str) -> Tensor:
        y = hidden.detach().clone(memory_format=torch.contiguous_format)
        half = self.shape.rotary_dim // 2
        cos, sin = (
            (None, None) if turn is None else (t[:, 0, :half].float().contiguous() for t in turn)
        )  # [B or 1, R/2]
        seat = self._seat(cache, 1 if cos is None else max(len(cos), len(sin)))
        room, step = seat.room, seat.step
        if room.cos is not None:
            room.turn(cos, sin)
        alive: list[Tensor] = []
        step.held, step.hidden = room.tokens, cpu.address(y, alive)
        step.cos, step.sin = cpu.address(cos, alive), cpu.address(sin, alive)
        step.turn_stride = 0 if cos is None or len(cos) == 1 else half
        mask = None if mask is None else _added(mask)
        step.mask, step.mask_stride = cpu.address(mask, alive), 0 if mask is None or len(mask) == 1 else mask.shape[1]
        self._pass(seat, path)
        room.show(room.tokens + 1)
        return y

    def _pass(self, seat: _Seat, path: str) -> None:
        """Run the seat's step through all blocks."""
        cpu.run(seat.step, seat.memory, path=path)

    def _served(self, cache: Cache) -> bool:
        """Whether the cache holds what the last step left there."""
        seat = self._seats.get(cache)
        return seat is not None and seat.room.shown_in([cache.layers[i] for i in self.layers])

    def _seat(self, cache: Cache, rows: int) -> _Seat:
        """Room for another token of the cache, and the step that writes there."""
        layers = [cache.layers[i] for i in self.layers]
        rotation = getattr(layers[0], "rotation", None)
        rows = rows if rotation is None else max(rows, len(rotation.cos))
        seat = self._seats.get(cache)
        fits = seat is not None and seat.threads == torch.get_num_threads() and seat.room.takes(rows)
        if not fits or not self._served(cache):
            seat = self._seats[cache] = self._take_seat(Room(layers, rows=rows))
        return seat

    def _take_seat(self, room: Room) -> _Seat:
        keep: list[Tensor] = []
        blocks = type(self._blocks).from_buffer_copy(self._blocks)
        for block, layer, held in zip(blocks, room.layers, room.held):
            block.cache = _cache(layer, held, keep)
        shape, half = self.shape, self.shape.rotary_dim // 2
        step = cpu.Step(batch=room.held.shape[2], channels=self._channels, blocks=len(blocks), block=blocks)
        step.heads, step.kv_heads, step.width, step.half = shape.heads, shape.kv_heads, shape.head_dim, half
        step.capacity, step.held = room.capacity, room.capacity - 1  # the most tokens that the memory must do for
        step.all_cos, step.all_sin = cpu.address(room.cos, keep), cpu.address(room.sin, keep)
        step.turns_stride = 0 if room.rows == 1 else room.capacity * half
        return _Seat(room, step, cpu.scratch(step), torch.get_num_threads(), blocks, keep)


Turn = tuple[Tensor, Tensor]


@dataclass(eq=False)
class _Seat:
    """A step that appends to a cache: `memory` for `threads` threads, its `blocks`, and the tensors that these point to."""

    room: Room
    step: cpu.Step
    memory: Tensor
    threads: int
    blocks: Array
    keep: list[Tensor]


def _check(blocks: list[nn.Module], roles: Roles, shape: Shape) -> None:
    if not native.fast_avx2():
        raise ValueError("no compiled kernels that this machine would run")
    if not blocks or shape.activation not in ACTIVATIONS or roles.rotary not in (None, "half"):
        raise ValueError(
            f"{len(blocks)} blocks, activation {shape.activation!r}, rotary {roles.rotary!r}: at least one block, "
            f"one of {sorted(ACTIVATIONS)}, 'half' or None"
        )
    if shape.head_dim % 8 or shape.heads % shape.kv_heads or shape.rotary_dim % 2 or shape.rotary_dim > shape.head_dim:
        raise ValueError(
            f"{shape}: heads must be a multiple of 8 channels, and as many as, or some times, the KV heads"
        )
    if (roles.rotary is None) != (shape.rotary_dim == 0):
        raise ValueError(f"rotary {roles.rotary!r} over {shape.rotary_dim} channels")


def _cache(layer: DynamicLayer, held: Tensor, keep: list[Tensor]) -> cpu.Cache:
    """held: [2, B, H, capacity, bytes or D]."""
    cache = cpu.Cache(bits=16, keys=cpu.address(held[0], keep), values=cpu.address(held[1], keep))
    if not isinstance(layer, PackedCacheLayer):
        return cache
    grid, spared = layer.grid, layer.spared
    cache.bits = grid.bits
    for name in ("key_scale", "key_zero", "value_scale", "value_zero"):
        setattr(cache, name, cpu.address(getattr(grid, name).float().contiguous(), keep))
    if spared is not None:
        cache.spared = spared.at.numel()
        cache.spared_keys, cache.spared_values = (
            cpu.address(t.float().contiguous(), keep) for t in (spared.keys, spared.values)
        )
        cache.spared_rows = cpu.address(spared.rows.contiguous(), keep)
        cache.spared_at = cpu.address(spared.at.contiguous(), keep)
    return cache


def _added(mask: Tensor) -> Tensor:
    """[B or 1, 1, 1, S], bool or not -> what is added to the scores, float32 [B or 1, S]."""
    mask = mask[:, 0, 0]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
    return mask.float().contiguous()
