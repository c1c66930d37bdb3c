"""Packed low-bit formats, the reference operations that define them, and the modules that run them.

All that a machine needs to run a compressed model; nothing here knows how one is made.
"""

from lowbit.backend import operation, register_backend
from lowbit.gram import add_gram
from lowbit.group4 import Group4
from lowbit.lowest import lowest
from lowbit.modules import ActivationQuantizer, Linear, Norm, build
from lowbit.packing import pack, packed_length, unpack
from lowbit.planar import PlanarWeight, planar_weight
from lowbit.sparse_linear import SparseTiles, sparse_linear, sparse_tiles
from lowbit.sweep import sweep

__all__ = [
    "ActivationQuantizer",
    "Group4",
    "Linear",
    "Norm",
    "PlanarWeight",
    "SparseTiles",
    "add_gram",
    "build",
    "lowest",
    "operation",
    "pack",
    "packed_length",
    "planar_weight",
    "register_backend",
    "sparse_linear",
    "sparse_tiles",
    "sweep",
    "unpack",
]
