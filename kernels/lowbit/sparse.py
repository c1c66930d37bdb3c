"""Two codecs for weights with zeros: a bitmask for any pattern, and slots with indices for keep-n-of-m.

Both keep the entries that differ from `blank`, the value of a pruned weight: 0 for numbers (so -0.0 is never stored), the row's zero
point for codes. Decoding puts `blank` everywhere else. docs/format.md says the same byte by byte.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit.packing import pack, unpack

LARGEST_GROUP = 16


def mask_pack(kept: Tensor) -> Tensor:
    """bool [..., C] -> uint8 [..., ceil(C/8)]: channel c is bit c % 8 of byte c // 8, unused high bits are zero.

    Raises:
        ValueError: not bool, or a scalar.
    """
    if kept.dtype != torch.bool or kept.dim() == 0:
        raise ValueError(f"mask is {kept.dtype} of shape {tuple(kept.shape)}; pass bool with at least one dimension")
    octets = -(-kept.shape[-1] // 8)
    bits = pad(kept, (0, octets * 8 - kept.shape[-1])).unflatten(-1, (octets, 8)).byte()  # [..., C] -> [..., bytes, 8]
    return (bits << torch.arange(8, dtype=torch.uint8, device=kept.device)).sum(-1, dtype=torch.uint8)


def mask_unpack(packed: Tensor, channels: int) -> Tensor:
    """Inverse of `mask_pack`: uint8 [..., ceil(C/8)] -> bool [..., C].

    Raises:
        ValueError: wrong dtype or number of bytes, or a bit set beyond the last channel.
    """
    octets = -(-channels // 8)
    if packed.dtype != torch.uint8 or packed.dim() == 0 or packed.shape[-1] != octets:
        raise ValueError(
            f"mask is {packed.dtype} of shape {tuple(packed.shape)}; {channels} channels are uint8 rows of {octets} bytes"
        )
    bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1  # [..., bytes, 8]
    bits = bits.bool().flatten(-2)  # [..., bytes, 8] -> [..., 8 bytes]
    if bits[..., channels:].any():
        raise ValueError(f"mask has bits set beyond channel {channels}; the mask is corrupt")
    return bits[..., :channels].contiguous()


def bitmask_encode(values: Tensor, kept: Tensor, *, blank: Tensor | int = 0) -> tuple[Tensor, Tensor]:
    """Store what is kept and is not `blank`, row after row; a row starts where the mask bits of the rows before it end.

    Args:
        values: [R, C], numbers or codes.
        kept: bool [R, C].
        blank: what a pruned entry decodes to, broadcastable to [R, C].

    Returns:
        (values [K] in the dtype of `values`, mask uint8 [R, ceil(C/8)]).

    Raises:
        ValueError: a mask that is not bool or of another shape.
    """
    _check_mask(values, kept)
    kept = kept & (values != blank)
    return values[kept], mask_pack(kept)


def bitmask_decode(values: Tensor, mask: Tensor, *, channels: int, blank: Tensor | int = 0) -> Tensor:
    """Inverse of `bitmask_encode`: values [K], mask uint8 [R, ceil(C/8)] -> [R, C] with `blank` where nothing is kept.

    Raises:
        ValueError: a mask that is corrupt or keeps another number of entries than there are values.
    """
    kept = mask_unpack(mask, channels)  # [R, C]
    if (count := int(kept.sum())) != values.numel():
        raise ValueError(f"the mask keeps {count} entries, {values.numel()} values are stored; the weight is corrupt")
    return _filled(kept.shape, values, blank).masked_scatter_(kept, values)


def check_keep(keep: tuple[int, int]) -> None:
    """ValueError unless `keep` is (n, m) with 1 <= n < m <= 16."""
    n, m = keep
    if not 1 <= n < m <= LARGEST_GROUP:
        raise ValueError(f"cannot store {n}:{m} sparsity; n:m keeps n of m with 1 <= n < m <= {LARGEST_GROUP}")


def slots_per_row(channels: int, keep: tuple[int, int]) -> int:
    """Values stored a row: n for each whole group of m channels, ceil(n t / m) for a tail of t channels."""
    check_keep(keep)
    n, m = keep
    whole, tail = divmod(channels, m)
    return whole * n - (-n * tail // m)


def index_bytes(channels: int, keep: tuple[int, int]) -> int:
    """Bytes of one row of packed indices, ceil(log2 m) bits a slot."""
    return -(-slots_per_row(channels, keep) * _index_bits(keep[1]) // 8)


def group_counts(kept: Tensor, keep: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(entries kept in each group int64 [R, ceil(C/m)], the most each may keep int64 [ceil(C/m)]) of a mask bool [R, C]."""
    n, m = keep
    groups = -(-kept.shape[1] // m)
    counts = _grouped(kept, m).sum(-1)  # [R, G, m] -> [R, G]
    most = torch.full((groups,), n, device=kept.device)
    if tail := kept.shape[1] % m:
        most[-1] = -(-n * tail // m)
    return counts, most


def nm_encode(values: Tensor, kept: Tensor, keep: tuple[int, int], *, blank: Tensor | int = 0) -> tuple[Tensor, Tensor]:
    """Store n slots for each group of m channels; a group that keeps fewer fills up with its first unused positions.

    Args:
        values: [R, C], numbers or codes.
        kept: bool [R, C]; entries equal to `blank` do not count.
        keep: (n, m).
        blank: what a pruned entry decodes to and an unused slot holds, broadcastable to [R, C].

    Returns:
        (values [R, S] with S = `slots_per_row`, packed indices uint8 [R, `index_bytes`]); positions ascend inside a group.

    Raises:
        ValueError: a bad mask or n:m, or a group that keeps more than fit.
    """
    _check_mask(values, kept)
    check_keep(keep)
    R, C = kept.shape
    m = keep[1]
    kept = kept & (values != blank)
    counts, most = group_counts(kept, keep)  # [R, G], [G]
    if (counts > most).any():
        row, group = (counts > most).nonzero()[0].tolist()
        count, slots = int(counts[row, group]), int(most[group])
        raise ValueError(f"row {row}, group {group} keeps {count}, {keep[0]}:{m} has {slots} slots; prune first")
    unused = ~_grouped(kept, m)  # [R, C] -> [R, G, m]
    filler = unused & (unused.cumsum(-1) <= (most - counts).unsqueeze(-1))
    stored = (~unused | filler).flatten(1)[:, :C]  # [R, G, m] -> [R, C]
    S = slots_per_row(C, keep)
    channels = torch.arange(C, device=kept.device).expand(R, C)[stored].view(R, S)  # [R S] -> [R, S]
    values = _filled(kept.shape, values, blank).masked_scatter_(kept, values[kept])
    return values[stored].view(R, S), _pack_indices((channels % m).byte(), m)  # [R S] -> [R, S]


def nm_decode(
    values: Tensor, indices: Tensor, *, channels: int, keep: tuple[int, int], blank: Tensor | int = 0
) -> Tensor:
    """Inverse of `nm_encode`: values [R, S], indices uint8 [R, bytes] -> [R, C] with `blank` where there is no slot.

    Raises:
        ValueError: another number of slots, or positions outside their group, or not ascending.
    """
    n, m = keep
    S = slots_per_row(channels, keep)
    if values.dim() != 2 or values.shape[1] != S:
        raise ValueError(f"values are {tuple(values.shape)}; {channels} channels at {n}:{m} are rows of {S} slots")
    index = _unpack_indices(indices, m, S).long()  # [R, S]
    channel = torch.arange(S, device=values.device) // n * m + index  # [R, S]
    if ((index >= m) | (channel >= channels)).any():
        raise ValueError(f"an index points outside its group of {m}; the weight is corrupt")
    if (channel.diff(dim=1) <= 0).any():
        raise ValueError(f"indices do not ascend inside a group of {m}; the weight is corrupt")
    return _filled((values.shape[0], channels), values, blank).scatter_(1, channel, values)


def _check_mask(values: Tensor, kept: Tensor) -> None:
    if kept.dtype != torch.bool or kept.dim() != 2 or kept.shape != values.shape:
        raise ValueError(
            f"mask is {kept.dtype} {tuple(kept.shape)} for a weight of {tuple(values.shape)}; pass bool [R, C] like the weight"
        )


def _filled(shape: tuple[int, ...], like: Tensor, blank: Tensor | int) -> Tensor:
    """`blank` spread over `shape`, in the dtype of `like`."""
    return like.new_zeros(shape).copy_(torch.as_tensor(blank, device=like.device))


def _grouped(kept: Tensor, m: int) -> Tensor:
    """[R, C] -> [R, ceil(C/m), m], the last group filled with False."""
    groups = -(-kept.shape[1] // m)
    return pad(kept, (0, groups * m - kept.shape[1])).unflatten(1, (groups, m))


def _index_bits(m: int) -> int:
    return (m - 1).bit_length()


def _pack_indices(indices: Tensor, m: int) -> Tensor:
    bits = _index_bits(m)
    return mask_pack(indices.bool()) if bits == 1 else pack(indices, bits)


def _unpack_indices(packed: Tensor, m: int, slots: int) -> Tensor:
    bits = _index_bits(m)
    return mask_unpack(packed, slots) if bits == 1 else unpack(packed, bits, slots)
