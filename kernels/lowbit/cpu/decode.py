"""The structures of cpu/decode.h, field by field, and the call that runs a step."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_bool, c_double, c_long, c_void_p

import torch
from torch import Tensor

from lowbit.cpu import native


class Rotation(Structure):
    _fields_ = [("block", c_long), ("base", c_long), ("matrix", c_void_p)]


class Norm(Structure):
    _fields_ = [
        ("centred", c_long),
        ("eps", c_double),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("permutation", c_void_p),
        ("rotation", Rotation),
    ]


class Weight(Structure):
    _fields_ = [
        *((name, c_long) for name in ("bits", "units", "rows")),
        *((name, c_void_p) for name in ("first", "second", "tables")),
        ("octets", c_long),
        ("bias", c_void_p),
    ]


class Linear(Structure):
    _fields_ = [
        ("weight", Weight),
        *((name, c_void_p) for name in ("tail_first", "tail_second", "tail_bias", "reads", "scale", "zero", "top")),
    ]


class Clusters(Structure):
    _fields_ = [
        ("count", c_long),
        *((name, c_void_p) for name in ("scale", "zero", "bits", "sizes", "repeats")),
        ("again", c_long),
        ("brief", c_bool),
    ]


class Site(Structure):
    _fields_ = [
        ("rotation", Rotation),
        *((name, c_long) for name in ("channels", "tiles", "exact", "shifted")),
        ("clusters", Clusters),
        ("count", c_long),
        ("linears", Linear * 3),
    ]


class Cache(Structure):
    _fields_ = [
        ("bits", c_long),
        *((name, c_void_p) for name in ("keys", "values", "key_scale", "key_zero", "value_scale", "value_zero")),
        ("spared", c_long),
        *((name, c_void_p) for name in ("spared_keys", "spared_values", "spared_rows", "spared_at")),
    ]


class Block(Structure):
    _fields_ = [
        ("attention_norm", Norm),
        ("mlp_norm", Norm),
        *((name, Site) for name in ("qkv", "output", "up", "down")),
        ("scaling", c_double),
        ("softmax_levels", c_long),
        ("activation", c_long),
        ("cache", Cache),
    ]


class End(Structure):
    _fields_ = [("norm", Norm), ("head", Site)]


class Step(Structure):
    _fields_ = [
        *((name, c_long) for name in ("batch", "tokens", "channels", "heads", "kv_heads", "width")),
        *((name, c_long) for name in ("spared", "held", "capacity", "half")),
        *((name, c_void_p) for name in ("cos", "sin")),
        ("turn_stride", c_long),
        *((name, c_void_p) for name in ("all_cos", "all_sin")),
        ("turns_stride", c_long),
        ("mask", c_void_p),
        ("mask_stride", c_long),
        ("blocks", c_long),
        ("block", POINTER(Block)),
        ("hidden", c_void_p),
        ("end", POINTER(End)),
        ("logits", c_void_p),
    ]


def address(tensor: Tensor | None, keep: list[Tensor]) -> int | None:
    """The address of a contiguous tensor, which goes into `keep`; None for None."""
    if tensor is None:
        return None
    keep.append(tensor)
    return tensor.data_ptr()


def scratch(step: Step) -> Tensor:
    """Memory for `run` of this step and those with fewer cached tokens, on torch.get_num_threads() threads."""
    count = native.library().lowbit_decode_scratch
    count.restype = c_long
    memory = torch.empty(count(torch.get_num_threads(), ctypes.byref(step)) + 64, dtype=torch.uint8)
    return memory[-memory.data_ptr() % 64 :]


def run(step: Step, memory: Tensor, *, path: str = "fastest") -> None:
    """Run the step: hidden states in place, its tokens appended to every cache. path: as for the sweep.

    Raises:
        ValueError: a path that this machine lacks.
    """
    run = native.library().lowbit_decode
    status = run(native.PATHS[path], torch.get_num_threads(), ctypes.byref(step), c_void_p(memory.data_ptr()))
    native.check(status, "", path)
