"""A linear's weight and codes in the model's own channel order.

Orders that were folded into neighbouring weights (R2, R3, R5) are part of the weights and need nothing. Those that a norm applies (R1, R4)
are undone in the columns, and so are Hadamard rotations, which leaves numbers that lie on no grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from lowbit.hadamard import rotate
from lowbit.modules import ActivationQuantizer, Linear, Norm
from lowbit.packing import unpack
from lowbit.sparse import bitmask_decode, nm_decode, slots_per_row
from torch import nn

import rptq
import sparsegpt
from ptq.architectures import Spec
from ptq.sites import block_sites, norm_of


@dataclass(frozen=True)
class Codes:
    """W[r, c] = (codes[r, c] - zero[r, g]) * scale[r, g] with g = group[c]; a group's channels need not lie together.

    codes: uint8 [R, C]. scale: float [R, G]. zero: uint8 [R, G]. group: int64 [C].
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    group: torch.Tensor
    bits: int

    def weight(self) -> torch.Tensor:
        """float32 [R, C]."""
        scale, zero = self.scale.float()[:, self.group], self.zero[:, self.group]  # [R, G] -> [R, C]
        return self.codes.float().sub_(zero).mul_(scale)

    def run_length(self) -> int:
        """The largest n that divides C and for which each aligned run of n channels lies in one group."""
        ends = (self.group.diff() != 0).nonzero().flatten() + 1
        return math.gcd(self.group.numel(), *ends.tolist())

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle code, 2^(bits - 1)."""
        return bool((self.zero == 2 ** (self.bits - 1)).all())


@dataclass(frozen=True)
class Weight:
    """One decoder linear.

    weight: [R, C], float32 if it comes from codes, else in its own dtype. why: what keeps it from being a product of codes and one grid a
    row and group; codes are then the nearest on its own grids, or None where it lies on none. Both are None for a linear in full
    precision. bits: of the codes, also where they are lost. quantizer: what rounds the input.
    """

    name: str
    weight: torch.Tensor
    codes: Codes | None
    why: str | None
    bits: int
    quantizer: ActivationQuantizer | None


def weights_of(spec: Spec, prefix: str, block: nn.Module) -> Iterator[Weight]:
    """The linears of `block`, whose name in the model is `prefix`, one after another."""
    for site in block_sites(spec, block):
        norm = norm_of(block, site)
        for path in site.linears:
            yield weight_of(f"{prefix}.{path}", block.get_submodule(path), norm)


def weight_of(name: str, linear: Linear, norm: Norm | None) -> Weight:
    """One linear, named `name`, and the norm before it."""
    quantizer = linear.input_quantizer if norm is None else norm.quantizer
    return Weight(name, *_undone(linear, norm), linear.bits, quantizer)


def stored_codes(linear: Linear) -> tuple[Codes | None, str | None]:
    """(codes, why) as in `Weight`, the channels as stored. Only here does the export know how `lowbit.Linear` stores codes."""
    if linear.bits == 16:
        return None, None
    if linear.codec != "grid":
        return None, f"codec {linear.codec}: its groups lie along the rows"
    zero = unpack(linear.weight_zero, linear.bits, linear.groups)  # [R, G]
    group = sparsegpt.group_index(linear.weight_groups.long(), linear.in_features)
    codes = Codes(_every_code(linear, zero[:, group]), linear.weight_scale, zero, group, linear.bits)
    weight = linear.dequantized_weight()
    if torch.equal(codes.weight(), weight):
        return codes, None
    scale = codes.scale.float()[:, group]  # [R, G] -> [R, C]
    nearest = torch.round(weight / scale).add_(zero[:, group]).clamp_(0, 2**linear.bits - 1).to(torch.uint8)
    return replace(codes, codes=nearest), "groups with codes of more bits lose their low ones"


def rounded(weight: torch.Tensor, bits: int, size: int) -> Codes:
    """`weight` [R, C] rounded to the nearest code of a min-max grid a row and group of `size` channels, the last group what is left."""
    W, C = weight.float(), weight.shape[1]
    sizes = sparsegpt.equal_groups(C, size)
    grid = sparsegpt.fit_grid(W, sizes, bits)
    zero = grid.zero.to(torch.uint8)
    return Codes(sparsegpt.encode(W, grid), grid.scale, zero, sparsegpt.group_index(sizes, C), bits)


def rounded_evenly(weight: torch.Tensor, bits: int, size: int) -> Codes:
    """`weight` [R, C] on symmetric grids, whose zero points are the middle code, a row and group of `size` channels, which divides C."""
    middle, groups = 2 ** (bits - 1), weight.float().unflatten(1, (-1, size))  # [R, C] -> [R, G, n]
    scale = (groups.abs().amax(-1) / (middle - 1)).clamp(min=torch.finfo(torch.float16).tiny)  # [R, G]
    scale = scale.half() if float(scale.max()) <= torch.finfo(torch.float16).max else scale
    levels = torch.round(groups / scale.float().unsqueeze(-1)).clamp_(-middle, middle - 1)
    codes = (levels + middle).to(torch.uint8).flatten(1)  # [R, G, n] -> [R, C]
    zero = torch.full(scale.shape, middle, dtype=torch.uint8)
    return Codes(codes, scale, zero, torch.arange(weight.shape[1]) // size, bits)


def measured(
    weight: Weight, written: torch.Tensor, *, stored: str, bits: int, group: int | None = None, why: str | None = None
) -> dict[str, Any]:
    """The report's row of one linear.

    Args:
        written: float [R, C], what a reader of the file makes of it.
        stored: "codes" (those of the source), "rounded" (new codes) or the dtype of plain numbers.
        group: channels that share a scale, None for a whole row.
    """
    ours = weight.weight.float()
    difference = written.float() - ours
    return {
        "name": weight.name,
        "shape": list(ours.shape),
        "stored": stored,
        "bits": bits,
        "group_size": group,
        "why": why,
        "largest_difference": float(difference.abs().max()),
        "largest_weight": float(ours.abs().max()),
        "relative_difference": float(difference.norm() / ours.norm().clamp(min=torch.finfo(torch.float32).tiny)),
    }


def _every_code(linear: Linear, blank: torch.Tensor) -> torch.Tensor:
    """uint8 [R, C]; a weight that was left out has the code of its zero point, `blank` uint8 [R, C]."""
    C = linear.in_features
    if linear.sparse is None:
        return unpack(linear.weight_packed, linear.bits, C)
    if linear.sparse["kind"] == "bitmask":
        kept = unpack(linear.weight_packed, linear.bits, linear.sparse["kept"])
        return bitmask_decode(kept, linear.weight_mask, channels=C, blank=blank)
    keep = tuple(linear.sparse["keep"])
    slots = unpack(linear.weight_packed, linear.bits, slots_per_row(C, keep))
    return nm_decode(slots, linear.weight_indices, channels=C, keep=keep, blank=blank)


def _undone(linear: Linear, norm: Norm | None) -> tuple[torch.Tensor, Codes | None, str | None]:
    """(weight, codes, why) as in `Weight`: without what the norm or the linear itself does to the input's channels."""
    weight, (codes, why) = linear.dequantized_weight(), stored_codes(linear)
    block = max(linear.rotation, 1 if norm is None else norm.rotation)
    if block > 1:
        weight = _turned_back(weight, block)
        codes, why = None, None if linear.bits == 16 else "its input was rotated, which is folded back"
    if norm is not None and norm.permutation is not None:
        back = rptq.inverse(norm.permutation.long())
        weight = weight[:, back]
        if codes is not None:
            codes = replace(codes, codes=codes.codes[:, back], group=codes.group[back])
    return weight, codes, why


def _turned_back(weight: torch.Tensor, block: int) -> torch.Tensor:
    """`weight` [R, C] times the transpose of diag(H, ..., H): H is orthogonal, but not always symmetric."""
    H = rotate(torch.eye(block), block)
    turned = weight.float().unflatten(1, (-1, block)) @ H.T  # [R, C] -> [R, C/n, n]
    return turned.flatten(1).to(weight.dtype)  # [R, C/n, n] -> [R, C]
