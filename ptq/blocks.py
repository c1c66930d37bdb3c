"""One block of a model at a time: an empty skeleton, blocks filled from safetensors, and the arguments each block is called with."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from lowbit.experts import Experts
from lowbit.modules import Linear, Norm
from lowbit.sinks import announce, leading
from torch import nn

from ptq import layout
from ptq.architectures import Spec, has_experts
from ptq.errors import BadInput, UnsupportedModel
from ptq.sites import block_sites
from ptq.source import Checkpoint

# Buffers that old checkpoints store and that models now make themselves: rotary frequencies and causal masks.
MADE_BY_THE_MODEL = r"(^|\.)rotary_emb\.inv_freq$|(^|\.)(attn|attention)\.(bias|masked_bias)$"


@dataclass(frozen=True)
class Call:
    """How a model calls one block, beside the hidden state: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _LastBlock(Exception):
    """Ends the recording forward once every block has been called."""


def skeleton(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> nn.Module:
    """The model with meta parameters (no memory) and real buffers such as rotary frequencies.

    Raises:
        UnsupportedModel: transformers has no causal language model for the config.
        BadInput: values in the config that make no model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(checkpoint.config, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, LookupError, AssertionError) as err:
        found = " ".join(str(err).split())[:200]
        if "Unrecognized configuration class" in found:
            reason = f"{checkpoint.config.model_type!r} is no causal language model for transformers"
            raise UnsupportedModel(f"{checkpoint.folder}: {reason}: {found}") from err
        raise BadInput(f"{checkpoint.folder}/config.json: makes no model: {type(err).__name__}: {found}") from err
    return model.eval()


def tensor_names(model: nn.Module, spec: Spec, checkpoint: Checkpoint) -> dict[str, str]:
    """Name in the model -> name in the checkpoint, tied copies left out.

    Each expert's tensors are named one by one, whether they are apart in the checkpoint or fused (then several share a tensor).

    Raises:
        BadInput: a parameter the checkpoint lacks, or whose shape differs; or tensors that the model has no place for, unless it
            makes them itself.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    names = {}
    for name, places in layout.places(model, spec).items():
        found = next((n for n in places if n in checkpoint.where), None)
        if found is not None:
            if checkpoint.shapes[found] != places[found]:
                has, wants = list(checkpoint.shapes[found]), list(places[found])
                raise BadInput(f"{checkpoint.folder}: {found} is {has}, the config says {wants}")
            names[name] = found
        elif name not in tied:
            raise BadInput(f"{checkpoint.folder}: tensor {next(iter(places))} is missing from the safetensors files")
    ignored = [re.compile(p) for p in (MADE_BY_THE_MODEL, *(model._keys_to_ignore_on_load_unexpected or ()))]
    lost = [name for name in leftovers(names, checkpoint) if not any(p.search(name) for p in ignored)]
    if lost:
        what = f"{len(lost)} tensors have no place in the model that the config describes, first {lost[0]}"
        raise BadInput(f"{checkpoint.folder}: {what}; mend config.json")
    return names


def leftovers(names: dict[str, str], checkpoint: Checkpoint) -> list[str]:
    """Tensors of the checkpoint that none of `names` (see `tensor_names`) takes."""
    return sorted(checkpoint.where.keys() - names.values())


def fill(module: nn.Module, prefix: str, names: dict[str, str], checkpoint: Checkpoint, *, device, dtype=None) -> None:
    """Give `module` its tensors from the checkpoint, floating ones cast to `dtype` if given."""
    for local, _ in list(module.named_parameters(remove_duplicate=False)):
        full = f"{prefix}.{local}" if prefix else local
        if full not in names:
            continue
        tensor = checkpoint.read([names[full]], dtype)[names[full]]
        owner, _, leaf = local.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor.to(device), requires_grad=False)


def fill_experts(
    block: nn.Module, prefix: str, spec: Spec, names: dict[str, str], checkpoint: Checkpoint, *, device
) -> None:
    """Give the experts of a block their weights, one expert at a time also where the checkpoint holds them fused."""
    for local in block.get_submodule(spec.experts.module).state_dict(prefix=f"{spec.experts.module}."):
        source = names[f"{prefix}.{local}"]
        part = layout.expert_part(local, checkpoint.shapes[source])
        linear = block.get_submodule(local.removesuffix(".weight"))
        linear.weight = checkpoint.read_part(source, part).to(device)


