"""Linears on integer kernels: codes of what enters them, and products with planar weights.

Inputs without a grid, those of weight-only linears and of spared sinks, are written as sums of two int8 codes, the second of what the
first left over: 16 bits, 2^-15 of a tile's largest number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.cpu import native
from lowbit.planar import EXACT, TILE, PlanarWeight, padded_channels, planar_weight, tile_owners
from lowbit.planar_reference import repeat_tiles

# Beyond, two codes a number cost more than to unpack the weight once and multiply in floating point.
FEW_TOKENS = 16


def runs(x: Tensor, quantizer) -> bool:
    """Whether integer kernels take x [..., C], which `quantizer` rounds: float32, on a CPU that has them, no gradient asked.

    Without a quantizer only a few tokens.
    """
    wanted = x.dtype == torch.float32 and x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad)
    short = quantizer is not None or x.numel() <= FEW_TOKENS * x.shape[-1]
    return wanted and short and (torch.compiler.is_compiling() or native.fast_avx2())


def take(linears, norm=None) -> bool:
    """Run `lowbit.Linear`s that share their input on integer kernels from now on, if all of them can; returns whether they can.

    They can on a CPU that has the kernels, where every code is stored, and weight groups and the input's clusters are whole tiles of 64
    channels. The layout is made beside the stored tensors and is not saved.
    norm: the `lowbit.Norm` that makes the input, if one does; all that multiplies its output must be in `linears`, because its
    quantizer acts in them then.
    """
    quantizers = [linear.input_quantizer if norm is None else norm.quantizer for linear in linears]
    weights = [_laid_out(linear, quantizer) for linear, quantizer in zip(linears, quantizers)]
    if any(weight is None for weight in weights):
        return False
    for linear, weight in zip(linears, weights):
        linear.planar, _ = weight, weight.tables  # these are made now: a graph that is compiled could not
    if norm is not None and norm.quantizer is not None:
        norm.handed_over = True
        for linear in linears:
            linear.taken_over = (norm.quantizer,)  # in a tuple, where it is no second owner of its tensors
    return True


def _laid_out(linear, quantizer) -> PlanarWeight | None:
    if linear.bits == 16 or linear.codec != "grid" or linear.sparse is not None:
        return None
    if linear.weight_packed.device.type != "cpu" or not native.fast_avx2():
        return None
    if quantizer is not None and not _takes(quantizer, linear.in_features):
        return None
    try:
        return laid_out(linear)
    except ValueError:  # groups inside a tile
        return None


def laid_out(linear) -> PlanarWeight:
    """A `lowbit.Linear`'s codes and grids as the integer kernels read them. Raises ValueError for groups inside a tile."""
    stored = linear.weight_packed, linear.weight_scale, linear.weight_zero, linear.weight_groups
    fine = None if linear.fine is None else (linear.weight_rest, linear.weight_rest_zero, linear.weight_fine)
    return planar_weight(*stored, bits=linear.bits, channels=linear.in_features, fine=fine)


def _takes(quantizer, channels: int) -> bool:
    if quantizer.mode == "token":
        return True
    if quantizer.mode not in ("static", "tile") or int(quantizer.bits.max()) > 8:
        return False
    try:
        tile_owners(quantizer.sizes, channels)
    except ValueError:  # clusters inside a tile
        return False
    return True


def product(x: Tensor, weight: PlanarWeight, bias: Tensor | None, quantizer) -> Tensor:
    """quantizer(x) W^T + bias by integer kernels: x float32 [..., C] -> [..., R]. Rows that `quantizer` spares keep full precision."""
    flat = x.reshape(-1, x.shape[-1])  # [..., C] -> [T, C]
    bias = None if bias is None else bias.float()
    if quantizer is None:
        y = unrounded(flat, weight, bias)
    else:
        y = _rounded(flat, weight, bias, quantizer)
        spared = quantizer.spared(x)
        if spared is not None:
            rows = spared.flatten()  # [..., 1] -> [T]
            if torch.compiler.is_compiling():
                y = _kernels().spare(y, rows, flat, weight, bias)
            else:
                y[rows] = unrounded(flat[rows], weight, bias)
    return y.view(*x.shape[:-1], weight.rows)  # [T, R] -> [..., R]


def _kernels():
    """The module of the kernels' functions; of their operators while a graph is compiled."""
    if torch.compiler.is_compiling():
        from lowbit import library

        return library
    from lowbit.cpu import planar

    return planar


def _rounded(x: Tensor, weight: PlanarWeight, bias: Tensor | None, quantizer) -> Tensor:
    cpu = _kernels()
    x, again = x.contiguous(), {"repeats": weight.repeats}
    if quantizer.mode == "static":
        codes = cpu.quantize_static(x, quantizer.scale, quantizer.zero, quantizer.bits, quantizer.sizes.long(), **again)
    elif quantizer.mode == "tile":
        codes = cpu.quantize_tiles(x, quantizer.bits, quantizer.sizes.long(), **again)
    else:
        codes = cpu.quantize_token(x, quantizer.token_bits, **again)
    return cpu.planar_linear(*codes, weight, bias)


def unrounded(x: Tensor, weight: PlanarWeight, bias: Tensor | None) -> Tensor:
    """x W^T + bias with each number of x as a sum of EXACT int8 codes: x [T, C] -> [T, R]."""
    cpu = _kernels()
    if weight.repeats is None and not torch.compiler.is_compiling():
        return cpu.planar_linear(*cpu.quantize_exactly(x.contiguous()), weight, bias, terms=EXACT)
    a, step = exact_codes(x, EXACT)  # [N, T, Kp], [N, T, G]
    counts = step * a.unflatten(2, (-1, TILE)).sum(3, dtype=torch.int32)  # [N, T, G, 64] -> [N, T, G]
    a, step, _, counts = repeat_tiles((a, step, None, counts), x.shape[1], weight.repeats)
    codes = a.flatten(0, 1), step.flatten(0, 1), None, counts.flatten(0, 1)  # [N, T, ...] -> [N T, ...]
    return cpu.planar_linear(*codes, weight, bias, terms=EXACT)


def exact_codes(x: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """x ~ sum_n step[n] a[n]: a int8 [N, T, Kp], step float32 [N, T, G], of a tile max|x| / 127, then each 1/254 of the one before.

    What is left over is at most half the last step: 2^-15 of a tile's largest number after two terms, 2^-23 after three.
    """
    left = F.pad(x, (0, padded_channels(x.shape[1]) - x.shape[1])).unflatten(1, (-1, TILE))  # [T, C] -> [T, G, 64]
    step = (left.abs().amax(2) / 127).clamp_(min=torch.finfo(torch.float32).tiny)  # [T, G]
    codes, steps = [], []
    for _ in range(terms):
        a = torch.round(left / step[..., None]).clamp_(-127, 127)
        left = left - a * step[..., None]
        codes.append(a.to(torch.int8).flatten(1))  # [T, G, 64] -> [T, Kp]
        steps.append(step)
        step = (step / 254).clamp_(min=torch.finfo(torch.float32).tiny)
    return torch.stack(codes), torch.stack(steps)
