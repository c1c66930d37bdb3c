"""What foreign formats want to be the same in all linears of a model: the width, the group size, whether zero points are in the middle."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lowbit.modules import Linear, Norm
from lowbit.packing import unpack

from ptq.export.source import Source
from ptq.sites import block_sites, norm_of

GROUPS = (1024, 512, 256, 128, 64, 32, 16)  # that engines have kernels for, beside whole rows
GROUP = 32  # of weights that are rounded again, where no other linear of the model says otherwise


def quantized(source: Source) -> Iterator[tuple[str, Linear, Norm | None]]:
    """Name, linear and the norm before it, of every linear with codes; all are empty."""
    for i, block in enumerate(source.model.get_submodule(source.spec.blocks)):
        for site in block_sites(source.spec, block):
            for path in site.linears:
                if (linear := block.get_submodule(path)).bits < 16:
                    yield f"{source.spec.blocks}.{i}.{path}", linear, norm_of(block, site)


def common_group(source: Source, *, scattered: bool) -> int | None:
    """The most channels that the groups of all linears can be cut into, one of GROUPS; None where every grid is a whole row's.

    Linears whose codes are lost, and groups that no size in GROUPS divides, have no say. scattered: whether the format can tell which
    channels a group has, so that linears behind a norm that permutes have one.
    """
    rows, own = True, []
    for name, linear, norm in quantized(source):
        turned = linear.rotation > 1 or (norm is not None and norm.rotation > 1)
        if linear.codec != "grid" or turned:
            rows = False
        elif linear.groups > 1:
            rows = False
            if scattered or norm is None or norm.permutation is None:
                own.append(math.gcd(*source.checkpoint.read_part(f"{name}.weight_groups").tolist()))
    own = [size for size in own if size % GROUPS[-1] == 0]
    fitting = [n for n in GROUPS if all(size % n == 0 for size in own)]
    return None if rows else fitting[0] if own else GROUP


def all_symmetric(source: Source) -> bool:
    """Whether every stored zero point is the middle code."""
    for name, linear, _ in quantized(source):
        if linear.codec != "grid":
            return False
        zero = unpack(source.checkpoint.read_part(f"{name}.weight_zero"), linear.bits, linear.groups)
        if (zero != 2 ** (linear.bits - 1)).any():
            return False
    return True
