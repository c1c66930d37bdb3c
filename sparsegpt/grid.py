"""Asymmetric weight grids, one per (row, group of contiguous columns), and rounding onto them.

A group may be fine: its codes are twice as long and its step is 2^-b of its scale, so that the high b bits of its codes are codes like all
others, and the low ones too, of a smaller scale.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsegpt.pattern import alone

SMALLEST_SCALE = 2.0**-20
SHARES = tuple(1 - 0.05 * i for i in range(9))


@dataclass(frozen=True)
class WeightGrid:
    """q = clamp(round(w / step) + zero, 0, top), w_hat = (q - zero) * step.

    scale: [R, G], positive, in the dtype that will be stored (the arithmetic uses exactly these values, as float32).
    zero: float32 [R, G], integers in [0, top]. sizes: int64 [G], columns of each group, in order. bits: 2..8.
    fine: bool [R, G], groups of twice the bits; None for none.
    """

    scale: Tensor
    zero: Tensor
    sizes: Tensor
    bits: int
    fine: Tensor | None = None

    @property
    def step(self) -> Tensor:
        """float32 [R, G]: what one code is worth."""
        return self.scale.float() / refinement(self.zero, self.bits, self.fine)

    @property
    def top(self) -> Tensor:
        """float32 [R, G]: the largest code, 2^b - 1 of the group's b bits."""
        return 2**self.bits * refinement(self.zero, self.bits, self.fine) - 1


def refinement(like: Tensor, bits: int, fine: Tensor | None) -> Tensor:
    """float32 [R, G], as `like`: into how many steps the scale of each group is cut."""
    ones = torch.ones_like(like)
    return ones if fine is None else torch.where(fine, 2.0**bits, ones)


def group_index(sizes: Tensor, channels: int) -> Tensor:
    """Group of each channel: sizes int64 [G] -> int64 [C]. Raises ValueError unless sizes are positive with sum C."""
    if sizes.dtype != torch.int64 or sizes.ndim != 1 or (sizes < 1).any() or sizes.sum() != channels:
        raise ValueError(f"sizes must be int64 [G], positive, with sum {channels}, got {sizes.dtype} {sizes.tolist()}")
    return torch.repeat_interleave(torch.arange(sizes.numel(), device=sizes.device), sizes)


def equal_groups(channels: int, size: int) -> Tensor:
    """int64 [G]: groups of `size` columns, the last one what is left."""
    whole, rest = divmod(channels, size)
    return torch.tensor([size] * whole + [rest] * (rest > 0))


