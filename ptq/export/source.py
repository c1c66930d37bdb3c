"""The folder that an export reads, a block at a time, and the names that other tools know its tensors by."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lowbit
import torch
from lowbit.experts import ROLES
from lowbit.modules import ActivationQuantizer, Linear, Norm
from torch import nn

from ptq.architectures import Spec, has_experts, spec_for
from ptq.blocks import linear_paths, load_block, norm_paths, skeleton, swap, tensor_names
from ptq.checkpoint import check_format, is_compressed
from ptq.consistency import check_packed
from ptq.errors import BadInput, UnsupportedModel
from ptq.head import head_name
from ptq.hf_quantizer import spec_of, take_experts_apart
from ptq.source import Checkpoint, read_config, read_headers


@dataclass(frozen=True)
class Source:
    """An opened folder. `model` is empty; of a packed folder its blocks hold lowbit modules, laid out as the config says.

    names: name in `model` -> name in the folder. transposed: whether the family's linears are GPT-2's Conv1D. head: the path of the
    output head if that is packed too.
    """

    checkpoint: Checkpoint
    model: nn.Module
    spec: Spec
    names: dict[str, str]
    packed: bool
    transposed: bool
    head: str | None = None

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def blocks(self) -> int:
        return len(self.model.get_submodule(self.spec.blocks))

    @property
    def dtype(self) -> torch.dtype:
        """That of the model which was compressed."""
        return getattr(self.checkpoint.config, "dtype", None) or torch.float32


def open_source(folder: Path) -> Source:
    """Open a folder that `ptq` wrote, or any other of a known family in full precision.

    Raises:
        BadInput: not a model folder, a format version this release does not read, tensors or modules that do not fit the config, or
            quantized by another tool.
        UnsupportedModel: a family without a spec.
    """
    config = read_config(folder)
    check_format(folder, config)
    packed = is_compressed(config)
    foreign = dict(getattr(config, "quantization_config", None) or {}).get("quant_method")
    if foreign and not packed:
        raise BadInput(f"{folder}: quantized by {foreign!r}; give a folder that ptq wrote or a full-precision one")
    checkpoint = Checkpoint(folder, config, *read_headers(folder))
    model = skeleton(checkpoint)
    spec = spec_of(config) if packed else spec_for(config, model)
    transposed = not isinstance(model.get_submodule(f"{spec.blocks}.0.{spec.output}"), nn.Linear)
    if not packed:
        return Source(checkpoint, model, spec, tensor_names(model, spec, checkpoint), packed, transposed)
    take_experts_apart(model, spec)
    head = _lay_out(model, spec, dict(config.quantization_config), folder)
    names = {name: name for name in model.state_dict() if name not in (model.all_tied_weights_keys or {})}
    missing, lost = sorted(names.keys() - checkpoint.where), sorted(checkpoint.where.keys() - names)
    if missing or lost:
        what = f"tensor {missing[0]} is missing" if missing else f"tensor {lost[0]} has no place in the model"
        raise BadInput(f"{folder}: {what}; the checkpoint is corrupt, make it again")
    return Source(checkpoint, model, spec, names, packed, transposed, head)


def _lay_out(model: nn.Module, spec: Spec, quantization: dict[str, Any], folder: Path) -> str | None:
    """Put empty lowbit modules where the config says, which may name no others; returns the path of the head if it is one."""
    modules = dict(quantization.get("modules") or {})
    names = [
        f"{spec.blocks}.{i}.{path}"
        for i, block in enumerate(model.get_submodule(spec.blocks))
        for path in (*linear_paths(spec, block), *norm_paths(spec))
    ]
    head = head_name(model) if len(modules) > len(names) else None
    for name in names if head is None else [*names, head]:
        try:
            with torch.device("meta"):
                swap(model, name, lambda like, name=name: lowbit.build(modules.pop(name), like))
        except (LookupError, TypeError, ValueError, AttributeError) as err:
            what = f"{name}: {type(err).__name__}: {err}"
            raise BadInput(f"{folder}/config.json: {what}; the checkpoint is corrupt, make it again") from err
    if modules:
        raise BadInput(f"{folder}/config.json: {sorted(modules)[0]!r} is no module that ptq compresses; make it again")
    return head


def block_of(source: Source, i: int) -> nn.Module:
    """Block i with its tensors, its linears and norms as lowbit modules.

    Raises:
        BadInput: tensors that cannot be read or do not fit the config.
    """
    if not source.packed:
        names = source.names
        return load_block(source.model, source.spec, i, names, source.checkpoint, device=torch.device("cpu"))
    return _filled(source, f"{source.spec.blocks}.{i}")


def head_of(source: Source) -> Linear | None:
    """The output head with its tensors if it is packed. Raises BadInput as `block_of`."""
    return None if source.head is None else _filled(source, source.head)


def _filled(source: Source, prefix: str) -> nn.Module:
    """A copy of the empty module at `prefix`, with its tensors."""
    module = copy.deepcopy(source.model.get_submodule(prefix))
    tensors = {}
    for name, wanted in module.state_dict().items():
        tensor = tensors[name] = source.checkpoint.read_part(f"{prefix}.{name}")
        floats = tensor.is_floating_point() and wanted.is_floating_point()
        if tensor.shape != wanted.shape or not (floats or tensor.dtype == wanted.dtype):
            has, wants = f"{tensor.dtype} {list(tensor.shape)}", f"{wanted.dtype} {list(wanted.shape)}"
            raise BadInput(f"{source.folder}: {prefix}.{name} is {has}, the config says {wants}; make it again")
    module.load_state_dict(tensors, assign=True)
    check_packed(module, f"{source.folder}: {prefix}")
    return module


def others(source: Source, i: int, block: nn.Module) -> dict[str, torch.Tensor]:
    """What block i has beside the weights of its linears, by name in the model: biases, norms, routers."""
    modules, found = dict(block.named_modules()), {}
    for name, tensor in block.state_dict().items():
        path, _, leaf = name.rpartition(".")
        owner = modules[path]
        is_weight = isinstance(owner, Linear) and leaf != "bias"
        is_order = isinstance(owner, Norm) and leaf == "permutation"
        if not (is_weight or is_order or isinstance(owner, ActivationQuantizer)):
            found[f"{source.spec.blocks}.{i}.{name}"] = tensor
    return found


def outside(source: Source) -> dict[str, torch.Tensor]:
    """Embeddings, final norm and a head that is not packed, by name in the model; what is tied is there once."""
    packed = f"{source.spec.blocks}.", f"{source.head}.weight"
    names = {name: at for name, at in source.names.items() if not name.startswith(packed)}
    return {name: source.checkpoint.read_part(at) for name, at in names.items()}


def published_name(spec: Spec, name: str) -> str:
    """What published checkpoints of the family call the model's tensor `name`; experts are apart there too."""
    if spec.experts is not None and f".{spec.experts.module}." in name:
        stem, role, leaf = name.rsplit(".", 2)
        name = f"{stem}.{spec.experts.stored[ROLES.index(role)]}.{leaf}"
    for here, there in spec.renamed:
        name = name.replace(here, there)
    return name


def plain_config(source: Source) -> dict[str, Any]:
    """The folder's config.json as it was before anything was packed."""
    config = json.loads((source.folder / "config.json").read_text(encoding="utf8"))
    for key in ("quantization_config", "auto_map"):
        config.pop(key, None)
    return config | {"model_type": source.spec.model_type}


def refuse_other_linears(source: Source, name: str) -> None:
    """UnsupportedModel where the format `name` has no words for the family's linears: a mixture's experts, GPT-2's Conv1D."""
    blocks = source.model.get_submodule(source.spec.blocks)
    reason = "its linears are transposed (Conv1D)" if source.transposed else None
    if any(has_experts(source.spec, block) for block in blocks):
        reason = "it has experts"
    if reason is not None:
        what = f"{source.spec.model_type} cannot be exported to {name}: {reason}"
        raise UnsupportedModel(f"{source.folder}: {what}; --format dense takes it")
