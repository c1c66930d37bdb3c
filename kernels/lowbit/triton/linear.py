"""`lowbit.cpu.planar` on a GPU: the same functions over the same tensors, by the Triton kernels.

No number leaves the GPU to be looked at, so that a call waits for nothing: that clusters are whole tiles, at least one, and of at most 8
bits `lowbit.integer.take` has seen when the linear was laid out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.planar import TILE, PlanarWeight
from lowbit.planar_reference import Quantized, check_terms, repeat_tiles
from lowbit.triton import planar_linear as linear
from lowbit.triton import quantize


def quantize_static(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: Tensor,
    sizes: Tensor,
    *,
    repeats: Tensor | None = None,
    norm: dict[str, Any] | None = None,
) -> Quantized:
    """`lowbit.planar_reference.quantize_static_planar` of x float [T, C], contiguous.

    repeats: the weight's, for `repeat_tiles` of the result. norm: that of x is what is rounded; arguments of
    `lowbit.triton.quantize.norm_quantize`. Raises ValueError for tensors of other shapes, or not all on x's device.
    """
    _check_grids(x, bits, sizes, scale=scale, zero=zero)
    of_tile = [_of_tiles(t, sizes, x.shape[1]) for t in (scale, zero, bits)]
    (a, _, _, count), _ = quantize.norm_quantize(x, of_tile[2], scale=of_tile[0], zero=of_tile[1], **(norm or {}))
    middle = torch.exp2(of_tile[2].float() - 1)
    more = count.shape[1] - middle.numel()
    step, shift = of_tile[0], of_tile[0] * (middle - of_tile[1])  # [tiles]
    step, shift = F.pad(step, (0, more), value=1)[None], F.pad(shift, (0, more))[None]  # [tiles] -> [1, G]
    return repeat_tiles((a, step, shift, count), x.shape[1], repeats)


def quantize_tiles(
    x: Tensor, bits: Tensor, sizes: Tensor, *, repeats: Tensor | None = None, norm: dict[str, Any] | None = None
) -> Quantized:
    """`lowbit.planar_reference.quantize_tiles_planar`, but a shift of zeros where that gives None.

    No cluster may be empty, and with a norm each must be a tile. Arguments and errors as of `quantize_static`.
    """
    _check_grids(x, bits, sizes)
    if sizes.numel() == _tiles(x.shape[1]):
        found, _ = quantize.norm_quantize(x, bits, **(norm or {}))
    elif norm is not None:
        raise ValueError(f"{sizes.numel()} clusters of {_tiles(x.shape[1])} tiles: normalize x first")
    else:
        found = quantize.quantize_clusters(x, bits, _tiles(sizes).cumsum(0), brief=True)
    return repeat_tiles(found, x.shape[1], repeats)


def quantize_token(x: Tensor, bits: int, *, repeats: Tensor | None = None) -> Quantized:
    """`lowbit.planar_reference.quantize_token_planar`, with shift, arguments and errors as of `quantize_tiles`."""
    _check_rows(x)
    if not 2 <= bits <= 8:
        raise ValueError(f"activation bits {bits}: integer kernels take 2 to 8")
    whole = torch.full((1,), bits, dtype=torch.uint8, device=x.device)
    ends = torch.full((1,), _tiles(x.shape[1]), device=x.device)
    return repeat_tiles(quantize.quantize_clusters(x, whole, ends, brief=False), x.shape[1], repeats)


def quantize_exactly(x: Tensor) -> Quantized:
    """x float [T, C], contiguous, which has no grid, as two codes a number: `lowbit.cpu.planar.quantize_exactly`."""
    _check_rows(x)
    return quantize.quantize_exactly(x)


def planar_linear(
    a: Tensor,
    step: Tensor,
    shift: Tensor | None,
    count: Tensor,
    weight: PlanarWeight,
    bias: Tensor | None = None,
    *,
    terms: int = 1,
) -> Tensor:
    """`lowbit.planar_reference.planar_linear` in float32 sums, [T, R].

    terms: as `lowbit.cpu.planar.planar_linear` has it: of 2, a token's codes are rows t and T + t, and both products are added.

    Raises:
        ValueError: tensors of other shapes or dtypes than the reference takes, or on several devices.
    """
    T, G = a.shape[0], weight.tiles
    check_terms(terms, T)
    device = weight.scale.device
    steps: set[tuple[int, ...]] = {(T, G), (1, G)}
    _check("a", a, device, torch.int8, {(T, G * TILE)})
    _check("step", step, device, torch.float32, steps)
    _check("count", count, device, torch.float32, {(T, G)})
    if shift is not None:
        _check("shift", shift, device, torch.float32, steps)
    if bias is not None:
        _check("bias", bias, device, torch.float32, {(weight.rows,)})
    grids = weight.scale, weight.zero, None if shift is None else weight.total
    added = bias if terms == 1 else None
    y = linear.planar_linear(a, step, shift, count, weight.planes, *grids, added, bits=weight.bits)
    if terms == 1:
        return y
    y = y.unflatten(0, (terms, -1)).sum(0)  # [2 T, R] -> [T, R]
    return y if bias is None else y + bias


def _tiles(channels):
    """How many tiles hold so many channels, a number or a tensor of them."""
    return (channels + TILE - 1) // TILE


def _of_tiles(grids: Tensor, sizes: Tensor, channels: int) -> Tensor:
    """A cluster's value for each of its tiles: [n] -> [tiles with channels]."""
    return grids.repeat_interleave(_tiles(sizes), output_size=_tiles(channels))


def _check_rows(x: Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point() or not x.is_contiguous():
        raise ValueError(f"x must be contiguous float [T, C], got {x.dtype} {list(x.shape)}, strides {x.stride()}")


def _check_grids(x: Tensor, bits: Tensor, sizes: Tensor, **grids: Tensor) -> None:
    _check_rows(x)
    clusters = {tuple(sizes.shape)}
    _check("bits", bits, x.device, torch.uint8, clusters)
    _check("sizes", sizes, x.device, torch.int64, {(sizes.numel(),)})
    for name, grid in grids.items():
        _check(name, grid, x.device, torch.float32, clusters)


def _check(name: str, t: Tensor, device: torch.device, dtype: torch.dtype, shapes: set[tuple[int, ...]]) -> None:
    fits = t.dtype == dtype and tuple(t.shape) in shapes and t.device == device
    if not fits or (t.dim() == 1 and not t.is_contiguous()):
        wanted = " or ".join(str(list(shape)) for shape in sorted(shapes))
        raise ValueError(f"{name} must be {dtype} {wanted} on {device}, got {t.dtype} {list(t.shape)} on {t.device}")