def fit_grid(
    W: Tensor,
    sizes: Tensor,
    bits: int,
    *,
    importance: Tensor | None = None,
    fine: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float16,
    total: Callable = alone,
) -> WeightGrid:
    """Min-max grid of W float [R, C] per row and group, widened to hold 0 so that zero weights stay exactly zero.

    GPTQ (arXiv 2210.17323) section 4. importance: float [C]; with it the range of each group shrinks by the one of SHARES that has the
    least sum_c importance_c (w_c - w_hat_c)^2, importance_c being the energy of channel c, diag H. Scales are raised to at least 2^-20
    and rounded to scale_dtype; when the largest is outside that dtype's normal range (float16: 2^-14 to 65504) all stay float32. A
    group of zeros has scale 1 and zero 0.
    fine: bool [R, G], groups of twice the bits. total: as for `solve`.
    Raises ValueError for W that is not a finite matrix, bits outside 2..8, fine groups of more than 8 bits, or bad sizes.
    """
    if W.ndim != 2 or not W.is_floating_point():
        raise ValueError(f"W must be a float matrix [R, C], got {W.dtype} {list(W.shape)}: reshape or cast it")
    if bits not in range(2, 9):
        raise ValueError(f"bits must be 2..8, got {bits}")
    sizes = sizes.to(W.device)
    group_index(sizes, W.shape[1])
    shape = W.shape[0], sizes.numel()
    if fine is not None and (bits > 4 or fine.shape != shape):
        raise ValueError(
            f"fine {list(fine.shape)} of {bits} bits: one flag a row and group, {list(shape)}, at most 4 bits"
        )
    fine = None if fine is None else fine.to(W.device)
    parts = W.split(sizes.tolist(), dim=1)
    low = torch.stack([part.amin(1) for part in parts], 1).float().clamp_(max=0)  # [R, G]
    high = torch.stack([part.amax(1) for part in parts], 1).float().clamp_(min=0)  # [R, G]
    # NaN, Inf and float64 values beyond float32 all show in the extremes.
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError(f"W {list(W.shape)} holds NaN, Inf or values beyond float32: look at the checkpoint")
    cuts = refinement(low, bits, fine)  # [R, G]
    levels = 2**bits * cuts - 1  # [R, G]
    if importance is not None:
        low, high = _narrowed(parts, low, high, importance.float().split(sizes.tolist()), levels)
    # Dividing before subtracting keeps the range of two huge weights of opposite sign finite.
    scale = ((high / levels - low / levels) * cuts).clamp_(min=torch.finfo(torch.float32).tiny)
    constant = high == low
    info = torch.finfo(scale_dtype)
    # Counts, because these can be summed over the processes that hold the other rows.
    found = [~constant, ~constant & (scale >= info.tiny), ~constant & (scale > info.max)]
    some, normal, above = total(torch.stack([which.sum() for which in found])).tolist()
    scale = scale.masked_fill_(constant, 1)
    if not some or (normal and not above):
        # Small groups beside normal ones: a subnormal scale is coarse, but the grid is used as stored. The floor keeps its
        # rounding within 3%, at steps that no float16 weight of the tensor can tell from zero.
        scale = scale.clamp_(min=SMALLEST_SCALE).to(scale_dtype)
    zero = torch.round(-low / (scale.float() / cuts)).clamp_(min=0).minimum(levels)
    return WeightGrid(scale, zero, sizes, bits, fine)


def _narrowed(
    parts: tuple[Tensor, ...], low: Tensor, high: Tensor, importance: tuple[Tensor, ...], levels: Tensor
) -> tuple[Tensor, Tensor]:
    """low, high [R, G] of the groups `parts`, G x [R, n], each times its best share."""
    ends = []
    groups = zip(parts, low.split(1, 1), high.split(1, 1), importance, levels.split(1, 1), strict=True)
    for part, m, M, weight, top in groups:
        w, share = part.float(), torch.ones_like(m)
        least = torch.full_like(m, torch.inf)
        for candidate in SHARES:
            s = ((M - m) * (candidate / top.double()).float()).clamp_(min=torch.finfo(torch.float32).tiny)  # [R, 1]
            z = torch.round(-m * candidate / s)
            error = (
                torch.round(w / s).add_(z).clamp_(min=0).minimum(top).sub_(z).mul_(s).sub_(w).square_()
                @ weight[:, None]
            )  # [R, 1]
            better = error < least
            share, least = torch.where(better, candidate, share), torch.where(better, error, least)
        ends.append((m * share, M * share))
    return torch.cat([m for m, _ in ends], 1), torch.cat([M for _, M in ends], 1)


def encode(W: Tensor, grid: WeightGrid) -> Tensor:
    """Nearest codes of a whole matrix, ties to even: W float [R, C] -> uint8 [R, C]. RuntimeError if C is not the sum of grid.sizes."""
    parts = W.split(grid.sizes.tolist(), dim=1)
    columns = zip(parts, grid.step.split(1, 1), grid.zero.split(1, 1), grid.top.split(1, 1), strict=True)
    codes = (torch.round(w.float() / step).add_(zero).clamp_(min=0).minimum(top) for w, step, zero, top in columns)
    return torch.cat([q.to(torch.uint8) for q in codes], 1)


def dequantize(codes: Tensor, grid: WeightGrid) -> Tensor:
    """The weights that codes stand for, (q - zero) * step: uint8 [R, C] -> float32 [R, C]. RuntimeError as for `encode`."""
    weight = codes.float()
    parts = weight.split(grid.sizes.tolist(), dim=1)
    for part, step, zero in zip(parts, grid.step.split(1, 1), grid.zero.split(1, 1), strict=True):
        part.sub_(zero).mul_(step)
    return weight
