"""Reference operations in plain PyTorch: they define what every kernel must equal.

All arithmetic that decides a code is float32, whatever the dtype of the activations. Letters: B batch, T tokens, C in-channels,
R out-rows, G groups or clusters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lowbit.packing import unpack


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
    G = scale.shape[1]
    z = unpack(zero, bits, G)  # [R, G]
    q = unpack(packed, bits, channels)  # [R, C]
    s_c = scale.float().repeat_interleave(sizes, dim=1, output_size=channels)  # [R, G] -> [R, C]
    z_c = z.repeat_interleave(sizes, dim=1, output_size=channels)  # [R, G] -> [R, C]
    return q.float().sub_(z_c).mul_(s_c)


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
) -> torch.Tensor:
    """Normalize x [..., C], then gather the channels: y = norm(x)[..., permutation] (RPTQ, section 3.3, R1 and R4)."""
    y = NORMS[kind](x, weight, bias, eps)
    return y if permutation is None else y.index_select(-1, permutation)
