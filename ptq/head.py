"""The output head at few bits: an untied copy, rounded to nearest.

In a small model the head is a large share of what decoding reads. Its input is not quantized.
"""

from __future__ import annotations

import time

import torch
from lowbit.modules import Linear
from torch import nn

import sparsegpt
from ptq.errors import UnsupportedModel
from ptq.source import Checkpoint
from ptq.weights import LayerFact, Outcome, fact_of

GROUP = 64


def head_name(model: nn.Module) -> str:
    """The path of the linear that makes logits. Raises UnsupportedModel for a model whose head is something else."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None or not isinstance(head, (nn.Linear, Linear)):
        raise UnsupportedModel(
            f"weights.head: the output head is a {type(head).__name__}, not a linear; leave it at 16"
        )
    return name


def head_source(model: nn.Module, names: dict[str, str]) -> str:
    """The checkpoint's tensor that the head's weight comes from; a tied head has none of its own, then its embedding's is taken.

    names: from `tensor_names`. Raises as `head_name`.
    """
    weight = f"{head_name(model)}.weight"
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return names.get(weight) or names[tied[weight]]


def compress_head(
    model: nn.Module, names: dict[str, str], checkpoint: Checkpoint, bits: int
) -> tuple[Linear, LayerFact]:
    """The head packed in groups of GROUP columns, grids narrowed where that lowers the squared error, and what the report says of it.

    names: from `tensor_names`.
    """
    started = time.monotonic()
    name, like = head_name(model), model.get_output_embeddings()
    source = head_source(model, names)
    W = checkpoint.read([source])[source]  # [R, C]
    linear = Linear(W.shape[1], W.shape[0], bias=like.bias is not None, dtype=W.dtype)
    if like.bias is not None:
        linear.bias = checkpoint.read([names[f"{name}.bias"]])[names[f"{name}.bias"]]
    linear.weight, W = W, W.float()
    sizes = sparsegpt.equal_groups(W.shape[1], GROUP)
    grid = sparsegpt.fit_grid(W, sizes, bits, importance=torch.ones(W.shape[1]))
    codes = sparsegpt.encode(W, grid)
    lost = sparsegpt.dequantize(codes, grid).sub_(W).square_().sum(dtype=torch.float64)
    error = float(lost / W.square_().sum(dtype=torch.float64).clamp(min=torch.finfo(torch.float64).tiny))
    linear.pack_(codes, grid.scale, grid.zero, sizes, bits)
    return linear, fact_of(name, linear, Outcome(relative_error=error), seconds=time.monotonic() - started)
