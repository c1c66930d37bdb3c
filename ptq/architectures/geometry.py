"""Head counts and the rows of queries, keys and values, read off a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ptq.architectures.spec import FusedQKV, Spec


@dataclass(frozen=True)
class Geometry:
    """heads H, key/value heads, head width D, and how many of the D channels the rotary embedding turns.

    scaled_up: the linear whose rows scale the down projection's input channel by channel, by positive factors: the one that a gate's
    activation multiplies, or the one before a ReLU. None where another activation lies between.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    scaled_up: str | None


def geometry_of(config: Any, spec: Spec) -> Geometry:
    """Read the geometry from a transformers config (its attribute map gives the standard names)."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Geometry(
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        rotary_dim=_rotary_dim(config, head_dim) if spec.rotary else 0,
        scaled_up=_scaled_up(config, spec),
    )


def _scaled_up(config: Any, spec: Spec) -> str | None:
    if len(spec.up) == 2:
        return spec.up[1]
    return spec.up[0] if activations_of(config) == {"relu"} else None


def activations_of(config: Any) -> set[str]:
    """The MLP's activation, by whatever attribute the config names it; more than one where attributes differ."""
    names = ("activation_function", "hidden_act", "hidden_activation")
    return {getattr(config, name, None) for name in names} - {None}


def _rotary_dim(config: Any, head_dim: int) -> int:
    if getattr(config, "rotary_dim", None):
        return config.rotary_dim
    parameters = getattr(config, "rope_parameters", None) or {}
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def qkv_rows(spec: Spec, geometry: Geometry) -> tuple[tuple[str, torch.Tensor], ...]:
    """Where query, key and value live: three (module path, rows int64) in the order q, k, v, rows in head-major order."""
    H, D = geometry.heads, geometry.head_dim
    if not isinstance(spec.qkv, FusedQKV):
        widths = (H * D, geometry.kv_heads * D, geometry.kv_heads * D)
        return tuple((path, torch.arange(n)) for path, n in zip(spec.qkv, widths))
    index = torch.arange(3 * H * D)
    if spec.qkv.layout == "parts":
        parts = index.view(3, H * D)  # [3, H D]
    else:
        parts = index.view(H, 3, D).transpose(0, 1).reshape(3, H * D)  # [H, 3, D] -> [3, H D]
    return tuple((spec.qkv.module, rows) for rows in parts)
