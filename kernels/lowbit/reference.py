"""Reference operations in plain PyTorch: they define what every kernel must equal.

All arithmetic that decides a code is float32, whatever the dtype of the activations. Letters: B batch, T tokens, C in-channels,
R out-rows, G groups or clusters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lowbit.hadamard import rotate
from lowbit.packing import unpack
from lowbit.sparse import bitmask_decode, nm_decode, slots_per_row


def quantize_activation_static(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """Round to the cluster grids and back: xhat = (clamp(round(x/s) + z, 0, 2^b - 1) - z) s (RPTQ, eq. 1 and section 3.3).

    Args:
        x: [..., C], any floating dtype. NaN and infinities: NaN stays NaN, infinities saturate.
        scale, zero: float32 [G]; zero holds whole numbers, not bounded by the code range.
        bits: uint8 [G]; 16 leaves the cluster's channels untouched.
        sizes: int64 [G], channels per cluster, sum C.

    Returns:
        [..., C] in x's dtype.
    """
    C = x.shape[-1]
    s, z, b = (t.repeat_interleave(sizes, output_size=C) for t in (scale, zero, bits))  # [G] -> [C]
    top = torch.exp2(b.float()) - 1
    codes = torch.clamp(torch.round(x.float() / s).add_(z), min=torch.zeros_like(top), max=top)
    xhat = codes.sub_(z).mul_(s).to(x.dtype)
    return torch.where(b >= 16, x, xhat)


def quantize_activation_dynamic(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Asymmetric min-max grid of each token's own range, widened to include zero.

    Args:
        x: [..., C], any floating dtype.
        bits: 2 to 8.

    Returns:
        [..., C] in x's dtype.
    """
    top = 2**bits - 1
    xf = x.float()
    low = xf.amin(-1, keepdim=True).clamp_(max=0)  # [..., 1]
    high = xf.amax(-1, keepdim=True).clamp_(min=0)
    s = ((high - low) / top).clamp_(min=torch.finfo(torch.float32).tiny)
    z = torch.round(-low / s)
    return torch.round(xf / s).add_(z).clamp_(0, top).sub_(z).mul_(s).to(x.dtype)


