"""Folding a permutation of channels into the weights around them (RPTQ, arXiv 2304.01089)."""

from __future__ import annotations

import torch
from torch import Tensor

from rptq.order import check_permutation


def permute_columns(weight: Tensor, perm: Tensor) -> Tensor:
    """Consumer side: W [R, C] -> W[:, perm], which takes x[..., perm] to the same output.

    ValueError if perm does not fit.
    """
    check_permutation(perm, weight.shape[1])
    return weight[:, perm]


def permute_rows(weight: Tensor, bias: Tensor | None, perm: Tensor) -> tuple[Tensor, Tensor | None]:
    """Producer side: W [R, C] and bias [R] or None -> W[perm], bias[perm]: the output comes reordered.

    ValueError if perm does not fit.
    """
    check_permutation(perm, weight.shape[0])
    return weight[perm], None if bias is None else bias[perm]


def rotary_pairs_kept(perm: Tensor, *, head_dim: int, rotary_dim: int) -> bool:
    """Whether a permutation of q and k rows commutes with rotary embedding, its cos and sin left as they are.

    perm: int64 [H * head_dim]; the first rotary_dim channels of a head rotate. Each rotary channel has a frequency and
    a partner, and swapping two partners turns the pair the other way; so, whichever channels are paired, only the
    identity on them qualifies. The rest of a head is free, within the head. ValueError if perm is no permutation or
    does not fit heads.
    """
    check_permutation(perm, perm.numel())
    if perm.numel() % head_dim or not 0 <= rotary_dim <= head_dim:
        raise ValueError(f"{perm.numel()} channels, heads of {head_dim} and {rotary_dim} rotary channels do not fit")
    heads = perm.view(-1, head_dim)  # [H*D] -> [H, D]
    own = torch.arange(perm.numel(), device=perm.device).view(-1, head_dim)  # [H*D] -> [H, D]
    stays_in_head = torch.equal(heads // head_dim, own // head_dim)
    return stays_in_head and torch.equal(heads[:, :rotary_dim], own[:, :rotary_dim])
