"""Where a checkpoint holds each tensor of a model, and how a block goes back into the checkpoint's own layout.

Names match one to one but for experts. The engine holds each expert's linears apart, as <experts>.<e>.gate_proj, up_proj and down_proj.
Checkpoints hold them apart too (what hub files have and `save_pretrained` writes, under the family's own names), or fused as
transformers does in memory: gate_up_proj [E, 2 F, C], gate above up, and down_proj [E, C, F]. `from_pretrained` takes both.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from lowbit.experts import ROLES
from torch import nn

from ptq.architectures import Spec
from ptq.source import Checkpoint

# Name in the model -> the names that a checkpoint may have for it, each with the shape of the tensor found there.
Places = dict[str, dict[str, tuple[int, ...]]]


def places(model: nn.Module, spec: Spec) -> Places:
    """Every tensor that the engine reads of `model`, experts' tensors one by one, and where it may be."""
    found: Places = {}
    for name, tensor in model.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        if spec.experts is not None and stem.endswith(f".{spec.experts.module}"):
            found |= _expert_places(stem, leaf, tuple(tensor.shape), spec, model.base_model_prefix)
        else:
            found[name] = {n: tuple(tensor.shape) for n in _spellings(name, spec, model.base_model_prefix)}
    return found


def _expert_places(stem: str, leaf: str, fused: tuple[int, ...], spec: Spec, prefix: str) -> Places:
    """Those of one fused parameter: `leaf` is gate_up_proj or down_proj."""
    E, rows, C = fused
    roles, shape = (ROLES[2:], (rows, C)) if leaf == "down_proj" else (ROLES[:2], (rows // 2, C))
    stored = dict(zip(ROLES, spec.experts.stored))
    together = {n: fused for n in _spellings(f"{stem}.{leaf}", spec, prefix)}
    return {
        f"{stem}.{e}.{role}.weight": {
            **{n: shape for n in _spellings(f"{stem}.{e}.{stored[role]}.weight", spec, prefix)},
            **together,
        }
        for e in range(E)
        for role in roles
    }


def _spellings(name: str, spec: Spec, prefix: str) -> Iterator[str]:
    """`name`, without the base model's prefix (some hub files lack it), and as checkpoints from before a renaming have it."""
    for n in (name, name.removeprefix(f"{prefix}.")):
        yield n
        yield from (n.replace(new, old) for new, old in spec.renamed if new in n)


def expert_part(name: str, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    """The index of the expert's tensor `name` (<experts>.<e>.<role>.weight) in its source tensor of `shape`; () for all of it."""
    if len(shape) == 2:
        return ()
    e, role = name.split(".")[-3:-1]
    half = shape[1] // 2
    rows = {"gate_proj": slice(0, half), "up_proj": slice(half, shape[1]), "down_proj": slice(0, shape[1])}
    return int(e), rows[role]


def source_tensors(
    block: nn.Module, model: nn.Module, spec: Spec, i: int, names: dict[str, str], checkpoint: Checkpoint
) -> dict[str, torch.Tensor]:
    """Block i, every weight kept (16 bits), under the checkpoint's names and in its layout: the way back from `load_block`.

    Args:
        block: the block as `load_block` made it, with weights of the same shapes, no channels reordered.
        names: from `tensor_names`.

    Returns:
        Tensor name in the checkpoint -> tensor, fused tensors whole, GPT-2's linears transposed back; dtypes are the block's.
    """
    from transformers.pytorch_utils import Conv1D

    prefix = f"{spec.blocks}.{i}"
    original = dict(model.get_submodule(prefix).named_modules())
    found: dict[str, torch.Tensor] = {}
    parts: dict[str, list[torch.Tensor]] = {}
    for local, tensor in block.state_dict().items():
        source = names[f"{prefix}.{local}"]
        owner = original.get(local.rpartition(".")[0])
        if len(checkpoint.shapes[source]) == 3:
            parts.setdefault(source, []).append(tensor)
        elif isinstance(owner, Conv1D) and tensor.ndim == 2:
            found[source] = tensor.T.contiguous()  # [R, C] -> [C, R]
        else:
            found[source] = tensor
    for source, experts in parts.items():  # in the order e0 gate, e0 up, e1 gate ... or e0 down, e1 down ...
        found[source] = torch.cat(experts).view(checkpoint.shapes[source])  # [E R, C] -> [E, R, C]
    return found
