"""Linears on integer kernels: codes of what enters them, and products with planar weights.

Each device has a module of the same functions (`KERNELS`): native ones on a CPU, Triton's on a GPU.

Inputs without a grid, those of weight-only linears and of spared sinks, are written as sums of two int8 codes, the second of what the
first left over: 16 bits, 2^-15 of a tile's largest number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.coded import Coded
from lowbit.cpu import native
from lowbit.cpu import planar as cpu
from lowbit.planar import EXACT, TILE, PlanarWeight, padded_channels, planar_weight, tile_owners
from lowbit.planar_reference import Quantized, repeat_tiles

# Beyond, two codes a number cost more than to unpack the weight once and multiply in floating point.
FEW_TOKENS = 16


@dataclass(frozen=True)
class Kernels:
    """Integer kernels of a kind of device.

    module: has `quantize_static`, `quantize_tiles`, `quantize_token`, `quantize_exactly` and `planar_linear` as `lowbit.cpu.planar` has
    them; imported when they are first wanted. dtypes: of activations. run_on: whether they run on a device of this kind, and are worth it.
    norms: whether its `quantize_static` and `quantize_tiles` take a norm into their pass. cache: a module with `kv_append` and
    `attention_decode` as `lowbit.triton.kv` has them, None for none. at_once: whether the module has `quantized_linear` too.
    """

    module: str
    dtypes: tuple[torch.dtype, ...]
    run_on: Callable[[torch.device], bool]
    norms: bool = False
    cache: str | None = None
    at_once: bool = False


@cache
def _triton_runs_on(device: torch.device) -> bool:
    """Says once for a device why its linears will unpack their weights."""
    if find_spec("triton") is None:
        why = "triton is missing: install triton"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        why = "compute capability 8.0 is needed"
    else:
        return True
    warnings.warn(f"lowbit.integer has no kernels for {device} ({why}): slow PyTorch operations run", stacklevel=2)
    return False


HALVES = torch.float16, torch.bfloat16
KERNELS = {
    "cpu": Kernels("lowbit.cpu.planar", (torch.float32,), lambda device: native.fast_avx2(), at_once=True),
    "cuda": Kernels(
        "lowbit.triton.linear", (torch.float32, *HALVES), _triton_runs_on, norms=True, cache="lowbit.triton.kv"
    ),
}


def runs(x: Tensor, weight: PlanarWeight, quantizer) -> bool:
    """Whether integer kernels take x [..., C], which `quantizer` rounds: its device has some for its dtype, no gradient is asked.

    Without a quantizer only a few tokens; never with a weight on another device.
    """
    wanted = x.device == weight.scale.device and not (torch.is_grad_enabled() and x.requires_grad)
    short = quantizer is not None or x.numel() <= FEW_TOKENS * x.shape[-1]
    return wanted and short and _have_kernels(x.device, x.dtype)


def _have_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    known = KERNELS.get(device.type)
    if known is None or dtype not in known.dtypes:
        return False
    if torch.compiler.is_compiling():  # only the CPU's are operators, and `take` has seen that it has them
        return device.type == "cpu"
    return known.run_on(device)


def take(linears, norm=None, *, dtype: torch.dtype = torch.float32) -> bool:
    """Run `lowbit.Linear`s that share their input on integer kernels from now on, if all of them can; returns whether they can.

    They can where the device has kernels for activations of `dtype`, or another that the model may yet be moved to, if every code is
    stored, and weight groups and the input's clusters are whole tiles of 64 channels. The layout is made beside the stored tensors,
    moves with them and is not saved.
    norm: the `lowbit.Norm` that makes the input, if one does; all that multiplies its output must be in `linears`, because its
    quantizer acts in them then.
    """
    quantizers = [linear.input_quantizer if norm is None else norm.quantizer for linear in linears]
    weights = [_laid_out(linear, quantizer, dtype) for linear, quantizer in zip(linears, quantizers)]
    if any(weight is None for weight in weights):
        return False
    for linear, weight in zip(linears, weights):
        linear.planar = weight
    if norm is not None and norm.quantizer is not None:
        norm.handed_over = True
        for linear in linears:
            linear.taken_over = (norm.quantizer,)  # in a tuple, where it is no second owner of its tensors
    return True


def _laid_out(linear, quantizer, dtype: torch.dtype) -> PlanarWeight | None:
    if linear.bits == 16 or linear.codec != "grid" or linear.sparse is not None:
        return None
    if not _will_have_kernels(linear.weight_packed.device, dtype):
        return None
    if quantizer is not None and not _takes(quantizer, linear.in_features):
        return None
    try:
        return laid_out(linear)
    except ValueError:  # groups inside a tile
        return None


def _will_have_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `device` has kernels, or is a CPU beside a GPU that has some: models are often loaded on the one for the other."""
    gpu = device.type == "cpu" and torch.cuda.is_available()
    return _have_kernels(device, dtype) or (gpu and _have_kernels(torch.device("cuda", 0), dtype))


def laid_out(linear) -> PlanarWeight:
    """A `lowbit.Linear`'s codes and grids as the integer kernels read them. Raises ValueError for groups inside a tile."""
    stored = linear.weight_packed, linear.weight_scale, linear.weight_zero, linear.weight_groups
    fine = None if linear.fine is None else (linear.weight_rest, linear.weight_rest_zero, linear.weight_fine)
    return planar_weight(*stored, bits=linear.bits, channels=linear.in_features, fine=fine).ready()


