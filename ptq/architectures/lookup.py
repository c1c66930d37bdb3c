"""Find a model's spec, or say what is missing in a way that helps to write one."""

from __future__ import annotations

from typing import Any

from torch import nn

from ptq.architectures.families import FAMILIES
from ptq.architectures.spec import Spec
from ptq.errors import UnsupportedModel

STUB = """\
Spec(
    model_type={model_type!r},
    blocks={blocks!r},
    norm="layernorm" | "rmsnorm" | "rmsnorm_plus_one",
    attention_norm="...",       # feeds query, key, value
    qkv=("...", "...", "..."),  # or FusedQKV("...", "parts" | "heads")
    output="...",
    mlp_norm="...",             # None when attention_norm feeds the MLP too
    up=("...",),                # fed by mlp_norm: fc1, or gate and up
    down="...",
    rotary=None | "half" | "interleaved",
)"""


def spec_for(config: Any, model: nn.Module | None = None) -> Spec:
    """The family's spec for a transformers config.

    Raises:
        UnsupportedModel: unknown family (with the module tree, when `model` is given, and a spec to edit), a refused configuration, or
            paths that the model does not have.
    """
    spec = FAMILIES.get(config.model_type)
    if spec is None:
        raise UnsupportedModel(_unknown(config, model))
    for refusal in spec.refuse:
        if getattr(config, refusal.attribute, None) == refusal.value:
            raise UnsupportedModel(
                f"{config.model_type} with {refusal.attribute}={refusal.value}: {refusal.reason}; no method here applies"
            )
    if model is not None:
        _check_paths(spec, model)
    return spec


def has_experts(spec: Spec, block: nn.Module) -> bool:
    """Whether this block routes its tokens to experts; families with experts may have blocks without."""
    return spec.experts is not None and spec.experts.module in dict(block.named_modules())


def block_paths(spec: Spec, block: nn.Module) -> tuple[str, ...]:
    """Every path inside `block` that the spec names."""
    norms = tuple(n for n in (spec.attention_norm, spec.mlp_norm) if n)
    mlp = (*spec.up, spec.down)
    if has_experts(spec, block):
        mlp = (spec.experts.module, spec.experts.router, *(spec.experts.shared or ()))
    return norms + spec.qkv_linears + (spec.output,) + mlp + (spec.head_norms or ())


def _check_paths(spec: Spec, model: nn.Module) -> None:
    for i, block in enumerate(model.get_submodule(spec.blocks)):
        names = dict(block.named_modules())
        missing = [p for p in block_paths(spec, block) if p not in names]
        if missing:
            raise UnsupportedModel(
                f"{spec.model_type}: {spec.blocks}.{i} has no {', '.join(missing)}; it has {', '.join(n for n in names if n)}"
            )


def _unknown(config: Any, model: nn.Module | None) -> str:
    known = ", ".join(sorted(FAMILIES))
    head = f"model_type {config.model_type!r} has no spec (known: {known})"
    if model is None:
        return head
    blocks = _longest_list(model)
    tree = [
        f"  {name}: {type(m).__name__}"
        for name, m in model.named_modules()
        if name and not _inside_later_block(name, blocks)
    ]
    stub = STUB.format(model_type=config.model_type, blocks=blocks)
    return "\n".join([f"{head}; its module tree:", *tree, "edit this spec into ptq/architectures/families.py:", stub])


def _longest_list(model: nn.Module) -> str:
    lists = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    return max(lists, key=lists.get, default="...")


def _inside_later_block(name: str, blocks: str) -> bool:
    rest = name.removeprefix(blocks + ".")
    return rest != name and rest.split(".")[0] != "0"
