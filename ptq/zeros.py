"""Count the zeros of a folder's linears in the tensors themselves, and hold them against what its report says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lowbit
import torch
from lowbit.modules import Linear, linear_shape
from lowbit.sparse import group_counts
from torch import nn
from transformers.pytorch_utils import Conv1D

from ptq.architectures import spec_for
from ptq.blocks import skeleton, tensor_names
from ptq.checkpoint import check_format, is_compressed
from ptq.errors import BadInput
from ptq.hf_quantizer import spec_of, take_experts_apart
from ptq.layout import expert_part
from ptq.source import Checkpoint, read_config, read_headers


def count_zeros(folder: Path, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Read the weight of every linear in `rows` and check it.

    Args:
        folder: compressed, or in the source's own layout.
        rows: the report's rows: `name`, and where known `shape`, `sparsity` (share of zeros) and `keep` ("2:4").

    Returns:
        name -> `sparsity`, `weights`, `zeros`, `stored_bytes` (all that the weight takes on disk) and `dense_bytes` (in the model's dtype).

    Raises:
        BadInput: a weight that cannot be read, another count of zeros than the report's, or a group that keeps too many.
    """
    config = read_config(folder)
    check_format(folder, config)
    checkpoint = Checkpoint(folder, config, *read_headers(folder))
    model = skeleton(checkpoint)
    packed = is_compressed(config)
    spec = spec_of(config) if packed else spec_for(config, model)
    names = {} if packed else tensor_names(model, spec, checkpoint)
    take_experts_apart(model, spec)  # the report names each expert's linears
    found = {}
    for row in rows:
        name = row["name"]
        try:
            like = model.get_submodule(name)
            linear = _packed(checkpoint, name, like) if packed else _plain(checkpoint, names, name, like)
            kept = linear.kept()
            _check(row, kept)
        except LookupError as err:
            raise BadInput(f"{folder}: {name}: its tensors or config.json lack {err}; make it again") from err
        except (ValueError, AttributeError, TypeError) as err:
            raise BadInput(f"{folder}: {name}: {err}; the checkpoint is corrupt, make it again") from err
        zeros = kept.numel() - int(kept.sum())
        found[name] = {
            "sparsity": zeros / max(1, kept.numel()),
            "weights": kept.numel(),
            "zeros": zeros,
            "stored_bytes": linear.stored_bytes(),
            "dense_bytes": kept.numel() * like.weight.element_size(),
        }
    return found


def _packed(checkpoint: Checkpoint, name: str, like: nn.Module) -> Linear:
    """The lowbit module of a compressed checkpoint, its weight filled in."""
    with torch.device("meta"):
        linear = lowbit.build(dict(checkpoint.config.quantization_config)["modules"][name], like)
    for local, empty in list(linear.named_buffers(recurse=False)):
        if local.startswith("weight"):
            full = f"{name}.{local}"
            tensor = checkpoint.read([full])[full]
            if tensor.shape != empty.shape:
                raise ValueError(f"{local} is {list(tensor.shape)}, config.json says {list(empty.shape)}")
            setattr(linear, local, tensor)
    return linear


def _plain(checkpoint: Checkpoint, names: dict[str, str], name: str, like: nn.Module) -> Linear:
    """The same of a checkpoint in its source's layout; a Conv1D's weight is stored [in, out]."""
    source = names[f"{name}.weight"]
    weight = checkpoint.read_part(source, expert_part(f"{name}.weight", checkpoint.shapes[source]))
    R, C = linear_shape(like)
    linear = Linear(C, R, bias=False, dtype=weight.dtype)
    linear.weight = weight.T if isinstance(like, Conv1D) else weight  # [C, R] -> [R, C]
    return linear


def _check(row: dict[str, Any], kept: torch.Tensor) -> None:
    """ValueError unless the mask bool [R, C] is what the row says."""
    shape, sparsity, keep = (row.get(key) for key in ("shape", "sparsity", "keep"))
    if shape is not None and list(kept.shape) != shape:
        raise ValueError(f"the weight is {list(kept.shape)}, the report says {shape}")
    if keep is not None:
        _check_groups(kept, keep)
    zeros = kept.numel() - int(kept.sum())
    # a share is a rounded quotient: it stands for the whole number of zeros next to it
    if sparsity is not None and zeros != round(sparsity * kept.numel()):
        claimed = round(sparsity * kept.numel())
        raise ValueError(f"{zeros} of {kept.numel()} weights are zero, the report says {claimed}")


def _check_groups(kept: torch.Tensor, keep: str) -> None:
    n, m = map(int, keep.split(":"))
    counts, most = group_counts(kept, (n, m))  # [R, G], [G]
    crowded = (counts > most).nonzero()
    if len(crowded):
        row, group = crowded[0].tolist()
        count, more = int(counts[row, group]), len(crowded) - 1
        raise ValueError(f"row {row}, group {group} keeps {count}, the report says {keep} ({more} more such groups)")
