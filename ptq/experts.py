"""What the solver is given for a mixture's experts, and which recipes can compress one.

An expert is solved on the tokens routed to it, n_e of them, which may be few or none. Its H is therefore shrunk toward a target T that
is known better, with the form of Ledoit and Wolf's estimator (J. Multivariate Analysis 88, 2004):

    H = (1 - a) H_e / n_e + a T,    a = C / (C + n_e)

as if C tokens distributed as T had come before: below C tokens H_e alone has no full rank. n_e = 0 gives T, n_e = C the mean of the two,
and a falls as C / n_e beyond. Gate and up see the layer's own tokens, so their T is the layer's average H / n over all tokens. Inner
channels of two experts have nothing to do with each other, so for down T is the diagonal of H_e / n_e: the size of each channel is known
from few tokens, what lies between two channels is not. Without any token T is the identity there: the weights' own size decides.
"""

from __future__ import annotations

import torch

from ptq.architectures import Spec
from ptq.errors import NumericalFailure, UnsupportedModel
from ptq.recipe import Recipe, moves_channels, quantizes_activations


def gate_up_hessian(own: torch.Tensor, tokens: int, layer: torch.Tensor, layer_tokens: int) -> torch.Tensor:
    """H a token of an expert's gate and up.

    Args:
        own: float32 [C, C], sum x x^T over the `tokens` routed to the expert, zeros for none; used up.
        layer: the same over all `layer_tokens` tokens that the router saw; kept.

    Raises:
        NumericalFailure: the router saw no token.
    """
    if layer_tokens < 1:
        raise NumericalFailure("no token reached the router; use more calibration tokens")
    C = own.shape[0]
    return own.add_(layer, alpha=C / layer_tokens).div_(tokens + C)  # (1 - a) / n_e = 1 / (n_e + C), a = C / (n_e + C)


def down_hessian(own: torch.Tensor, tokens: int) -> torch.Tensor:
    """H a token of an expert's down, from `own` float32 [C, C] over its `tokens`, zeros for none; used up."""
    if tokens == 0:
        return own.fill_diagonal_(1)
    C = own.shape[0]
    sizes = own.diagonal() / tokens  # [C]
    own.div_(tokens + C).diagonal().copy_(sizes)
    return own


def check_recipe(spec: Spec, recipe: Recipe) -> None:
    """UnsupportedModel for a recipe that would permute or quantize the activations of a family with experts."""
    if spec.experts is None or not (moves_channels(recipe) or quantizes_activations(recipe)):
        return
    raise UnsupportedModel(
        f"{spec.model_type} has experts: what works is ptq prune, and ptq quantize --method gptq or rtn with --wbits alone; "
        "no reordering, smoothing, activation or KV bits"
    )
