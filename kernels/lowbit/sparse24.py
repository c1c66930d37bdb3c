"""A weight that keeps 2 of every 4 channels, laid out for a GPU: the two values of a group beside each other, and where they belong.

It saves memory traffic, not products: a kernel puts zeros back in registers. 16-bit values take 9 bits a weight, 8-bit codes 5. Channels
are padded to Kp, a multiple of UNIT = 128, with groups of zeros.

- values [R, Kp/2]: float16 or bfloat16, or codes uint8; entries 2g and 2g + 1 are those of channels 4g to 4g + 3.
- places uint8 [R, Kp/8]: bits 4i to 4i + 3 of byte h are those of group 2h + i: the place in its group of the first value, then of the
  second, two bits each.
- of codes also scale, zero float32 [Kp/128, R]: an entry is scale (code - zero), and an empty slot holds the zero point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.packing import pack, unpack
from lowbit.sparse import nm_decode, slots_per_row

UNIT = 128
KEEP = (2, 4)


@dataclass(frozen=True, eq=False)
class Sparse24:
    """W [R, channels], as the module says; scale and zero are None for numbers."""

    channels: int
    values: Tensor
    places: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None


def sparse24(
    values: Tensor,
    indices: Tensor,
    *,
    channels: int,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Sparse24:
    """Lay out what `lowbit.sparse.nm_encode` made of a 2:4 weight.

    Args:
        values: float16 or bfloat16 [R, S], or codes uint8 [R, S] of 8 bits.
        indices: uint8 [R, ceil(S / 4)].
        channels: C.
        scale, zero, sizes: of codes: float [R, n], uint8 [R, n], and channels per group int [n], each but the last a multiple of 128.

    Raises:
        ValueError: another dtype, codes without grids, or a boundary of groups inside 128 channels.
    """
    if (values.dtype == torch.uint8) != (scale is not None) or values.dtype not in (
        torch.float16, torch.bfloat16, torch.uint8,
    ):  # fmt: skip
        raise ValueError(f"values are {values.dtype}; pass float16 or bfloat16, or uint8 codes with their grids")
    nm_decode(values, indices, channels=channels, keep=KEEP)  # what is corrupt raises here, not on the GPU
    S, Kp = slots_per_row(channels, KEEP), -(-channels // UNIT) * UNIT
    places = pack(F.pad(unpack(indices, 2, S), (0, Kp // 2 - S)), 2)  # [R, S] -> [R, Kp/2] -> [R, Kp/8]
    if scale is None:
        return Sparse24(channels, F.pad(values, (0, Kp // 2 - S)).contiguous(), places)
    ends = sizes.long().cumsum(0)
    if int(ends[-1]) != channels or (ends[:-1] % UNIT).any():
        raise ValueError(f"groups of {sizes.tolist()} channels; they must cover {channels} in multiples of {UNIT}")
    owner = torch.searchsorted(ends, torch.arange(0, Kp, UNIT, device=ends.device), right=True).clamp(max=len(ends) - 1)
    scale, zero = (t.float()[:, owner] for t in (scale, zero))  # [R, n] -> [R, Kp/128]
    filled = zero.byte().repeat_interleave(UNIT // 2, 1)  # [R, Kp/128] -> [R, Kp/2]
    filled[:, :S] = values
    return Sparse24(channels, filled, places, scale.t().contiguous(), zero.t().contiguous())


def dense_weight(weight: Sparse24) -> Tensor:
    """W [R, C] with its zeros: in the dtype of values, float32 from codes."""
    R, Kp = len(weight.values), 2 * weight.values.shape[1]
    if weight.scale is None:
        stored = weight.values
    else:
        scale, zero = (
            t.t().repeat_interleave(UNIT // 2, 1) for t in (weight.scale, weight.zero)
        )  # [G, R] -> [R, Kp/2]
        stored = (weight.values - zero) * scale
    place = unpack(weight.places, 2, Kp // 2).long()
    channel = torch.arange(Kp // 2, device=place.device) // 2 * 4 + place  # [R, Kp/2]
    full = stored.new_zeros(R, Kp)
    # Padding may name a place twice, with a zero: sums, so that it takes nothing away.
    return full.scatter_add_(1, channel, stored)[:, : weight.channels].contiguous()


def sparse24_linear(x: Tensor, weight: Sparse24, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias: x float [T, C], bias [R] -> [T, R] in x's dtype."""
    return F.linear(x, dense_weight(weight).to(x.dtype), None if bias is None else bias.to(x.dtype))
