"""x W^T for a weight with many zeros, which are left out of the sums."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lowbit.cpu import native

TILE = 96  # channels in a tile; an index is a channel's place in its tile
SPARSE = 0.4  # share of zeros from which leaving them out is faster


@dataclass(frozen=True)
class SparseTiles:
    """The nonzero entries of a weight [R, C], a tile of TILE channels after another, in each row after row.

    values: float32 [K]. index: uint8 [K], each entry's channel in its tile. starts: int64 [ceil(C / TILE), R + 1], where the entries
    of a tile's rows start, and where its last row ends. shape: (R, C). 5 bytes an entry.
    """

    values: torch.Tensor
    index: torch.Tensor
    starts: torch.Tensor
    shape: tuple[int, int]


def sparse_tiles(weight: torch.Tensor) -> SparseTiles:
    """Lay out the nonzero entries of weight float32 [R, C] for `sparse_linear`.

    Raises:
        ValueError: a weight that is not a float32 matrix.
    """
    if weight.dim() != 2 or weight.dtype != torch.float32:
        raise ValueError(f"weight must be float32 [R, C], got {weight.dtype} {list(weight.shape)}: cast it")
    if weight.device.type == "cpu" and native.library():
        from lowbit.cpu.sparse_linear import tiles

        return SparseTiles(*tiles(weight.contiguous()), tuple(weight.shape))
    R, C = weight.shape
    count = -(-C // TILE)
    padded = F.pad(weight, (0, -C % TILE)).unflatten(1, (count, TILE)).transpose(0, 1)  # [R, C] -> [tiles, R, TILE]
    tile, row, index = padded.nonzero(as_tuple=True)  # each [K]
    ends = F.pad((padded != 0).sum(2).flatten().cumsum(0), (1, 0))  # [tiles, R, TILE] -> [tiles R + 1]
    rows = torch.arange(count, device=ends.device)[:, None] * R + torch.arange(R + 1, device=ends.device)
    return SparseTiles(padded[tile, row, index], index.byte(), ends[rows], (R, C))


def pays(weight: torch.Tensor) -> bool:
    """Whether `sparse_linear` is faster than the product with the whole weight [R, C]: on AVX2, with enough zeros."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not native.fast_avx2():
        return False
    return int(weight.count_nonzero()) <= (1 - SPARSE) * weight.numel()


def sparse_linear(x: torch.Tensor, tiles: SparseTiles, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x W^T + bias over the nonzero entries of W [R, C].

    On a CPU with the compiled kernel the zeros cost nothing: at half of them, and from a few dozen tokens on, this beats the product with
    the whole weight. A token's result does not depend on the others, nor on the number of threads.

    Args:
        x: float32 [..., C].
        tiles: `sparse_tiles` of W.
        bias: float32 [R].

    Returns:
        float32 [..., R].

    Raises:
        ValueError: tensors that do not fit each other, or are not float32 on the weight's device.
    """
    R, C = tiles.shape
    _check("x", x, tiles, (*x.shape[:-1], C))
    if bias is not None:
        _check("bias", bias, tiles, (R,))
    with torch.no_grad():
        if x.device.type == "cpu" and native.library():
            from lowbit.cpu.sparse_linear import sparse_linear as kernel

            flat = x.reshape(math.prod(x.shape[:-1]), C).contiguous()  # [..., C] -> [T, C]
            return kernel(flat, tiles, bias).view(*x.shape[:-1], R)  # [T, R] -> [..., R]
        return F.linear(x, untiled(tiles), bias)


def untiled(tiles: SparseTiles) -> torch.Tensor:
    """The weight float32 [R, C] that `sparse_tiles` laid out."""
    R, C = tiles.shape
    counts = tiles.starts.diff(dim=1).flatten()  # [tiles, R] -> [tiles R]
    place = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)  # [K], tile R + row
    weight = tiles.values.new_zeros(R, len(tiles.starts) * TILE)
    weight[place % R, place // R * TILE + tiles.index] = tiles.values
    return weight[:, :C].contiguous()


def _check(name: str, tensor: torch.Tensor, tiles: SparseTiles, shape: tuple[int, ...]) -> None:
    values = tiles.values
    if tuple(tensor.shape) != shape or tensor.dtype != values.dtype or tensor.device != values.device:
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        R, C = tiles.shape
        raise ValueError(
            f"{name} must be {values.dtype} {list(shape)} on {values.device} for a weight [{R}, {C}], got {found}"
        )
