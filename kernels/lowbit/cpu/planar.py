"""The integer linear over the planar layout by the compiled library."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.cpu import native
from lowbit.planar import EXACT, TILE, PlanarWeight, all_tiles
from lowbit.planar_reference import Quantized, check_clusters, check_terms

CLUSTERS_DO_NOT_FIT = 3
FLOAT = torch.float32


class Grids(NamedTuple):
    """What rounds activations: clusters of `sizes` int64 [n] channels at `bits` uint8 [n].

    scale, zero: float32 [n], static grids; None: each token has its own. brief: steps of a token's own are bfloat16.
    """

    bits: Tensor
    sizes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    brief: bool = False


@cache
def token_grid(bits: int, channels: int) -> Grids:
    """One grid for all channels of a token."""
    return Grids(torch.tensor([bits], dtype=torch.uint8), torch.tensor([channels]))


def quantize_tiles(
    x: Tensor, bits: Tensor, sizes: Tensor, *, repeats: Tensor | None = None, path: str = "fastest"
) -> Quantized:
    """`lowbit.planar_reference.quantize_tiles_planar` of a float32 CPU tensor, on torch.get_num_threads() threads.

    sizes: int64. repeats: the weight's, for `repeat_tiles` of the result. path: as for the sweep. Raises ValueError for tensors that do
    not fit, or a path that this machine lacks.
    """
    return _quantize(x, Grids(bits, sizes, brief=True), repeats, path)


def quantize_token(x: Tensor, bits: int, *, repeats: Tensor | None = None, path: str = "fastest") -> Quantized:
    """`lowbit.planar_reference.quantize_token_planar`; arguments and errors as `quantize_tiles`."""
    return _quantize(x, token_grid(bits, _matrix(x)[1]), repeats, path)


def quantize_static(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: Tensor,
    sizes: Tensor,
    *,
    repeats: Tensor | None = None,
    path: str = "fastest",
) -> Quantized:
    """`lowbit.planar_reference.quantize_static_planar`; arguments and errors as `quantize_tiles`."""
    return _quantize(x, Grids(bits, sizes, scale, zero), repeats, path)


def quantize_exactly(x: Tensor, *, path: str = "fastest") -> Quantized:
    """x float32 [T, C], which has no grid, as two codes a number (`lowbit.integer.exact_codes`), on torch.get_num_threads() threads.

    Returns:
        a int8 [2 T, Kp], step float32 [2 T, G], None, count float32 [2 T, G]: all tokens' first codes, then all second ones.

    Raises:
        ValueError: x is not contiguous float32 on the CPU, or a path that this machine lacks.
    """
    T, C = _matrix(x)
    G = all_tiles(C, None)
    a = torch.empty(EXACT * T, G * TILE, dtype=torch.int8)
    step, count = torch.empty(EXACT * T, G), torch.empty(EXACT * T, G)
    native.check(_call("lowbit_planar_exact", path, (T, C, G), (x, a, step, count)), "", path)
    return a, step, None, count


def planar_linear(
    a: Tensor,
    step: Tensor,
    shift: Tensor | None,
    count: Tensor,
    weight: PlanarWeight,
    bias: Tensor | None = None,
    *,
    terms: int = 1,
    path: str = "fastest",
) -> Tensor:
    """`lowbit.planar_reference.planar_linear` of CPU tensors in float32 sums, on torch.get_num_threads() threads.

    Args:
        terms: 2 where a number is the sum of two codes: the first are rows [0, T) of 2 T, the second rows [T, 2 T), whose
            steps are 1/254 of the first's. Then the sum of both products is returned, [T, R].
        path: as for the sweep.

    A token's result depends on neither the other tokens nor the number of threads, but for a token that is alone, whose sums are added
    in another order.

    Raises:
        ValueError: tensors of other shapes or dtypes than the reference takes, or not contiguous, or a path that this machine lacks.
        MemoryError: no scratch memory.
    """
    T, G, R = a.shape[0] if a.dim() else 0, weight.tiles, weight.rows
    check_terms(terms, T)
    _check("a", a, torch.int8, (T, G * TILE))
    shared = T != 1 and step.shape[:1] == (1,)
    _check("step", step, FLOAT, (1 if shared else T, G))
    _check("count", count, FLOAT, (T, G))
    _check("weight.scale", weight.scale, FLOAT, (G, R))
    if shift is not None:
        _check("shift", shift, FLOAT, (step.shape[0], G))
    if bias is not None:
        _check("bias", bias, FLOAT, (R,))
    y = torch.empty(T // terms, R)
    if y.numel() == 0:
        return y
    first, second = (*weight.planes, None)[:2]
    activations = a, step, shift, count
    weights = first, second, weight.tables, bias
    sizes = weight.bits, T, terms, G, R, weight.tables.shape[1], 0 if shared else G
    status = _call("lowbit_planar_linear", path, sizes, (*activations, *weights, y))
    native.check(status, f"lowbit's planar linear found no memory for {T} tokens of {G * TILE} channels", path)
    return y


def quantized_linear(
    x: Tensor, grids: Grids, weight: PlanarWeight, bias: Tensor | None = None, *, path: str = "fastest"
) -> Tensor:
    """`planar_linear` of x float32 [T, C] as `grids` round it, repeats and all, bit for bit, in one call: float32 [T, R].

    Raises:
        ValueError: as the quantizers and `planar_linear`.
        MemoryError: no scratch memory.
    """
    T, C = _check_grids(x, grids, weight.repeats)
    G, R = all_tiles(C, weight.repeats), weight.rows
    _check("weight.scale", weight.scale, FLOAT, (G, R))
    if bias is not None:
        _check("bias", bias, FLOAT, (R,))
    y = torch.empty(T, R)
    if y.numel() == 0:
        return y
    first, second = (*weight.planes, None)[:2]
    again = 0 if weight.repeats is None else weight.repeats.numel()
    sizes = T, C, G, grids.sizes.numel(), again, grids.brief, weight.bits, R, weight.tables.shape[1]
    rounding = grids.scale, grids.zero, grids.bits, grids.sizes, weight.repeats
    status = _call("lowbit_planar_product", path, sizes, (x, *rounding, first, second, weight.tables, bias, y))
    native.check(status, f"lowbit's planar linear found no memory for {T} tokens of {G * TILE} channels", path)
    _check_fit(status, x, grids, weight.repeats)
    return y


def _quantize(x: Tensor, grids: Grids, repeats: Tensor | None, path: str) -> Quantized:
    T, C = _check_grids(x, grids, repeats)
    own, G = grids.scale is None, all_tiles(C, repeats)
    a, count = torch.empty(T, G * TILE, dtype=torch.int8), torch.empty(T, G)
    step = torch.empty(T if own else 1, G)
    shift = None if own and 8 not in grids.bits.tolist() else torch.empty_like(step)
    tensors = x, grids.scale, grids.zero, grids.bits, grids.sizes, repeats, a, step, shift, count
    again = 0 if repeats is None else repeats.numel()
    status = _call("lowbit_planar_quantize", path, (T, C, G, grids.sizes.numel(), again, grids.brief), tensors)
    native.check(status, "", path)
    _check_fit(status, x, grids, repeats)
    return a, step, shift, count


def _check_grids(x: Tensor, grids: Grids, repeats: Tensor | None) -> tuple[int, int]:
    """T and C of x; ValueError for tensors that the C functions cannot take."""
    shape, n = _matrix(x), grids.sizes.numel()
    _check("bits", grids.bits, torch.uint8, (n,))
    _check("sizes", grids.sizes, torch.int64, (n,))
    if grids.scale is not None:
        _check("scale", grids.scale, FLOAT, (n,))
        _check("zero", grids.zero, FLOAT, (n,))
    if repeats is not None:
        _check("repeats", repeats, torch.int64, tuple(repeats.shape[:1]))
    return shape


def _check_fit(status: int, x: Tensor, grids: Grids, repeats: Tensor | None) -> None:
    if status == CLUSTERS_DO_NOT_FIT:
        check_clusters(x, grids.bits, grids.sizes)
        again = [] if repeats is None else repeats.tolist()
        raise ValueError(
            f"clusters of {grids.sizes.tolist()} channels, tiles {again} once more, do not fit {x.shape[1]} channels"
        )


@cache
def _function(name: str, sizes: int, tensors: int):
    """The C function (path, threads, sizes, arrays), told its types: ctypes then takes plain numbers, in a fifth of the time."""
    function = getattr(native.library(), name)
    function.argtypes = (ctypes.c_int, ctypes.c_int, *[ctypes.c_long] * sizes, *[ctypes.c_void_p] * tensors)
    return function


def _call(name: str, path: str, sizes: tuple[int, ...], tensors: tuple[Tensor | None, ...]) -> int:
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    function = _function(name, len(sizes), len(tensors))
    return function(native.PATHS[path], torch.get_num_threads(), *sizes, *pointers)


def _matrix(x: Tensor) -> tuple[int, int]:
    if x.dim() != 2:
        raise ValueError(f"x must be a contiguous {FLOAT} of shape [T, C] on the CPU, got shape {list(x.shape)}")
    _check("x", x, FLOAT, tuple(x.shape))
    return x.shape[0], x.shape[1]


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    fits = tensor.dtype == dtype and tensor.shape == shape
    if not fits or not tensor.is_contiguous() or not tensor.is_cpu:
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"
        raise ValueError(f"{name} must be a contiguous {dtype} of shape {list(shape)} on the CPU, got {found}")