def quantize_activation_tiles(x: torch.Tensor, bits: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Each token's own asymmetric grid in each tile of channels, the range widened to include zero.

    s = (max - min) / (2^b - 1), held as bfloat16, z = round(-min / s): 16 + b bits a token and tile.

    Args:
        x: [..., C], any floating dtype.
        bits: uint8 [G], 2 to 8, or 16 to leave the tile untouched.
        sizes: int64 [G], channels per tile, sum C.

    Returns:
        [..., C] in x's dtype.
    """
    top = torch.exp2(bits.float()) - 1  # [G]
    low, high = tile_extremes(x.float(), sizes)  # [..., G]
    s = ((high - low) / top).clamp_(min=torch.finfo(torch.float32).tiny).bfloat16().float()
    z = torch.round(-low / s)
    if _equal(sizes):
        tiles = x.unflatten(-1, (sizes.numel(), -1))  # [..., C] -> [..., G, n]
        s, z, t, b = (v.unsqueeze(-1) for v in (s, z, top, bits))  # [..., G] -> [..., G, 1]
    else:
        tiles, C = x, x.shape[-1]
        s, z, t, b = (
            v.repeat_interleave(sizes, dim=-1, output_size=C) for v in (s, z, top, bits)
        )  # [..., G] -> [..., C]
    codes = torch.round(tiles.float() / s).add_(z)
    codes = torch.minimum(codes.clamp_(min=0), t)
    return torch.where(b >= 16, tiles, codes.sub_(z).mul_(s).to(x.dtype)).reshape(x.shape)  # [..., G, n] -> [..., C]


def tile_extremes(x: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """min(x, 0) and max(x, 0) over each tile: x [..., C], sizes int64 [G] -> [..., G] each."""
    if torch.compiler.is_compiling():  # a graph must not depend on the numbers in `sizes`
        zeros = x.new_zeros(*x.shape[:-1], sizes.numel())  # [..., G]
        owner = torch.arange(sizes.numel(), device=x.device).repeat_interleave(sizes, output_size=x.shape[-1])
        return tuple(zeros.scatter_reduce(-1, owner.expand_as(x), x, extreme) for extreme in ("amin", "amax"))
    if _equal(sizes):
        tiles = x.unflatten(-1, (sizes.numel(), -1))  # [..., C] -> [..., G, n]
    else:
        width = int(sizes.max())
        starts = sizes.cumsum(0) - sizes
        index = starts[:, None] + torch.arange(width, device=x.device)  # [G, n]
        inside = torch.arange(width, device=x.device) < sizes[:, None]
        tiles = x[..., index.clamp(max=x.shape[-1] - 1)].where(inside, x.new_zeros(()))  # [..., C] -> [..., G, n]
    return tiles.amin(-1).clamp_(max=0), tiles.amax(-1).clamp_(min=0)


def _equal(sizes: torch.Tensor) -> bool:
    """Whether all tiles are as wide, so that a view will do; a graph that is being compiled cannot know."""
    return not torch.compiler.is_compiling() and bool((sizes == sizes[0]).all())


def dequantize_weight(
    packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, sizes: torch.Tensor, *, bits: int, channels: int
) -> torch.Tensor:
    """Unpack a weight: W[r, c] = (q[r, c] - z[r, g(c)]) s[r, g(c)].

    Args:
        packed: uint8 [R, ceil(C bits/8)], dense, least significant bit first.
        scale: float [R, G].
        zero: uint8 [R, ceil(G bits/8)], packed like the codes.
        sizes: int64 [G], sum C.

    Returns:
        float32 [R, C].
    """
    z_c = _zero_points(zero, sizes, bits, channels)
    return _on_grid(unpack(packed, bits, channels), z_c, scale, sizes)


def _zero_points(zero: torch.Tensor, sizes: torch.Tensor, bits: int, channels: int) -> torch.Tensor:
    z = unpack(zero, bits, sizes.numel())  # [R, G]
    return z.repeat_interleave(sizes, dim=1, output_size=channels)  # [R, G] -> [R, C]


def _on_grid(q: torch.Tensor, z_c: torch.Tensor, scale: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    s_c = scale.float().repeat_interleave(sizes, dim=1, output_size=q.shape[1])  # [R, G] -> [R, C]
    return q.float().sub_(z_c).mul_(s_c)


def decode_bitmask(values: torch.Tensor, mask: torch.Tensor, *, channels: int) -> torch.Tensor:
    """A pruned weight in its own dtype: values [K] where mask uint8 [R, ceil(C/8)] keeps, 0 elsewhere -> [R, C]."""
    return bitmask_decode(values, mask, channels=channels)


def decode_nm(values: torch.Tensor, indices: torch.Tensor, *, channels: int, keep: tuple[int, int]) -> torch.Tensor:
    """A weight that keeps n of m, in its own dtype: values [R, S] at packed indices uint8, 0 elsewhere -> [R, C]."""
    return nm_decode(values, indices, channels=channels, keep=keep)


def dequantize_bitmask(
    packed: torch.Tensor,
    mask: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    sizes: torch.Tensor,
    *,
    bits: int,
    channels: int,
    kept: int,
) -> torch.Tensor:
    """`dequantize_weight` of a pruned weight: codes of the `kept` entries, packed as one row; a pruned one is exactly 0.0.

    Args:
        packed: uint8 [ceil(kept bits/8)].
        mask: uint8 [R, ceil(C/8)].
        scale, zero, sizes: as in `dequantize_weight`.

    Returns:
        float32 [R, C].

    Raises:
        ValueError: a mask that does not keep `kept` entries.
    """
    z_c = _zero_points(zero, sizes, bits, channels)
    codes = unpack(packed, bits, kept)  # [K]
    return _on_grid(bitmask_decode(codes, mask, channels=channels, blank=z_c), z_c, scale, sizes)


def dequantize_nm(
    packed: torch.Tensor,
    indices: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    sizes: torch.Tensor,
    *,
    bits: int,
    channels: int,
    keep: tuple[int, int],
) -> torch.Tensor:
    """`dequantize_weight` of a weight that keeps n of m: codes of its S slots a row; what has no slot is exactly 0.0.

    Args:
        packed: uint8 [R, ceil(S bits/8)].
        indices: uint8 [R, ceil(S ceil(log2 m)/8)], the slots' positions in their groups.
        scale, zero, sizes: as in `dequantize_weight`.

    Returns:
        float32 [R, C].

    Raises:
        ValueError: indices outside their groups, or not ascending.
    """
    z_c = _zero_points(zero, sizes, bits, channels)
    codes = unpack(packed, bits, slots_per_row(channels, keep))  # [R, S]
    return _on_grid(nm_decode(codes, indices, channels=channels, keep=keep, blank=z_c), z_c, scale, sizes)


def refine_weight(
    coarse: torch.Tensor,
    rest: torch.Tensor,
    zero: torch.Tensor,
    scale: torch.Tensor,
    sizes: torch.Tensor,
    fine: torch.Tensor,
    *,
    bits: int,
) -> torch.Tensor:
    """Add to a dequantized weight what its fine groups' low bits say: W[r, c] += (q[r, c] - z[r, g]) s[r, g] / 2^b.

    Args:
        coarse: float32 [R, C], from the high bits of all codes; changed in place.
        rest: uint8 [R, ceil(K bits/8)], the low bits of the codes of the fine groups' K channels, in order.
        zero: uint8 [R, ceil(F bits/8)], those of their zero points.
        scale: float [R, G], of the high bits.
        sizes: int64 [G], sum C.
        fine: int64 [F], the fine groups, ascending.

    Returns:
        coarse.
    """
    of_fine = sizes[fine]  # [F]
    channels = fine_channels(sizes, fine)  # [K]
    codes = unpack(rest, bits, channels.numel())  # [R, K]
    z_c = unpack(zero, bits, fine.numel()).repeat_interleave(of_fine, dim=1)  # [R, F] -> [R, K]
    step = scale[:, fine].float() / 2**bits  # [R, F]
    return coarse.index_add_(1, channels, _on_grid(codes, z_c, step, of_fine))


def fine_channels(sizes: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    """int64 [K]: the channels of groups `fine`, of groups of `sizes` channels each."""
    chosen = torch.zeros_like(sizes, dtype=torch.bool).index_fill_(0, fine, True)
    return chosen.repeat_interleave(sizes).nonzero()[:, 0]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., C] times weight [R, C] transposed, plus bias [R]; weight and bias are cast to x's dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def layernorm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """LayerNorm over the last dimension of x [..., C]."""
    cast = [None if t is None else t.to(x.dtype) for t in (weight, bias)]
    return F.layer_norm(x, x.shape[-1:], *cast, eps)


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, bias: None, eps: float) -> torch.Tensor:
    """RMSNorm as LLaMA computes it: normalized in float32, cast, then scaled by the weight."""
    xf = x.float()
    return weight.to(x.dtype) * (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rmsnorm_plus_one(x: torch.Tensor, weight: torch.Tensor, bias: None, eps: float) -> torch.Tensor:
    """RMSNorm as Gemma computes it: scaled by 1 + weight in float32, then cast."""
    xf = x.float()
    return (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight.float())).to(x.dtype)


NORMS = {"layernorm": layernorm, "rmsnorm": rmsnorm, "rmsnorm_plus_one": rmsnorm_plus_one}


def norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    permutation: torch.Tensor | None,
    *,
    kind: str,
    eps: float,
    rotation: int,
) -> torch.Tensor:
    """Normalize x [..., C], then gather the channels: y = norm(x)[..., permutation] (RPTQ, section 3.3, R1 and R4).

    rotation: block of the Hadamard transform that follows (`lowbit.hadamard`), 1 for none.
    """
    y = NORMS[kind](x, weight, bias, eps)
    y = y if permutation is None else y.index_select(-1, permutation)
    return y if rotation == 1 else rotate(y, rotation)
