"""Let a packed model's prefill and decoding steps run in native calls where its blocks allow it (`lowbit.decode`)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ptq.architectures import FusedQKV, Spec, geometry_of
from ptq.architectures.geometry import activations_of

# Families whose blocks are what the spec names, one after another, and nothing else.
PLAIN = ("opt", "llama", "mistral", "qwen2")


def decode_natively(model: nn.Module, spec: Spec, *, make: Callable | None = None) -> str | None:
    """Attach a decoder to `model`, whose linears are laid out already; returns in one line why it has none, None if it has one.

    make: called as `lowbit.decode.Decoder` is (default) to make the decoder.
    """
    from lowbit.decode import Decoder, Roles, Shape
    from lowbit.decode_attach import attach

    activations = activations_of(model.config)
    if spec.model_type not in PLAIN or isinstance(spec.qkv, FusedQKV) or len(activations) != 1:
        return (
            f"blocks of family {spec.model_type} with {', '.join(sorted(activations)) or 'no activation'} are not known"
        )
    names = ("norm", "attention_norm", "qkv", "output", "mlp_norm", "up", "down", "rotary")
    geometry = geometry_of(model.config, spec)
    heads = geometry.heads, geometry.kv_heads, geometry.head_dim, geometry.rotary_dim
    try:
        roles = Roles(**{name: getattr(spec, name) for name in names})
        decoder = (make or Decoder)(list(model.get_submodule(spec.blocks)), roles, Shape(*heads, *activations))
        attach(model, spec.blocks, decoder)
    except ValueError as err:
        return str(err)
    return None
