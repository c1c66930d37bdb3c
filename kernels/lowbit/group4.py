"""FlexGen's group-wise 4-bit codec (arXiv 2303.06865 and its compression.py): min-max groups, no calibration.

Each group of consecutive elements along one dimension stores 4-bit codes, a float16 scale and a float16 minimum:
4 + 32/64 = 4.5 bits per element with the paper's groups of 64. It is the plain baseline beside static grids.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.packing import pack, unpack

LEVELS = 15


@dataclass(frozen=True, eq=False)
class Group4:
    """A tensor of `shape` with `dim` moved last and cut into G = ceil(K/group) groups; the last one may be shorter.

    packed uint8 [..., ceil(K/2)], scale and minimum float16 [..., G]; an element is minimum + code * scale.
    """

    packed: Tensor
    scale: Tensor
    minimum: Tensor
    shape: tuple[int, ...]
    dim: int
    group: int = 64

    @property
    def bits_per_element(self) -> float:
        """Bits held per element, scales and minima included."""
        octets = sum(t.numel() * t.element_size() for t in (self.packed, self.scale, self.minimum))
        return 8 * octets / torch.Size(self.shape).numel()


def _grouped(rows: Tensor, group: int) -> Tensor:
    """[..., K] -> [..., G, group]; a short last group repeats its last element, which moves neither min nor max."""
    groups = -(-rows.shape[-1] // group)
    filler = rows[..., -1:].expand(*rows.shape[:-1], groups * group - rows.shape[-1])
    return torch.cat([rows, filler], dim=-1).unflatten(-1, (groups, group))


def compress(x: Tensor, *, dim: int, group: int = 64) -> Group4:
    """Quantize `x` to 4 bits in min-max groups along `dim`.

    The codes are computed against the float16 scale and minimum that are stored, so the error of an element is at most
    scale/2 plus what float16 rounding takes from the ends of its group.

    Args:
        x: floating [...], at least one element.
        dim: dimension along which groups run (FlexGen: 0 for weights, the head dimension for keys and values).
        group: elements per group.

    A meta tensor gives the shapes of the result.

    Raises:
        ValueError: an empty or non-floating tensor, a dim out of range, a group below 1, or values outside float16.
    """
    if not x.is_floating_point() or x.numel() == 0 or group < 1 or not -x.dim() <= dim < x.dim():
        raise ValueError(
            f"cannot compress {x.dtype} {tuple(x.shape)} along dim {dim} in groups of {group}; "
            "pass a non-empty floating tensor, a dim it has and a group of at least 1"
        )
    rows = x.movedim(dim, -1).float()  # [..., K]
    grouped = _grouped(rows, group)  # [..., G, group]
    low, high = grouped.aminmax(dim=-1)  # [..., G]
    minimum = low.to(torch.float16)
    scale = ((high - low) / LEVELS).to(torch.float16)
    if not x.is_meta and not (minimum.isfinite().all() and scale.isfinite().all()):
        raise ValueError(
            f"values from {low.min():.6g} to {high.max():.6g} leave float16; scale the tensor before compressing"
        )
    # A constant group has scale 0: any divisor gives code 0, which decodes to the minimum.
    step = torch.where(scale > 0, scale, 1).float()
    codes = ((grouped - minimum.float().unsqueeze(-1)) / step.unsqueeze(-1)).round().clamp(0, LEVELS)  # [..., G, group]
    codes = codes.to(torch.uint8).flatten(-2)[..., : rows.shape[-1]]  # [..., K]
    return Group4(pack(codes, 4), scale, minimum, tuple(x.shape), dim % x.dim(), group)


def decompress(compressed: Group4, dtype: torch.dtype) -> Tensor:
    """Decode to a tensor of the original shape in `dtype`; the arithmetic is float32.

    Raises:
        ValueError: the packed tensor does not hold `shape` (see `unpack`).
    """
    length = compressed.shape[compressed.dim]
    codes = _grouped(unpack(compressed.packed, 4, length), compressed.group)  # [..., G, group]
    rows = codes * compressed.scale.float().unsqueeze(-1) + compressed.minimum.float().unsqueeze(-1)  # [..., G, group]
    return rows.flatten(-2)[..., :length].to(dtype).movedim(-1, compressed.dim).contiguous()  # [..., K] -> shape