def record_calls(
    model: nn.Module,
    spec: Spec,
    names: dict[str, str],
    checkpoint: Checkpoint,
    batches: list[torch.Tensor],
    *,
    device,
    dtype,
) -> tuple[list[torch.Tensor], list[dict[int, Call]]]:
    """Run the embeddings on token batches [B, T] and see how every block would be called.

    Blocks are passed over (each hands its input on), so this costs little. All blocks' arguments are kept because they may differ by
    block: attention masks and rotary tables depend on the layer type.

    Returns:
        Hidden states entering block 0, one [B, T, C] a batch on the CPU; and for each block, batch size -> Call.
    """
    blocks = model.get_submodule(spec.blocks)
    outside = {name: source for name, source in names.items() if not name.startswith(f"{spec.blocks}.")}
    base = getattr(model, model.base_model_prefix)
    fill(base, model.base_model_prefix, outside, checkpoint, device=device, dtype=dtype)
    for module in base.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    hidden: list[torch.Tensor] = []
    calls: list[dict[int, Call]] = [{} for _ in blocks]

    def recorder(i: int):
        def forward(states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if i == 0:
                hidden.append(states.detach().cpu())
            calls[i].setdefault(states.shape[0], Call(args, kwargs))
            if i == len(blocks) - 1:
                raise _LastBlock
            return (states,) if spec.returns_tuple else states

        return forward

    for i, block in enumerate(blocks):
        block.forward = recorder(i)
    try:
        with torch.no_grad():
            for tokens in batches:
                try:
                    base(input_ids=tokens.to(device), use_cache=False)
                except _LastBlock:
                    continue
    finally:
        for block in blocks:
            del block.forward
    for name in outside:  # embeddings are large and not needed again
        owner, _, leaf = name.rpartition(".")
        parameters = model.get_submodule(owner)._parameters
        parameters[leaf] = nn.Parameter(parameters[leaf].to("meta"), requires_grad=False)
    return hidden, calls


def load_block(
    model: nn.Module, spec: Spec, i: int, names: dict[str, str], checkpoint: Checkpoint, *, device
) -> nn.Module:
    """Block i with its tensors, its linears and norms as lowbit modules in full precision (the same function)."""
    block = copy.deepcopy(model.get_submodule(spec.blocks)[i])
    prefix = f"{spec.blocks}.{i}"
    if has_experts(spec, block):
        swap(block, spec.experts.module, Experts.full_precision)
        fill_experts(block, prefix, spec, names, checkpoint, device=device)
    fill(block, prefix, names, checkpoint, device=device)
    block = block.to(device)
    for path in linear_paths(spec, block):
        if not isinstance(block.get_submodule(path), Linear):  # experts' linears are made as lowbit's
            swap(block, path, Linear.full_precision)
    for path in norm_paths(spec):
        swap(block, path, lambda norm: Norm.full_precision(norm, spec.norm))
    return block.eval()


def swap(parent: nn.Module, path: str, make) -> None:
    """Replace the submodule at `path` by make(it)."""
    owner, _, leaf = path.rpartition(".")
    setattr(parent.get_submodule(owner), leaf, make(parent.get_submodule(path)))


def linear_paths(spec: Spec, block: nn.Module) -> tuple[str, ...]:
    """Paths of every linear in `block` that is compressed, each once."""
    return tuple(path for site in block_sites(spec, block) for path in site.linears)


def norm_paths(spec: Spec) -> tuple[str, ...]:
    """Paths of the norms that feed linears or sit on query and key heads."""
    return tuple(n for n in (spec.attention_norm, spec.mlp_norm) if n) + (spec.head_norms or ())


def run_block(block: nn.Module, states: torch.Tensor, call: Call, *, sinks: int = 0) -> torch.Tensor:
    """Hidden state [B, T, C] of whole windows through the block; the first `sinks` tokens of each are announced (`lowbit.sinks`)."""
    announce(leading(states.shape[0], states.shape[1], sinks, states.device))
    out = block(states, *call.args, **call.kwargs)
    return out[0] if isinstance(out, tuple) else out
