"""What decoding one token reads, counted on a laid out result."""

from __future__ import annotations

from typing import Any

import torch
from lowbit.modules import Linear
from torch import nn

from ptq.architectures import Geometry, Spec
from ptq.plan.roofline import Step
from ptq.sites import block_sites

# Tensors that keep their dtype when a model is loaded; the other floating ones are cast to that of the activations.
AS_STORED = ("weight_scale", "weight_minimum")


def step_of(
    blocks: list[nn.Module],
    head: torch.Tensor | Linear,
    spec: Spec,
    geometry: Geometry,
    config: Any,
    *,
    batch: int,
    context: int,
    itemsize: int,
    kv_bits: float | None,
    input_bits: dict[str, int],
) -> Step:
    """One step of `batch` sequences that hold `context` tokens each.

    head: the matrix that makes logits, or the packed one. itemsize: bytes of an activation and of a weight that is kept. kv_bits: of a
    cached value, None for `itemsize`. input_bits: by site name, where linears read rounded inputs.
    """
    read = written = products = 0.0
    for block in blocks:
        sites = {path: site for site in block_sites(spec, block) for path in site.linears}
        for name, tensor in block.state_dict().items():
            read += _bytes(name, tensor, itemsize) * _busy(name, spec, config, batch)
        for path, site in sites.items():
            linear, used = block.get_submodule(path), _busy(path, spec, config, 1)
            inputs = linear.in_features * min(8 * itemsize, input_bits.get(site.name, 8 * itemsize)) / 8
            written += used * (inputs + linear.out_features * itemsize)
            products += used * linear.in_features * linear.out_features
    if isinstance(head, Linear):
        read += sum(_bytes(name, tensor, itemsize) for name, tensor in head.state_dict().items())
        products += head.in_features * head.out_features
    else:
        read += head.numel() * itemsize
        products += head.numel()
    tokens = sum(_seen(config, i, context) for i in range(len(blocks)))
    values = 2 * geometry.kv_heads * geometry.head_dim * tokens
    products += 2 * geometry.heads * geometry.head_dim * tokens
    cached = values * (kv_bits or 8 * itemsize) / 8
    return Step(batch, read, batch * cached, batch * written, batch * products)


def _bytes(name: str, tensor: torch.Tensor, itemsize: int) -> int:
    kept = tensor.is_floating_point() and not name.endswith(AS_STORED)
    return tensor.numel() * itemsize if kept else tensor.nbytes


def _busy(path: str, spec: Spec, config: Any, batch: int) -> float:
    """The share of a step in which a tensor is needed: of experts those that some of `batch` tokens come to, if all are as likely."""
    if spec.experts is None or not path.startswith(f"{spec.experts.module}."):
        return 1.0
    count = getattr(config, "num_local_experts", None) or config.num_experts
    return 1 - (1 - config.num_experts_per_tok / count) ** batch


def _seen(config: Any, i: int, context: int) -> int:
    """How many of `context` cached tokens layer i reads."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds[i] == "sliding_attention" if kinds else getattr(config, "use_sliding_window", True)
    return min(context, window) if window and slides else context
