"""The integer kernels as PyTorch operators `torch.ops.lowbit.*`, with the shapes of what they return, so that torch.compile sees through.

Only a graph that is being compiled goes through them (`lowbit.integer`): called one by one, an operator costs more than its kernel's
ctypes call. They are the CPU's: on a GPU a compiled graph has the reference operations. The functions here take what those of
`lowbit.cpu.planar` take.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lowbit.cpu import planar as cpu
from lowbit.integer import unrounded
from lowbit.planar import BLOCK, PLANES, TILE, PlanarWeight, all_tiles
from lowbit.planar_reference import Quantized

_QUANTIZED = "(Tensor a, Tensor step, Tensor shift, Tensor count)"
LIBRARY = torch.library.Library("lowbit", "DEF")
LIBRARY.define(
    f"quantize_static(Tensor x, Tensor scale, Tensor zero, Tensor bits, Tensor sizes, Tensor? repeats) -> {_QUANTIZED}"
)
LIBRARY.define(f"quantize_tiles(Tensor x, Tensor bits, Tensor sizes, Tensor? repeats) -> {_QUANTIZED}")
LIBRARY.define(f"quantize_token(Tensor x, int bits, Tensor? repeats) -> {_QUANTIZED}")
LIBRARY.define(
    "planar_linear(Tensor a, Tensor step, Tensor? shift, Tensor count, Tensor[] planes, Tensor scale, Tensor tables, Tensor? bias, "
    "int bits, int terms) -> Tensor"
)
LIBRARY.define(
    "spare(Tensor y, Tensor rows, Tensor x, Tensor[] planes, Tensor scale, Tensor tables, Tensor? repeats, Tensor? bias, int bits) "
    "-> Tensor"
)


def quantize_static(
    x: Tensor, scale: Tensor, zero: Tensor, bits: Tensor, sizes: Tensor, *, repeats: Tensor | None = None
) -> Quantized:
    """`lowbit.cpu.planar.quantize_static`."""
    return torch.ops.lowbit.quantize_static(x, scale, zero, bits, sizes, repeats)


def quantize_tiles(x: Tensor, bits: Tensor, sizes: Tensor, *, repeats: Tensor | None = None) -> Quantized:
    """`lowbit.cpu.planar.quantize_tiles`; a shift of zeros where that gives None, which depends on numbers in `bits`."""
    return torch.ops.lowbit.quantize_tiles(x, bits, sizes, repeats)


def quantize_token(x: Tensor, bits: int, *, repeats: Tensor | None = None) -> Quantized:
    """`lowbit.cpu.planar.quantize_token`; a shift of zeros where that gives None."""
    return torch.ops.lowbit.quantize_token(x, bits, repeats)


def planar_linear(
    a: Tensor,
    step: Tensor,
    shift: Tensor | None,
    count: Tensor,
    weight: PlanarWeight,
    bias: Tensor | None = None,
    *,
    terms: int = 1,
) -> Tensor:
    """`lowbit.cpu.planar.planar_linear`."""
    stored = list(weight.planes), weight.scale, weight.tables
    return torch.ops.lowbit.planar_linear(a, step, shift, count, *stored, bias, weight.bits, terms)


def spare(y: Tensor, rows: Tensor, x: Tensor, weight: PlanarWeight, bias: Tensor | None) -> Tensor:
    """y [T, R], but where `rows` bool [T] the products of x [T, C] as it is (`lowbit.integer.unrounded`)."""
    stored = list(weight.planes), weight.scale, weight.tables, weight.repeats
    return torch.ops.lowbit.spare(y, rows, x, *stored, bias, weight.bits)


def _run_static(x, scale, zero, bits, sizes, repeats):
    return cpu.quantize_static(x, scale, zero, bits, sizes, repeats=repeats)


def _run_tiles(x, bits, sizes, repeats):
    return _shifted(cpu.quantize_tiles(x, bits, sizes, repeats=repeats))


def _run_token(x, bits, repeats):
    return _shifted(cpu.quantize_token(x, bits, repeats=repeats))


def _shifted(quantized: Quantized) -> Quantized:
    a, step, shift, count = quantized
    return a, step, torch.zeros_like(step) if shift is None else shift, count


def _run_linear(a, step, shift, count, planes, scale, tables, bias, bits, terms):
    return cpu.planar_linear(a, step, shift, count, _weight(planes, scale, tables, bits), bias, terms=terms)


def _run_spare(y, rows, x, planes, scale, tables, repeats, bias, bits):
    y, weight = y.clone(), _weight(planes, scale, tables, bits, repeats)
    if rows.any():
        y[rows] = unrounded(x[rows], weight, bias)
    return y


def _weight(planes: list[Tensor], scale: Tensor, tables: Tensor, bits: int, repeats: Tensor | None = None) -> Any:
    """What the kernels read of a PlanarWeight, which has more; ValueError for tensors that are not of one."""
    G, R = scale.shape
    whole = [((R, G * TILE // per_byte), dtype) for per_byte, dtype in PLANES.get(bits, ())]
    held = tables.shape[0] == -(-R // BLOCK) and tables.shape[2:] == (G * BLOCK,) and tables.shape[1] in range(4, 8)
    plain = tables.dtype == torch.uint8 and all(tensor.is_contiguous() for tensor in (*planes, tables))
    if not held or not plain or [(tuple(plane.shape), plane.dtype) for plane in planes] != whole:
        shapes = [list(t.shape) for t in (*planes, scale, tables)]
        raise ValueError(f"planes, scale and tables of shapes {shapes} are not those of one {bits}-bit PlanarWeight")
    stored = {"planes": tuple(planes), "scale": scale, "tables": tables}
    return SimpleNamespace(**stored, bits=bits, repeats=repeats, tiles=G, rows=R)


def _empty_codes(x: Tensor, repeats: Tensor | None, *, shared: bool) -> Quantized:
    T, G = x.shape[0], all_tiles(x.shape[1], repeats)
    steps = 1 if shared else T
    shapes = (steps, G), (steps, G), (T, G)
    return x.new_empty(T, G * TILE, dtype=torch.int8), *(x.new_empty(shape) for shape in shapes)


def _fake_static(x, scale, zero, bits, sizes, repeats):
    return _empty_codes(x, repeats, shared=True)


def _fake_tiles(x, bits, sizes, repeats):
    return _empty_codes(x, repeats, shared=False)


def _fake_token(x, bits, repeats):
    return _empty_codes(x, repeats, shared=False)


def _fake_linear(a, step, shift, count, planes, scale, *others):
    return step.new_empty(a.shape[0] // others[-1], scale.shape[1])


def _fake_spare(y, *others):
    return torch.empty_like(y)


for _name, _run, _fake in (
    ("quantize_static", _run_static, _fake_static),
    ("quantize_tiles", _run_tiles, _fake_tiles),
    ("quantize_token", _run_token, _fake_token),
    ("planar_linear", _run_linear, _fake_linear),
    ("spare", _run_spare, _fake_spare),
):
    LIBRARY.impl(_name, _run, "CPU")
    torch.library.register_fake(f"lowbit::{_name}", _fake, lib=LIBRARY)
