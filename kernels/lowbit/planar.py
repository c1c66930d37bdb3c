"""The weight layout that the integer kernels read: codes in planes of whole bits, grids a tile of 64 channels.

It is made when a model is loaded, from the tensors of the disk format, and is the same bytes on every device. In-channels are padded with
zero codes to Kp, a multiple of UNIT = 128. Codes are centred, v = q - 2^(b-1), in two's complement, a row's bytes contiguous:

- 8 bits: one plane int8 [R, Kp].
- 4 bits: one plane uint8 [R, Kp/2]. Byte j < 64 of a unit: channel j in its low nibble, channel 64 + j in its high nibble.
- 3 bits: a plane uint8 [R, Kp/4] of the low two bits, then a plane uint8 [R, Kp/8] of the sign bit.
- 2 bits: the plane uint8 [R, Kp/4] alone.

Byte j < 32 of a unit's two-bit plane: channels j, 32 + j, 64 + j, 96 + j in bits 0-1, 2-3, 4-5, 6-7. Byte j < 16 of a unit's sign plane:
channels j, 16 + j, ..., 112 + j in bits 0 to 7. The sign stands apart because a kernel with unsigned codes, v + 4, then only inverts a
plane of one bit, and one with signed codes finds v times 32 in the top bits of a byte.

A fine group's codes are twice as long. Their high bits lie where all codes do; the low bits of its tiles follow behind the last tile with
channels as tiles of their own, and read the activations of those tiles once more (`repeats`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.cpu import native
from lowbit.cpu.nibbles import nibbles
from lowbit.large_pages import empty, in_large_pages
from lowbit.packing import unpack

TILE, UNIT = 64, 128
BLOCK = 16  # rows whose grids a CPU kernel reads together
EXACT = 2  # int8 codes of a number that has no grid
AT_ONCE = 1 << 22  # codes that are laid out at a time on a CPU, through copies that take several bytes a code
# bits -> (channels in a byte of the plane, dtype) for each plane
PLANES = {
    8: ((1, torch.int8),),
    4: ((2, torch.uint8),),
    3: ((4, torch.uint8), (8, torch.uint8)),
    2: ((4, torch.uint8),),
}


@dataclass(frozen=True, eq=False)
class PlanarWeight:
    """W[r, c] = scale[g, r] v[r, c] - zero[g, r] in tile g = c // 64, for R rows of `channels` channels, G = Kp / 64 tiles.

    planes: the codes, as the module says. scale, zero, total: float32 [G, R]; zero = scale (z - 2^(b-1)), None where every zero point z
    is 2^(b-1); total is the sum of W over the tile's channels. A tile of padding has scale, zero and total 0.
    repeats: int64 [E], the tiles that have a second one, which adds to W; these follow in this order. None for none.

    Raises:
        ValueError: tensors of other shapes or dtypes, not contiguous, or on several devices.
    """

    bits: int
    channels: int
    rows: int
    planes: tuple[Tensor, ...]
    scale: Tensor
    zero: Tensor | None
    total: Tensor
    repeats: Tensor | None = None

    def __post_init__(self):
        if self.bits not in PLANES or len(self.planes) != len(PLANES[self.bits]) or self.channels < 1:
            raise ValueError(
                f"{len(self.planes)} planes of {self.bits}-bit codes, {self.channels} channels: use planar_weight"
            )
        for plane, (per_byte, dtype) in zip(self.planes, PLANES[self.bits]):
            self._check("a plane", plane, dtype, (self.rows, self.padded // per_byte))
        for name in ("scale", "zero", "total"):
            if name != "zero" or self.zero is not None:
                self._check(name, getattr(self, name), torch.float32, (self.tiles, self.rows))

    @cached_property
    def tables(self) -> Tensor:
        """The grids as a CPU reads them: uint8 [ceil(R / 16), octets, 16 G], for each block of 16 rows one table after another.

        First the scales [G, 16], float16 where that holds all of them exactly and none is negative, else float32; then, if there are
        zero points, z - 2^(b-1), int8 [G, 16]; then the sums of v - (z - 2^(b-1)) over each tile's channels, int16 [G, 16]. Zeros after
        row R. `octets`, the bytes of a tile's and row's grid, tells which: 4 or 6, and 1 more with zero points. Made when first asked for.
        """
        narrow = torch.equal(self.scale.half().float(), self.scale) and not self.scale.lt(0).any()
        divisor = torch.where(self.scale == 0, 1, self.scale)  # of padding
        parts = [self.scale.half() if narrow else self.scale]
        if self.zero is not None:
            parts.append((self.zero / divisor).round().to(torch.int8))
        parts.append((self.total / divisor).round().to(torch.int16))
        blocks = [_blocks_of(part).view(torch.uint8).flatten(1) for part in parts]  # [blocks, bytes] each
        return in_large_pages(torch.cat(blocks, 1)).unflatten(1, (-1, self.tiles * BLOCK))

    def to(self, device: torch.device) -> PlanarWeight:
        """The same on `device`; itself where it is there."""
        if device == self.scale.device:
            return self
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        held["planes"] = tuple(plane.to(device) for plane in self.planes)
        moved = {name: t.to(device) for name, t in held.items() if isinstance(t, Tensor)}
        return PlanarWeight(**held | moved).ready()

    def ready(self) -> PlanarWeight:
        """Itself, with its `tables` made if it is on a CPU: a graph that is being compiled could not make them."""
        if self.scale.is_cpu:
            self.tables  # noqa: B018
        return self

    @property
    def padded(self) -> int:
        """Kp."""
        return all_tiles(self.channels, self.repeats) * TILE

    @property
    def tiles(self) -> int:
        """G."""
        return self.padded // TILE

    def _check(self, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        fits = tensor.dtype == dtype and tensor.shape == shape and tensor.device == self.scale.device
        if not fits or not tensor.is_contiguous():
            found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"
            raise ValueError(f"{name} must be contiguous {dtype} {list(shape)} on {self.scale.device}, got {found}")


def _blocks_of(grids: Tensor) -> Tensor:
    """[G, R] -> [ceil(R / 16), G, 16], zeros after row R."""
    blocks = -(-grids.shape[1] // BLOCK)
    padded = F.pad(grids, (0, blocks * BLOCK - grids.shape[1]))
    return padded.unflatten(1, (blocks, BLOCK)).transpose(0, 1).contiguous()  # [G, blocks, 16] -> [blocks, G, 16]


def padded_channels(channels: int) -> int:
    """Kp: channels filled up to whole units."""
    return -(-channels // UNIT) * UNIT


def all_tiles(channels: int, repeats: Tensor | None) -> int:
    """G: the tiles of the channels and those repeated, filled up to whole units."""
    tiles = -(-channels // TILE) + (0 if repeats is None else repeats.numel())
    return padded_channels(tiles * TILE) // TILE


def tile_owners(sizes: Tensor, channels: int) -> Tensor:
    """int64 [ceil(channels / 64)]: which run of `sizes` [n] (weight groups, clusters of an activation) each tile lies in.

    Raises:
        ValueError: sizes that do not cover the channels, or a boundary inside a tile.
    """
    ends = sizes.long().cumsum(0)
    if channels < 1 or sizes.numel() == 0 or int(sizes.min()) < 0 or int(ends[-1]) != channels:
        raise ValueError(f"sizes sum to {int(sizes.sum())}; they must cover {channels} channels, at least one")
    inside = (ends % TILE != 0) & (ends < channels)
    if inside.any():
        raise ValueError(
            f"a boundary at channel {int(ends[inside][0])} lies inside a tile: make every group or cluster but the last "
            f"a multiple of {TILE} channels"
        )
    starts = torch.arange(0, channels, TILE, device=ends.device)
    return torch.searchsorted(ends, starts, right=True)


def planar_weight(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    sizes: Tensor,
    *,
    bits: int,
    channels: int,
    fine: tuple[Tensor, Tensor, Tensor] | None = None,
) -> PlanarWeight:
    """Lay out a packed weight for the integer kernels.

    Args:
        packed: uint8 [R, ceil(C bits/8)], as in `lowbit.Linear`.
        scale: float [R, n].
        zero: uint8 [R, ceil(n bits/8)], packed like the codes.
        sizes: integer [n], channels per group, sum C; each but the last a multiple of 64.
        bits: 8, 4, 3 or 2.
        channels: C.
        fine: the low bits of the codes and of the zero points of fine groups, and which these are: uint8 [R, ceil(K bits/8)], uint8
            [R, ceil(F bits/8)], int [F], ascending.

    Raises:
        ValueError: a tile that straddles two groups, or tensors that do not fit each other.
    """
    owner = tile_owners(sizes, channels)  # [tiles with channels]
    n, R = sizes.numel(), packed.shape[0]
    if scale.shape != (R, n) or zero.shape[0] != R:
        raise ValueError(f"scale {list(scale.shape)}, zero {list(zero.shape)}: {R} rows of {n} groups need [{R}, {n}]")
    inside = (channels - torch.arange(0, channels, TILE, device=packed.device)).clamp(max=TILE)  # [tiles with channels]
    s = scale.float()[:, owner]  # [R, n] -> [R, tiles]
    z = _centred(unpack(zero, bits, n), bits)[:, owner]  # [R, n] -> [R, tiles]
    repeats = rest = None
    if fine is not None:
        repeats, rest, z_rest = _rest(*fine, sizes.long(), owner, bits=bits)
        s, z = torch.cat([s, s[:, repeats] / 2**bits], 1), torch.cat([z, z_rest], 1)
        inside = torch.cat([inside, inside[repeats]])
    planes, sums = _laid_out(packed, rest, bits=bits, channels=channels)  # sums [R, G]
    more = sums.shape[1] - s.shape[1]
    s, z = F.pad(s, (0, more)), F.pad(z, (0, more))
    shifts = s * z  # [R, G]
    total = s.double() * sums - shifts.double() * F.pad(inside, (0, more))
    scale, zero, total = (t.float().t().contiguous() for t in (s, shifts, total))  # [R, G] -> [G, R]
    return PlanarWeight(bits, channels, R, planes, scale, zero if z.any() else None, total, repeats)


def _laid_out(packed: Tensor, rest: Tensor | None, *, bits: int, channels: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """(planes in large pages, sums of v int32 [R, G]) of packed codes and then the centred codes int8 [R, E, 64] of fine groups."""
    if bits == 4 and channels % UNIT == 0 and packed.is_cpu and native.library() is not None:
        plane, sums = nibbles(packed)
        if rest is None:
            return (plane,), sums
        low, more = _planes_of(rest, bits)
        return (in_large_pages(torch.cat([plane, *low], 1)),), torch.cat([sums, more], 1)
    R, some = len(packed), max(1, AT_ONCE // channels) if packed.is_cpu else len(packed)
    planes: tuple[Tensor, ...] = ()
    sums = []
    for start in range(0, max(R, 1), some):
        rows = slice(start, start + some)
        v = _tiled(_centred(unpack(packed[rows], bits, channels), bits))  # [r, C] -> [r, tiles, 64]
        parts, sum_of_rows = _planes_of(v if rest is None else torch.cat([v, rest[rows]], 1), bits)
        planes = planes or tuple(_empty_rows(R, part) for part in parts)
        for plane, part in zip(planes, parts):
            plane[rows] = part
        sums.append(sum_of_rows)
    return planes, torch.cat(sums)


def _empty_rows(count: int, like: Tensor) -> Tensor:
    """[count, ...] to be written yet, on a CPU in large pages."""
    shape = count, *like.shape[1:]
    return empty(shape, like.dtype) if like.is_cpu else like.new_empty(shape)


def _planes_of(v: Tensor, bits: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """(planes, sums int32 [R, G]) of v int8 [R, tiles, 64], filled up to whole units."""
    v = F.pad(v, (0, 0, 0, -v.shape[1] % (UNIT // TILE)))
    return _to_planes(v.flatten(1), bits), v.sum(2, dtype=torch.int32)  # [R, G, 64] -> [R, Kp], [R, G]


def _rest(codes: Tensor, zero: Tensor, fine: Tensor, sizes: Tensor, owner: Tensor, *, bits: int):
    """(repeats [E], v [R, E, 64], z [R, E]) of the tiles of fine groups: low bits, centred."""
    fine, of_fine = fine.long(), sizes[fine.long()]
    repeats = torch.isin(owner, fine).nonzero()[:, 0]
    z = _centred(unpack(zero, bits, fine.numel()), bits)  # [R, F]
    low = _centred(unpack(codes, bits, int(of_fine.sum())), bits)  # [R, K]
    v = torch.cat([_tiled(part) for part in low.split(of_fine.tolist(), 1)], 1)  # F x [R, n] -> [R, E, 64]
    return repeats, v, z[:, torch.searchsorted(fine, owner[repeats])]  # [R, F] -> [R, E]


def _centred(codes: Tensor, bits: int) -> Tensor:
    """q - 2^(b-1), uint8 -> int8."""
    middle = 2 ** (bits - 1)
    return (codes ^ middle).view(torch.int8) if bits == 8 else codes.view(torch.int8) - middle


def _tiled(v: Tensor) -> Tensor:
    """[R, C] -> [R, ceil(C / 64), 64], zeros behind C."""
    return F.pad(v, (0, -v.shape[1] % TILE)).unflatten(1, (-1, TILE))


def unplanar(weight: PlanarWeight) -> Tensor:
    """The centred codes v int8 [R, C] that `planar_weight` laid out."""
    return padded_codes(weight)[:, : weight.channels].contiguous()


def padded_codes(weight: PlanarWeight) -> Tensor:
    """The centred codes with their padding, int8 [R, Kp]."""
    if weight.bits == 8:
        return weight.planes[0]
    if weight.bits == 4:
        return _signed(_fields(weight.planes[0], 4, 64), 4)
    low = _fields(weight.planes[0], 2, 32)
    return _signed(low, 2) if weight.bits == 2 else _signed(low | _fields(weight.planes[1], 1, 16) << 2, 3)


def _to_planes(v: Tensor, bits: int) -> tuple[Tensor, ...]:
    """v int8 [R, Kp] -> the planes."""
    if bits == 8:
        return (v,)
    codes = v.view(torch.uint8) & (2**bits - 1)
    if bits == 4:
        return (_merged(codes, 4, 64),)
    low = _merged(codes & 3, 2, 32)
    return (low,) if bits == 2 else (low, _merged(codes >> 2, 1, 16))


def _merged(codes: Tensor, bits: int, octets: int) -> Tensor:
    """Codes [R, Kp] -> bytes [R, Kp bits/8]: byte j of a unit holds its channels j, octets + j, ... from the low bits up."""
    fields = codes.unflatten(1, (-1, 8 // bits, octets))  # [R, Kp] -> [R, units, 8 / bits, octets]
    merged = fields[:, :, 0].clone()
    for k in range(1, 8 // bits):
        merged |= fields[:, :, k] << k * bits
    return merged.flatten(1)  # [R, units, octets] -> [R, Kp bits/8]


def _fields(plane: Tensor, bits: int, octets: int) -> Tensor:
    """Inverse of `_merged`."""
    units = plane.unflatten(1, (-1, octets))  # [R, units, octets]
    fields = [units >> k * bits & 2**bits - 1 for k in range(8 // bits)]
    return torch.stack(fields, 2).flatten(1)  # [R, units, 8 / bits, octets] -> [R, Kp]


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Two's complement of `bits` bits, uint8 -> int8."""
    sign = 2 ** (bits - 1)
    return (codes ^ sign).view(torch.int8) - sign
