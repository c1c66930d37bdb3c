"""Permutations and the clusters they make contiguous."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Order:
    """A reorder of C channels into G contiguous clusters.

    perm: int64 [C], an index: x_reordered = x[..., perm]. sizes: int64 [G], every one positive, sum C.
    ValueError if perm is no permutation or sizes do not fit it.
    """

    perm: Tensor
    sizes: Tensor

    def __post_init__(self) -> None:
        check_permutation(self.perm, self.perm.numel())
        check_sizes(self.sizes, self.perm.numel())


def check_permutation(perm: Tensor, channels: int) -> None:
    """ValueError unless perm is int64 [channels] and holds each of 0 .. channels-1 once."""
    if perm.dtype != torch.int64 or perm.shape != (channels,):
        raise ValueError(f"permutation must be int64 [{channels}], got {perm.dtype} {list(perm.shape)}")
    if not torch.equal(perm.sort().values, torch.arange(channels, device=perm.device)):
        missing = channels - perm[(perm >= 0) & (perm < channels)].unique().numel()
        raise ValueError(f"not a permutation of {channels} channels: {missing} of them missing")


def check_sizes(sizes: Tensor, channels: int) -> None:
    """ValueError unless sizes is int64 [G], all positive, and sums to channels."""
    if sizes.dtype != torch.int64 or sizes.ndim != 1:
        raise ValueError(f"cluster sizes must be int64 [G], got {sizes.dtype} {list(sizes.shape)}")
    if (sizes <= 0).any() or int(sizes.sum()) != channels:
        raise ValueError(f"cluster sizes must be positive and sum to {channels}, got {sizes.tolist()}")


def inverse(perm: Tensor) -> Tensor:
    """int64 [C] with x[..., perm][..., inverse(perm)] = x. ValueError if perm is no permutation."""
    check_permutation(perm, perm.numel())
    return torch.empty_like(perm).scatter_(0, perm, torch.arange(perm.numel(), device=perm.device))


def compose(first: Tensor, second: Tensor) -> Tensor:
    """int64 [C] with x[..., compose(first, second)] = x[..., first][..., second]. ValueError if either is bad."""
    check_permutation(first, first.numel())
    check_permutation(second, first.numel())
    return first[second]
