"""Integer linears over the planar layout in plain PyTorch: they define what every kernel must equal.

An activation is xhat[t, c] = step[t, g] a[t, c] + shift[t, g] in tile g = c // 64, codes a int8 with 0 in the padding. Codes of at most 7
bits on dynamic grids are a = q - z, which needs no shift; 8-bit ones are a = q - 128. Static zero points are unbounded, so there always
a = q - 2^(b-1), and the shift, the same for every token, is folded into the bias once (`folded_bias`).

A tile whose token is not a number has NaN in `count`, and the token's outputs are NaN. So has a dynamic tile with an infinity; on a static
grid infinities saturate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.planar import TILE, PlanarWeight, all_tiles, padded_channels, padded_codes, tile_owners
from lowbit.reference import tile_extremes

Quantized = tuple[Tensor, Tensor, Tensor | None, Tensor]


def planar_linear(
    a: Tensor, step: Tensor, shift: Tensor | None, count: Tensor, weight: PlanarWeight, bias: Tensor | None = None
) -> Tensor:
    """y[t, r] = bias[r] + sum_g step[t, g] scale[g, r] (a . v)_g - zero[g, r] count[t, g] + shift[t, g] total[g, r].

    Args:
        a: int8 [T, Kp].
        step: float32 [T, G], or [1, G] for grids that are the same for every token.
        shift: float32 like step, None for zeros.
        count: float32 [T, G], step times the sum of a over the tile.
        weight: `planar_weight` of W [R, C].
        bias: float32 [R].

    Returns:
        float32 [T, R]; the sums are float64, so that it is rounded once.
    """
    v, G = padded_codes(weight).double(), weight.tiles
    tiles = (
        a.double().unflatten(1, (G, TILE)),
        v.unflatten(1, (G, TILE)),
    )  # [T, Kp] -> [T, G, 64], [R, Kp] -> [R, G, 64]
    y = a.new_zeros(len(a), weight.rows, dtype=torch.float64)
    if bias is not None:
        y += bias
    for g in range(G):
        dots = tiles[0][:, g] @ tiles[1][:, g].t()  # [T, 64] [64, R] -> [T, R], whole numbers
        y += step[:, g, None].double() * weight.scale[g] * dots
        if weight.zero is not None:
            y -= count[:, g, None].double() * weight.zero[g]
        if shift is not None:
            y += shift[:, g, None].double() * weight.total[g]
    return y.masked_fill_(count.isnan().any(1, keepdim=True), torch.nan).float()


def folded_bias(shift: Tensor, weight: PlanarWeight, bias: Tensor | None = None) -> Tensor:
    """bias[r] + sum_g shift[g] total[g, r]: shift float32 [1, G] of a static grid, bias float [R] -> float32 [R]."""
    constant = (shift.double() @ weight.total.double())[0]  # [1, G] [G, R] -> [R]
    return (constant if bias is None else constant + bias).float()


def repeat_tiles(quantized: Quantized, channels: int, repeats: Tensor | None) -> Quantized:
    """Codes and grids with some tiles once more, as a weight reads them that has `PlanarWeight.repeats`: each [..., G'] for [..., G]."""
    if repeats is None:
        return quantized
    a, step, shift, count = quantized
    tiles, G = -(-channels // TILE), all_tiles(channels, repeats)
    index = torch.cat([torch.arange(tiles, device=repeats.device), repeats])

    def again(t: Tensor | None, blank: float) -> Tensor | None:
        return None if t is None else F.pad(t[..., index], (0, G - index.numel()), value=blank)

    codes = a.unflatten(-1, (-1, TILE))[..., index, :]  # [..., Kp] -> [..., tiles + E, 64]
    a = F.pad(codes, (0, 0, 0, G - index.numel())).flatten(-2)  # [..., G', 64] -> [..., Kp']
    return a, again(step, 1), again(shift, 0), again(count, 0)


def quantize_tiles_planar(x: Tensor, bits: Tensor, sizes: Tensor) -> Quantized:
    """The codes of `lowbit.reference.quantize_activation_tiles`: each token's own grid in each cluster of channels.

    Args:
        x: float [T, C].
        bits: uint8 [n], 2 to 8.
        sizes: integer [n], channels per cluster, sum C; each but the last a multiple of 64.

    Returns:
        a int8 [T, Kp], step float32 [T, G], shift float32 [T, G] or None without 8-bit clusters, count float32 [T, G].

    Raises:
        ValueError: a tile that straddles two clusters, sizes that do not cover C, or bits outside 2 to 8.
    """
    return _quantize_dynamic(x, bits, sizes, brief=True)


def quantize_token_planar(x: Tensor, bits: int) -> Quantized:
    """The codes of `lowbit.reference.quantize_activation_dynamic`: one grid a token, its step not rounded to bfloat16.

    Args:
        x: float [T, C].
        bits: 2 to 8.

    Returns:
        As `quantize_tiles_planar`.

    Raises:
        ValueError: bits outside 2 to 8, or no channels.
    """
    one = x.new_tensor([bits], dtype=torch.uint8), x.new_tensor([x.shape[1]], dtype=torch.int64)
    return _quantize_dynamic(x, *one, brief=False)


def quantize_static_planar(x: Tensor, scale: Tensor, zero: Tensor, bits: Tensor, sizes: Tensor) -> Quantized:
    """The codes of `lowbit.reference.quantize_activation_static`: one grid a cluster, the same for every token.

    Args:
        x: float [T, C].
        scale, zero: float32 [n].
        bits, sizes: as in `quantize_tiles_planar`.

    Returns:
        a int8 [T, Kp], step float32 [1, G], shift float32 [1, G], count float32 [T, G].

    Raises:
        ValueError: as `quantize_tiles_planar`.
    """
    owner = check_clusters(x, bits, sizes)
    middle = torch.exp2(bits.float() - 1)
    a, sums = _codes(x.float(), sizes, scale, zero, 2 * middle - 1, middle)
    step, shift = (
        _of_tiles(scale[None], owner, 1),
        _of_tiles((scale * (middle - zero))[None], owner, 0),
    )  # [n] -> [1, G]
    broken = F.pad(x.isnan(), (0, a.shape[1] - x.shape[1])).unflatten(1, (-1, TILE)).any(2)  # [T, C] -> [T, G]
    return a, step, shift, (step * sums).masked_fill_(broken, torch.nan)


def _quantize_dynamic(x: Tensor, bits: Tensor, sizes: Tensor, *, brief: bool) -> Quantized:
    """brief: hold the step as bfloat16."""
    owner = check_clusters(x, bits, sizes)
    xf, top = x.float(), torch.exp2(bits.float()) - 1  # [n]
    low, high = tile_extremes(xf, sizes)  # [T, n]
    s = ((high - low) / top).clamp_(min=torch.finfo(torch.float32).tiny)
    s = s.bfloat16().float() if brief else s
    z = torch.round(-low / s)
    wide = bits == 8
    a, sums = _codes(xf, sizes, s, z, top.expand_as(s), torch.where(wide, 128.0, z))
    step = s.masked_fill(~s.isfinite(), torch.nan)
    shift = _of_tiles(torch.where(wide, step * (128 - z), 0.0), owner, 0) if wide.any() else None
    step = _of_tiles(step, owner, 1)
    return a, step, shift, step * sums


def _codes(x: Tensor, sizes: Tensor, scale: Tensor, zero: Tensor, top: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """clamp(round(x/s) + z, 0, top) - offset, 0 where that is no number: grids [n] or [T, n] -> a int8 [T, Kp], sums float [T, G]."""
    C = x.shape[1]
    s, z, t, o = (g.repeat_interleave(sizes.long(), dim=-1, output_size=C) for g in (scale, zero, top, offset))
    codes = torch.round(x / s).add_(z)
    codes = torch.minimum(codes.clamp_(min=0), t).sub_(o)
    codes = codes.masked_fill_(codes.isnan() | ~s.isfinite(), 0)
    a = F.pad(codes, (0, padded_channels(C) - C)).to(torch.int8)  # [T, C] -> [T, Kp]
    return a, a.unflatten(1, (-1, TILE)).sum(2, dtype=torch.int32).float()


def _of_tiles(grids: Tensor, owner: Tensor, blank: float) -> Tensor:
    """A cluster's value for each of its tiles, `blank` in a tile of padding: [T, n] -> [T, G]."""
    return F.pad(grids[:, owner], (0, owner.numel() % 2), value=blank)


def check_clusters(x: Tensor, bits: Tensor, sizes: Tensor) -> Tensor:
    """int64 [tiles with channels]: which cluster each tile of x [T, C] lies in; ValueError for what the kernels do not take."""
    if x.dim() != 2 or bits.shape != sizes.shape:
        raise ValueError(
            f"x {list(x.shape)}, bits {list(bits.shape)}, sizes {list(sizes.shape)}: pass [T, C], [n], [n]"
        )
    if bits.numel() and not (bits.min() >= 2 and bits.max() <= 8):
        raise ValueError(f"activation bits {bits.tolist()}: integer kernels take 2 to 8")
    return tile_owners(sizes, x.shape[1])


def check_terms(terms: int, rows: int) -> None:
    """ValueError unless so many rows can be the codes of numbers that are sums of `terms` codes each."""
    if terms not in (1, 2) or rows % terms:
        raise ValueError(f"{terms} terms of {rows} rows; give 1, or 2 of an even number of rows")