def _takes(quantizer, channels: int) -> bool:
    if quantizer.mode == "token":
        return True
    if quantizer.mode not in ("static", "tile") or int(quantizer.bits.max()) > 8 or int(quantizer.sizes.min()) < 1:
        return False
    try:
        tile_owners(quantizer.sizes, channels)
    except ValueError:  # clusters inside a tile
        return False
    return True


def product(x: Tensor, weight: PlanarWeight, bias: Tensor | None, quantizer) -> Tensor:
    """quantizer(x) W^T + bias by integer kernels: x [..., C] -> [..., R] in its dtype. Rows that `quantizer` spares keep full precision."""
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
                y = _kernels(x.device).spare(y, rows, flat, weight, bias)
            else:
                y[rows] = unrounded(flat[rows], weight, bias)
    return y.to(x.dtype).view(*x.shape[:-1], weight.rows)  # [T, R] -> [..., R]


def _kernels(device: torch.device):
    """The module of the kernels' functions; of their operators while a graph is compiled."""
    if torch.compiler.is_compiling():
        from lowbit import library

        return library
    return import_module(KERNELS[device.type].module)


def _rounded(x: Tensor, weight: PlanarWeight, bias: Tensor | None, quantizer) -> Tensor:
    kernels = _kernels(x.device)
    if KERNELS[x.device.type].at_once and not torch.compiler.is_compiling():
        return kernels.quantized_linear(x.contiguous(), _grids(x, quantizer), weight, bias)
    return kernels.planar_linear(*_codes(x, quantizer, repeats=weight.repeats), weight, bias)


def _grids(x: Tensor, quantizer) -> cpu.Grids:
    """What rounds x [T, C]."""
    if quantizer.mode == "token":
        return cpu.token_grid(quantizer.token_bits, x.shape[1])
    scale, zero = (quantizer.scale, quantizer.zero) if quantizer.mode == "static" else (None, None)
    return cpu.Grids(quantizer.bits, quantizer.sizes.long(), scale, zero, brief=quantizer.mode == "tile")


def _codes(x: Tensor, quantizer, **more) -> Quantized:
    """x [T, C] by `quantizer`. more: further arguments of the kernel."""
    kernels, x = _kernels(x.device), x.contiguous()
    if quantizer.mode == "static":
        grids = quantizer.scale, quantizer.zero, quantizer.bits
        return kernels.quantize_static(x, *grids, quantizer.sizes.long(), **more)
    if quantizer.mode == "tile":
        return kernels.quantize_tiles(x, quantizer.bits, quantizer.sizes.long(), **more)
    return kernels.quantize_token(x, quantizer.token_bits, **more)


def coded(norm, x: Tensor) -> Coded | None:
    """The output of a `lowbit.Norm` that was handed over, of x [..., C], as codes for all linears behind it.

    None where kernels do not make them: on a CPU, under torch.compile, where a gradient is asked and where tokens are spared.
    """
    known = KERNELS.get(x.device.type)
    if known is None or not known.norms or torch.compiler.is_compiling() or not _have_kernels(x.device, x.dtype):
        return None
    if (torch.is_grad_enabled() and x.requires_grad) or norm.quantizer.spared(x) is not None:
        return None
    flat = x.reshape(-1, x.shape[-1])  # [..., C] -> [T, C]
    if _in_one_pass(norm):
        named = ("kind", "eps", "weight", "bias", "permutation", "rotation")
        codes = _codes(flat, norm.quantizer, norm={name: getattr(norm, name) for name in named})
    else:
        codes = _codes(norm.normalized(flat), norm.quantizer)
    return Coded.of(codes, norm.quantizer, lambda: norm.normalized(x), x)


def _in_one_pass(norm) -> bool:
    """Whether the kernel of static grids and of those of tiles makes the norm too, which turns whole tiles or nothing."""
    grids, tiles = norm.quantizer, -(-norm.channels // TILE)
    whole = grids.mode == "static" or (grids.mode == "tile" and grids.bits.numel() == tiles)
    return whole and (norm.rotation == 1 or (norm.rotation == TILE and norm.channels % TILE == 0))


def product_of_codes(x: Coded, weight: PlanarWeight, bias: Tensor | None) -> Tensor:
    """What `product` is of the numbers that x [..., C] has codes of: [..., R] in its dtype."""
    codes = repeat_tiles(x.codes, x.shape[-1], weight.repeats)
    y = _kernels(x.device).planar_linear(*codes, weight, None if bias is None else bias.float())
    return y.to(x.dtype).view(*x.shape[:-1], weight.rows)  # [T, R] -> [..., R]


def unrounded(x: Tensor, weight: PlanarWeight, bias: Tensor | None) -> Tensor:
    """x W^T + bias with each number of x as a sum of EXACT int8 codes: x [T, C] -> [T, R]."""
    kernels = _kernels(x.device)
    if weight.repeats is None and not torch.compiler.is_compiling():
        return kernels.planar_linear(*kernels.quantize_exactly(x.contiguous()), weight, bias, terms=EXACT)
    a, step = exact_codes(x.float(), EXACT)  # [N, T, Kp], [N, T, G]
    counts = step * a.unflatten(2, (-1, TILE)).sum(3, dtype=torch.int32)  # [N, T, G, 64] -> [N, T, G]
    a, step, _, counts = repeat_tiles((a, step, None, counts), x.shape[1], weight.repeats)
    codes = a.flatten(0, 1), step.flatten(0, 1), None, counts.flatten(0, 1)  # [N, T, ...] -> [N T, ...]
    return kernels.planar_linear(*codes, weight, bias, terms=EXACT)


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
