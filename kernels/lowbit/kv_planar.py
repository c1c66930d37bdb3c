"""Keys and values in the layout that a GPU's decode kernel reads: codes in planes along the head, tokens in memory that grows in doublings.

A token's D channels of one head are first put in order: stored place p < D/2 and place D/2 + p hold the two members of rotary pair p, and
behind the pairs what does not rotate (`stored_order`; values never rotate). Then, with H = D/2 for places and unsigned codes q:

- 8 bits: one plane uint8 [..., D].
- 4 bits: one plane uint8 [..., D/2]; byte j: place j in its low nibble, place H + j in its high nibble.
- 2 bits: one plane uint8 [..., D/4]; byte j: places j, D/4 + j, D/2 + j, 3D/4 + j in bits 0-1, 2-3, 4-5, 6-7.
- 3 bits: that plane of the low two bits, then a plane uint8 [..., D/8] of the third: byte j: places j, D/8 + j, ... in bits 0 to 7.

So one byte, or two at 8 bits, holds both members of a pair: a kernel turns them in registers and no channel moves. D is a multiple of 8,
and the planes hold D bits/8 bytes a token, as many as the dense bit stream of `lowbit.cache`.

The functions that compute here are the reference of `lowbit.triton.kv`; they run in the dtype of the query, on any device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.attention import UNQUANTIZED_BITS, quantize_probabilities
from lowbit.cache import KVGrid, rotate
from lowbit.spared import Spared

# bits -> the widths of its planes
WIDTHS = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
LEAST_TOKENS = 256


def stored_order(channels: int, rotary: str | None, rotary_dim: int) -> Tensor:
    """int64 [D]: the channel at each stored place.

    Raises:
        ValueError: channels that are not a multiple of 8.
    """
    if channels % 8:
        raise ValueError(f"heads of {channels} channels: the decode kernel takes multiples of 8")
    pairs = torch.arange(rotary_dim)
    first, second = (pairs[0::2], pairs[1::2]) if rotary == "interleaved" else pairs.chunk(2)  # [R] -> 2 x [R/2]
    rest = torch.arange(rotary_dim, channels).chunk(2)  # [D - R] -> 2 x [(D - R)/2]
    return torch.cat([first, rest[0], second, rest[1]])


def to_planes(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Codes uint8 [..., D] in stored order -> the planes uint8 [..., D width/8]."""
    planes, done = [], 0
    for width in WIDTHS[bits]:
        fields = (codes >> done & 2**width - 1).unflatten(-1, (8 // width, -1))  # [..., D] -> [..., 8 / width, bytes]
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)[:, None]
        planes.append((fields << shifts).sum(-2, dtype=torch.uint8))
        done += width
    return tuple(planes)


def from_planes(planes: tuple[Tensor, ...], bits: int) -> Tensor:
    """Inverse of `to_planes`."""
    codes, done = torch.zeros((), dtype=torch.uint8, device=planes[0].device), 0
    for plane, width in zip(planes, WIDTHS[bits]):
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)[:, None]
        codes = (
            codes | (plane[..., None, :] >> shifts & 2**width - 1).flatten(-2) << done
        )  # [..., 8 / width, bytes] -> [..., D]
        done += width
    return codes


