"""Generation without Python between the modules: one native call runs some tokens of each sequence through consecutive decoder blocks.

A `Decoder` is made of blocks whose linears run on integer kernels (`lowbit.integer.take`) and computes what the blocks compute, to
float32's accuracy. `attach` puts it into a transformers model, where it takes the steps it can, prefill included; every step that it
cannot take is run by the modules on the same cache.
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import Array
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from lowbit.cache import PackedCacheLayer
from lowbit.cpu import decode as cpu
from lowbit.cpu import native
from lowbit.decode_blocks import ACTIVATIONS, block_of, end_of, most_sinks
from lowbit.decode_cache import Room, spare, start, unless_it_fails
from lowbit.decode_cache import obstacle as cache_obstacle
from lowbit.integer import FEW_TOKENS
from lowbit.modules import ActivationQuantizer, Linear
from lowbit.sinks import leading, sink_rows

PREFILL_TOKENS = (
    1024  # of all sequences together, that go through a block at a time: what is held between phases grows with them
)


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
    """Runs tokens through `blocks` natively; they are layers `first`, `first` + 1, ... of the caches it is given.

    What the blocks compute is read now: make a new one when their tensors change.

    Raises:
        ValueError: why these blocks cannot run natively.
    """

    def __init__(self, blocks: list[nn.Module], roles: Roles, shape: Shape, *, first: int = 0):
        _check(blocks, roles, shape)
        self.roles, self.shape, self.layers = roles, shape, range(first, first + len(blocks))
        self.sinks = max(most_sinks(block) for block in blocks)
        quantizers = [m for block in blocks for m in block.modules() if isinstance(m, ActivationQuantizer)]
        self._spare_alike = {q.sinks for q in quantizers} <= {self.sinks}
        self._keep: list[Tensor] = []
        self._blocks = (cpu.Block * len(blocks))()
        self._channels = blocks[0].get_submodule(roles.qkv[0]).in_features
        self._end: cpu.End | None = None
        self._seats: weakref.WeakKeyDictionary[Cache, Seat] = weakref.WeakKeyDictionary()
        self._read(blocks)

    def _read(self, blocks: list[nn.Module]) -> None:
        for i, block in enumerate(blocks):
            try:
                self._blocks[i] = block_of(block, self.roles, self.shape, self._keep)
            except ValueError as error:
                raise ValueError(f"block {self.layers[i]}: {error}") from None

    def end_with(self, norm: nn.Module, head: Linear) -> None:
        """Let `step_on` make logits by `norm`, which comes after the blocks, and `head` after it.

        Raises:
            ValueError: why these cannot run natively.
        """
        self._end = end_of(norm, self.roles.norm, head, self._keep)
        self._seats.clear()  # whose memory is for less

    def obstacle(
        self, hidden: Tensor, cache: Cache, turn: Turn | None = None, mask: Tensor | None = None
    ) -> str | None:
        """Why `step` cannot run with these, in one line; None if it can."""
        if hidden.ndim != 3 or hidden.shape[2] != self._channels or hidden.dtype != torch.float32 or not hidden.is_cpu:
            return f"hidden states of {list(hidden.shape)} {hidden.dtype} on {hidden.device}, not float32 tokens on the CPU"
        if torch.is_grad_enabled() and hidden.requires_grad:
            return "gradients are asked for"
        why = None if self._served(cache) else cache_obstacle(cache, self.layers, self.shape, self.roles.rotary)
        if why is not None:
            return why
        batch, tokens, _ = hidden.shape
        held = cache.get_seq_length(self.layers.start)
        if held and len(cache.layers[self.layers.start].keys) != batch:
            return f"{batch} sequences, {len(cache.layers[self.layers.start].keys)} in the cache"
        if not batch * tokens or batch * tokens > FEW_TOKENS and self._unrounded():
            return f"{batch * tokens} tokens, of which some linear rounds none"
        if not self._turns(turn, batch, tokens):
            return f"cosines and sines do not fit {tokens} tokens a sequence and {self.shape.rotary_dim} channels"
        if mask is not None and mask.shape not in {(b, 1, tokens, held + tokens) for b in (1, batch)}:
            return f"a mask of {list(mask.shape)} for {tokens} of {held + tokens} tokens"
        return self._sink_obstacle(hidden, cache, held) if self.sinks else None

    def _sink_obstacle(self, hidden: Tensor, cache: Cache, held: int) -> str | None:
        count = _first_sinks(hidden)
        if count is None or held and count:
            return "a token is an attention sink, and not among the first of every sequence"
        grids = [getattr(cache.layers[i], "grid", None) for i in self.layers]
        if count and not (self._spare_alike and all(grid is None or grid.sinks for grid in grids)):
            return "a token is an attention sink to some quantizers, and none to others"
        return None

    def _unrounded(self) -> bool:
        """Whether some linear multiplies inputs that have no grid."""
        return any(getattr(block, site).exact for block in self._blocks for site in ("qkv", "output", "up", "down"))

    def _turns(self, turn: Turn | None, batch: int, tokens: int) -> bool:
        if turn is None or self.roles.rotary is None:
            return (turn is None) == (self.roles.rotary is None)
        return all(t.shape in {(b, tokens, self.shape.rotary_dim) for b in (1, batch)} for t in turn)

    def step(
        self,
        hidden: Tensor,
        cache: Cache,
        *,
        turn: Turn | None = None,
        mask: Tensor | None = None,
        path: str = "fastest",
    ) -> Tensor:
        """The blocks' output for the next tokens of each sequence, which are appended to the cache; on torch.get_num_threads() threads.

        Args:
            hidden: float32 [B, T, C].
            cache: a `PackedCache` or DynamicCache. Its layers get views of a tensor with spare capacity.
            turn: cosines and sines of the tokens' positions, [B or 1, T, rotary_dim] each, both halves alike; None without rotary.
            mask: [B or 1, 1, T, held + T], bool (true: look) or added to the scores; None: each token looks at those up to itself.
            path: as for the sweep.

        Returns:
            float32 [B, T, C].

        Raises:
            CannotStep: what `obstacle` says.
            ValueError: a path that this machine lacks.
        """
        why = self.obstacle(hidden, cache, turn, mask)
        if why is not None:
            raise CannotStep(f"no native step: {why}; run the blocks")
        y = hidden.detach().contiguous()
        half = self.shape.rotary_dim // 2
        turn = None if turn is None else tuple(t[..., :half].float() for t in turn)  # [B or 1, T, R/2]
        mask = None if mask is None else _added(mask)
        sinks = _first_sinks(hidden) if self.sinks else 0
        with unless_it_fails(cache, self.layers):
            self._begin(cache, len(hidden), turn)
            if hidden.shape[1] == 1 and not sinks:
                return self._advance(cache, y.clone(), turn, mask, path)
            return self._prefill(cache, y, sinks, turn, mask, path)

    def _begin(self, cache: Cache, batch: int, turn: Turn | None) -> None:
        """Let an empty cache hold no token of each sequence."""
        layers = [cache.layers[i] for i in self.layers]
        if layers[0].get_seq_length() == 0:
            start(layers, batch, self.shape)
            for i, layer in zip(self.layers, layers):
                if turn is not None and isinstance(layer, PackedCacheLayer):
                    cache.announce(i, turn[0], *(t[:, :0] for t in turn))

    def _advance(self, cache: Cache, y: Tensor, turn: Turn | None, mask: Tensor | None, path: str) -> Tensor:
        """One token y [B, 1, C] of each sequence through the blocks, in place."""
        return self._append(self._seat(cache, 1, turn), y, turn, mask, path)

    def _append(
        self,
        seat: Seat,
        y: Tensor,
        turn: Turn | None,
        mask: Tensor | None,
        path: str,
        *,
        logits: Tensor | None = None,
    ) -> Tensor:
        """As `_advance`, to the cache that the seat is of. logits: as for `step_on`."""
        keep: list[Tensor] = []
        _aim(seat.step, seat.room.space.tokens, y, turn, mask, keep)
        seat.step.end, seat.step.logits = None if logits is None else self._ends(), cpu.address(logits, keep)
        self._pass([seat.step], path, memory=seat.memory)
        seat.room.show(seat.room.space.tokens + 1)
        return y

    def seat_for_one(self, cache: Cache, ids: Tensor) -> Seat | None:
        """What `step_on` takes, if the next token of each sequence, ids [B, 1], may come now and, where no token is masked, none is a sink.

        None if not.

        A cache has none until `step` has met it.
        """
        seat = self._seats.get(cache)
        if seat is None or seat.threads != torch.get_num_threads() or not self._served(cache):
            return None
        room = seat.room
        fits = room.space.held.shape[2] == len(ids) and 0 < room.space.tokens < room.capacity
        if not fits or len(ids) > FEW_TOKENS and self._unrounded():
            return None
        return seat if room.space.tokens >= self.sinks else None

    def step_on(
        self, cache: Cache, seat: Seat, hidden: Tensor, turn: Turn | None, *, logits: Tensor | None = None
    ) -> Tensor:
        """`step` without a mask, on the cache that the seat is for. Nothing else may have run since the seat was asked for.

        Args:
            hidden: float32 [B, 1, C] on the CPU.
            turn: cosines and sines of one of the halves, float32 [B or 1, 1, R/2] each, no more rows than the room's; None without rotary.
            logits: contiguous float32 [B, vocabulary], which are written if the decoder has an end (`end_with`).
        """
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        if seat.room.rotation is not None:
            seat.room.turn(*turn)
        if seat.room.lazy:  # the last thing it does shows the token, and nothing else of the cache changes
            return self._append(seat, hidden, turn, None, "fastest", logits=logits)
        with unless_it_fails(cache, self.layers):
            return self._append(seat, hidden, turn, None, "fastest", logits=logits)

    def _prefill(
        self, cache: Cache, y: Tensor, sinks: int, turn: Turn | None, mask: Tensor | None, path: str
    ) -> Tensor:
        """Sinks first, which round nothing; then as many tokens at a time as memory should hold."""
        (batch, tokens, _), layers = y.shape, [cache.layers[i] for i in self.layers]
        held, few = layers[0].get_seq_length(), max(1, PREFILL_TOKENS // batch)
        keep: list[Tensor] = []
        spared = None
        if sinks and isinstance(layers[0], PackedCacheLayer):
            kept = spare(layers, sinks, turn if turn is None else _between(turn, 0, sinks))
            spared = self._empty_step([DynamicLayer()] * len(layers), kept, keep)
        shown = layers[0].get_seq_length()
        seat = self._seat(cache, held + tokens - shown, turn if turn is None else _between(turn, shown - held, tokens))
        starts = [0] * bool(sinks) + [*range(sinks, tokens, few)]
        parts, steps = [], []
        for begin, end in zip(starts, [*starts[1:], tokens]):
            apart = spared is not None and begin < sinks
            step = cpu.Step.from_buffer_copy(spared[0] if apart else seat.step)
            step.tokens, step.spared, step.end = end - begin, begin < sinks, None
            parts.append(y[:, begin:end].clone(memory_format=torch.contiguous_format))
            some = None if turn is None else _between(turn, begin, end)
            seen = None if mask is None else mask[:, begin:end, : held + end]
            _aim(step, held + begin, parts[-1], some, seen, keep)
            steps.append(step)
        self._pass(steps, path)
        seat.room.show(held + tokens)
        return torch.cat(parts, 1)

    def _pass(self, steps: list[cpu.Step], path: str, *, memory: Tensor | None = None) -> None:
        """Run steps, each of which needs what those before it left in the cache, through all blocks. memory: for the only one."""
        for step in steps:
            cpu.run(step, cpu.scratch(step) if memory is None else memory, path=path)

    def _served(self, cache: Cache) -> bool:
        """Whether the cache holds what the last step left there."""
        seat = self._seats.get(cache)
        return seat is not None and seat.room.shown_in([cache.layers[i] for i in self.layers])

    def _seat(self, cache: Cache, tokens: int, turn: Turn | None) -> Seat:
        """Room for so many more tokens, turned so, in the cache, and the step that writes one there."""
        layers = [cache.layers[i] for i in self.layers]
        rotation = getattr(layers[0], "rotation", None)
        rows = max(1 if turn is None else len(turn[0]), 1 if rotation is None else len(rotation.cos))
        seat = self._seats.get(cache)
        fits = seat is not None and seat.threads == torch.get_num_threads() and seat.room.takes(tokens, rows)
        if not fits or not self._served(cache):
            seat = self._seats[cache] = self._take_seat(Room(layers, rows=rows, more=tokens))
        if turn is not None and rotation is not None:
            seat.room.turn(*turn)
        return seat

    def _take_seat(self, room: Room) -> Seat:
        keep: list[Tensor] = []
        step, blocks = self._empty_step(room.layers, room.space.held, keep)
        step.all_cos, step.all_sin = cpu.address(room.space.cos, keep), cpu.address(room.space.sin, keep)
        step.turns_stride = 0 if room.rows == 1 else room.capacity * step.half
        step.end = self._ends()
        return Seat(room, step, cpu.scratch(step), torch.get_num_threads(), blocks, keep)

    def makes_logits(self, batch: int) -> bool:
        """Whether `step_on` makes logits of so many sequences: there is an end, and it is for few if its input has no grid."""
        return self._end is not None and (batch <= FEW_TOKENS or not self._end.head.exact)

    def _ends(self):
        """A pointer to what makes logits; None if nothing does."""
        return None if self._end is None else ctypes.pointer(self._end)

    def _empty_step(self, layers: list, held: Tensor, keep: list[Tensor]) -> tuple[cpu.Step, Array]:
        """A step of one token a sequence, and its blocks, that writes to held [layers, 2, B, H, capacity, bytes or D]."""
        blocks = type(self._blocks).from_buffer_copy(self._blocks)
        for block, layer, own in zip(blocks, layers, held):
            block.cache = _cache(layer, own, keep)
        shape, capacity = self.shape, held.shape[4]
        step = cpu.Step(batch=held.shape[2], tokens=1, channels=self._channels, blocks=len(blocks), block=blocks)
        step.heads, step.kv_heads, step.width, step.half = (
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.rotary_dim // 2,
        )
        step.capacity, step.held = capacity, capacity - 1  # the most tokens that the memory must do for
        return step, blocks


Turn = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Seat:
    """A step that appends to a cache: `memory` for `threads` threads, its `blocks`, and the tensors that these point to."""

    room: Room
    step: cpu.Step
    memory: Tensor
    threads: int
    blocks: Array
    keep: list[Tensor]


def _between(turn: Turn, begin: int, end: int) -> Turn:
    """[B or 1, T, R/2] each -> those of some of the tokens."""
    return turn[0][:, begin:end], turn[1][:, begin:end]


def _aim(step: cpu.Step, held: int, y: Tensor, turn: Turn | None, mask: Tensor | None, keep: list[Tensor]) -> None:
    """Point a step at hidden states y [B, T, C] behind `held` tokens; `keep` gets what must outlive it.

    turn: [B or 1, T, R/2] each. mask: float32 [B or 1, T, held + T].
    """
    step.held, step.hidden = held, cpu.address(y, keep)
    cos, sin = (None, None) if turn is None else (t.contiguous() for t in turn)
    step.cos, step.sin = cpu.address(cos, keep), cpu.address(sin, keep)
    step.turn_stride = 0 if cos is None or len(cos) == 1 else cos[0].numel()
    mask = None if mask is None else mask.contiguous()
    step.mask, step.mask_stride = cpu.address(mask, keep), 0 if mask is None or len(mask) == 1 else mask[0].numel()


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
    """[B or 1, 1, T, S], bool or not -> what is added to the scores, float32 [B or 1, T, S]."""
    mask = mask[:, 0]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
    return mask.float()


def _first_sinks(hidden: Tensor) -> int | None:
    """How many tokens of hidden [B, T, C], the first of every sequence, are attention sinks; None if others are."""
    rows = sink_rows(hidden).squeeze(-1)  # [B, T, 1] -> [B, T]
    count = int(rows[0].sum())
    return count if torch.equal(rows, leading(len(rows), rows.shape[1], count)) else None
