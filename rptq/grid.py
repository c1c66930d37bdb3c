"""Static asymmetric quantization grids for activations, one per cluster of channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rptq.order import check_sizes
from rptq.ranges import ChannelRange

MAX_ZERO = 1e4  # float32 rounds x / scale to well under one step as long as zero points stay this small


@dataclass(frozen=True, eq=False)
class ActivationGrid:
    """q = clamp(round(x / scale) + zero, 0, 2^bits - 1); xhat = (q - zero) * scale.

    scale: float32 [G], positive. zero: float32 [G], integers, |zero| <= 1e4, free to lie outside the codes.
    sizes: int64 [G], channels of each cluster. bits: int64 [G], width of its codes.
    """

    scale: Tensor
    zero: Tensor
    sizes: Tensor
    bits: Tensor


def fit_grid(ranges: ChannelRange, sizes: Tensor, bits: int | Tensor) -> ActivationGrid:
    """Grid of each cluster from its range (RPTQ, arXiv 2304.01089, on the cluster's min m and max M).

    ranges: of the reordered channels [C]. sizes: int64 [G]. bits: of every cluster, or int64 [G].
    s = (M - m) / (2^bits - 1), z = round(-m / s), so that the whole range is covered and a value in it comes back within
    s/2. A cluster so narrow and far from zero that |z| would pass 1e4 gets s = |m| / 1e4. A constant cluster gets s = |m|
    (1 if it is zero) and comes back exactly.
    ValueError if sizes do not fit ranges, bits is not in 1 .. 16, or a range is too wide for float32.
    """
    low, high = cluster_range(ranges, sizes)
    bits = _widths(bits, sizes)
    step = _step(low, high, bits)
    if not torch.isfinite(step).all():
        raise ValueError(f"range [{low.min():g}, {high.max():g}] is too wide for float32; check the activations")
    constant_step = torch.where(low == 0, torch.ones_like(low), low.abs().clamp(min=torch.finfo(torch.float32).tiny))
    scale = torch.where(high > low, step, constant_step)
    # A constant sits one step from zero: code 1 with zero 0 if positive, code 0 with zero 1 if negative.
    zero = torch.where(high > low, torch.round(-low / scale), (low < 0).float())
    return ActivationGrid(scale, zero, sizes, bits)


def tensor_grid(ranges: ChannelRange, bits: int) -> ActivationGrid:
    """One grid for all channels (G = 1). Raises as fit_grid does."""
    return fit_grid(ranges, torch.tensor([ranges.min.numel()], device=ranges.min.device), bits)


def channel_grid(ranges: ChannelRange, bits: int) -> ActivationGrid:
    """One grid for each channel (G = C). Raises as fit_grid does."""
    return fit_grid(ranges, torch.ones_like(ranges.min, dtype=torch.int64), bits)


def fake_quantize(x: Tensor, grid: ActivationGrid) -> Tensor:
    """x as it comes back from its codes. x: [..., C] of any float dtype, already reordered; same shape and dtype out.

    The arithmetic is float32. ValueError if C is not the channel count of the grid.
    """
    channels = int(grid.sizes.sum())
    if x.shape[-1] != channels:
        raise ValueError(f"activation has {x.shape[-1]} channels, its grid {channels}")
    scale = grid.scale.repeat_interleave(grid.sizes)  # [G] -> [C]
    zero = grid.zero.repeat_interleave(grid.sizes)  # [G] -> [C]
    top = (2**grid.bits - 1).repeat_interleave(grid.sizes)  # [G] -> [C]
    q = (torch.round(x.float() / scale) + zero).clamp(torch.zeros_like(top), top)
    return ((q - zero) * scale).to(x.dtype)


def quantization_cost(
    ranges: ChannelRange, sizes: Tensor, bits: int | Tensor, *, weight: Tensor | None = None
) -> float:
    """Expected squared rounding error of a token: sum over clusters of w_g s_g^2 / 12, s_g the step of fit_grid.

    With steps s_g = (M_g - m_g) / (2^bits - 1) this is sum_g n_g (M_g - m_g)^2 up to a constant. ranges: of the
    reordered channels [C]. weight: [C], what a channel's error counts (default 1, so w_g = n_g), in the same order.
    Constant clusters cost nothing. Raises as fit_grid does.
    """
    low, high = cluster_range(ranges, sizes)
    bits = _widths(bits, sizes).cpu()
    w = torch.ones_like(ranges.min) if weight is None else weight
    # On the CPU, where index_add sums in a fixed order.
    w_g = torch.zeros(low.shape, dtype=torch.float64).index_add(0, _cluster_of_channel(sizes).cpu(), w.double().cpu())
    return float(cost_of_range(low.cpu(), high.cpu(), w_g, bits).sum())


def cost_of_range(low: Tensor, high: Tensor, weight: Tensor, bits: int | Tensor) -> Tensor:
    """weight * s^2 / 12 for clusters of range [low, high], elementwise, float64: the summand of quantization_cost."""
    step = torch.where(high > low, _step(low, high, bits), torch.zeros_like(low))
    return weight.double() * step.double() ** 2 / 12


def _step(low: Tensor, high: Tensor, bits: int | Tensor) -> Tensor:
    """Scale of a cluster that is not constant: (M - m) / (2^bits - 1), widened until |m| / s <= 1e4 and s is normal."""
    step = (high - low) / (2**bits - 1)
    return torch.maximum(step, low.abs() / MAX_ZERO).clamp(min=torch.finfo(torch.float32).tiny)


def _widths(bits: int | Tensor, sizes: Tensor) -> Tensor:
    """int64 [G]: bits of each cluster."""
    widths = torch.as_tensor(bits, dtype=torch.int64, device=sizes.device)
    if widths.ndim > 1 or (widths.ndim == 1 and widths.shape != sizes.shape):
        raise ValueError(f"bits of {list(widths.shape)} clusters, sizes of {sizes.numel()}")
    if widths.numel() and not (1 <= int(widths.min()) and int(widths.max()) <= 16):
        raise ValueError(f"activation codes have 1 to 16 bits, got {', '.join(map(str, widths.unique().tolist()))}")
    return widths.expand(sizes.shape)


def cluster_range(ranges: ChannelRange, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each cluster, float32 [G] each. ValueError if sizes do not fit ranges."""
    check_sizes(sizes, ranges.min.numel())
    cluster = _cluster_of_channel(sizes)
    low = torch.full(sizes.shape, torch.inf, device=sizes.device).scatter_reduce(0, cluster, ranges.min, "amin")
    high = torch.full(sizes.shape, -torch.inf, device=sizes.device).scatter_reduce(0, cluster, ranges.max, "amax")
    return low, high


def _cluster_of_channel(sizes: Tensor) -> Tensor:
    return torch.arange(sizes.numel(), device=sizes.device).repeat_interleave(sizes)  # [G] -> [C]