@dataclass(eq=False)
class PlanarKV:
    """The first `length` tokens of one layer's keys (before rotary) and values; memory behind them is undefined.

    keys, values: planes uint8 [B, H, capacity, D width/8]. grid: of this layer.
    """

    grid: KVGrid
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    length: int = 0

    @classmethod
    def empty(cls, grid: KVGrid, batch: int, device: torch.device, capacity: int = LEAST_TOKENS) -> PlanarKV:
        """No tokens yet, memory for `capacity`.

        Raises:
            ValueError: heads of a number of channels that is no multiple of 8.
        """
        heads, channels = grid.key_scale.shape
        stored_order(channels, grid.rotary, grid.rotary_dim)
        shapes = [(batch, heads, capacity, channels * width // 8) for width in WIDTHS[grid.bits]]
        keys, values = (
            tuple(torch.empty(shape, dtype=torch.uint8, device=device) for shape in shapes) for _ in range(2)
        )
        return cls(grid.to(device), keys, values)

    @classmethod
    def of_batches(cls, parts: list[PlanarKV]) -> PlanarKV:
        """Those of several batches, of one grid, length and capacity, as one."""
        keys, values = (tuple(map(torch.cat, zip(*(getattr(p, name) for p in parts)))) for name in ("keys", "values"))
        return cls(parts[0].grid, keys, values, parts[0].length)

    @property
    def capacity(self) -> int:
        """Tokens there is memory for."""
        return self.keys[0].shape[2]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all; what is held is copied into twice the memory at least."""
        if tokens > self.capacity:
            more = max(tokens, 2 * self.capacity) - self.capacity
            self.keys, self.values = (
                tuple(F.pad(plane, (0, 0, 0, more)) for plane in planes) for planes in (self.keys, self.values)
            )

    def orders(self) -> tuple[Tensor, Tensor]:
        """`stored_order` of keys and of values."""
        channels, device = self.grid.key_scale.shape[1], self.keys[0].device
        both = (self.grid.rotary, self.grid.rotary_dim), (None, 0)
        return tuple(stored_order(channels, *rotary).to(device) for rotary in both)


def append(kv: PlanarKV, keys: Tensor, values: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> None:
    """Add tokens: the codes that `lowbit.cache.PackedCacheLayer` would store.

    Args:
        keys, values: float [B, H, T, D]; keys after rotary where cos and sin are given, else before.
        cos, sin: float [B or 1, T, R/2], of these tokens.
    """
    if cos is not None:
        norm = cos.float().square() + sin.float().square()
        keys = rotate(keys.float(), cos.float() / norm, -sin.float() / norm, kv.grid.rotary)
    start, kv.length = kv.length, kv.length + keys.shape[2]
    kv.reserve(kv.length)
    grids = (kv.grid.key_scale, kv.grid.key_zero), (kv.grid.value_scale, kv.grid.value_zero)
    for x, (scale, zero), order, planes in zip((keys, values), grids, kv.orders(), (kv.keys, kv.values)):
        scale, zero = (t[:, None].to(x.device) for t in (scale, zero))  # [H, D] -> [H, 1, D]
        codes = ((x.float() / scale).round() + zero).nan_to_num(0).clamp(0, 2**kv.grid.bits - 1)
        for plane, new in zip(planes, to_planes(codes.to(torch.uint8)[..., order], kv.grid.bits)):
            plane[:, :, start : kv.length] = new


def decoded(kv: PlanarKV, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys before rotary and values [B, H, length, D] in `dtype`, their channels in the model's order."""
    both = []
    grids = (kv.grid.key_scale, kv.grid.key_zero), (kv.grid.value_scale, kv.grid.value_zero)
    for planes, (scale, zero), order in zip((kv.keys, kv.values), grids, kv.orders()):
        codes = from_planes(tuple(plane[:, :, : kv.length] for plane in planes), kv.grid.bits)[..., order.argsort()]
        scale, zero = (t[:, None].to(codes.device, dtype) for t in (scale, zero))  # [H, D] -> [H, 1, D]
        both.append((codes - zero) * scale)
    return both[0], both[1]


def attention_decode(
    query: Tensor,
    kv: PlanarKV,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    softmax_bits: int = UNQUANTIZED_BITS,
    spared: Spared | None = None,
) -> Tensor:
    """Attention of one new token over the cache, itself included: what `lowbit.attention` computes of the decoded cache.

    Args:
        query: float [B, Hq, D], after rotary; H KV heads serve Hq / H query heads each, in a row.
        cos, sin: [B or 1, length, R/2] of every token held, None without rotary.
        scaling: factor of the scores, D**-0.5 if None.
        mask: bool [B, length], true where a row may look; None: everywhere. A row that may look nowhere has NaN.
        softcap: scores become softcap * tanh(scores / softcap).
        softmax_bits: 2 to 8 round the probabilities to their grid (RPTQ), 16 does not.
        spared: the sinks, whose keys and values take the place of the decoded ones.

    Returns:
        [B, Hq, D] in the dtype of `query`, in which everything is computed.
    """
    keys, values = decoded(kv, query.dtype)
    if cos is not None:
        keys = rotate(keys, cos, sin, kv.grid.rotary)
    if spared is not None:
        keys, values = spared.restore(keys, values)
    B, heads, _, D = keys.shape
    q = query.unflatten(1, (heads, -1))  # [B, Hq, D] -> [B, H, group, D]
    scores = q @ keys.transpose(2, 3) * (D**-0.5 if scaling is None else scaling)  # [B, H, group, length]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    probabilities = scores.softmax(-1)
    if softmax_bits != UNQUANTIZED_BITS:
        probabilities = quantize_probabilities(probabilities, softmax_bits)
    return (probabilities @ values).flatten(1, 2)  # [B, H, group, D] -> [B, Hq, D]
