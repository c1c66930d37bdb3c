"""Attention with quantized softmax probabilities, registered with transformers as the implementation "lowbit".

RPTQ (arXiv 2304.01089) quantizes the softmax output on the fixed grid of [0, 1]. A model takes part with
`model.set_attn_implementation("lowbit")` and an integer `softmax_bits` on its attention modules; without the
attribute, or at 16, the function computes what transformers' eager attention computes.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from lowbit.held import attended

NAME = "lowbit"
UNQUANTIZED_BITS = 16


def quantize_probabilities(probabilities: Tensor, bits: int) -> Tensor:
    """round((2^b - 1) p) / (2^b - 1): the fixed [0, 1] grid of softmax outputs; same shape and dtype.

    Raises:
        ValueError: bits outside 2..8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"softmax_bits is {bits}; set 2 to 8, or {UNQUANTIZED_BITS} for full precision")
    levels = 2**bits - 1
    return (probabilities * levels).round_().div_(levels)


def _causal_mask(scores: Tensor) -> Tensor:
    """Bool [T, S], true where a query may look; the T queries are the last of the S tokens."""
    tokens, seen = scores.shape[-2:]
    return torch.ones(tokens, seen, dtype=torch.bool, device=scores.device).tril(seen - tokens)


def _masked(scores: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """Apply an additive mask, a bool mask (true: look), or none (causal if asked) to scores [B, H, T, S]."""
    if mask is None and causal and scores.shape[-2] > 1:
        mask = _causal_mask(scores)
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def lowbit_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Reference attention in the signature of transformers' attention functions.

    Args:
        module: the attention module; `softmax_bits` (2..8, or 16) and `is_causal` are read from it.
        query: [B, H, T, D].
        key, value: [B, KV heads, S, D]; each serves H / KV heads query heads in a row.
        attention_mask: additive or bool, broadcastable to [B, H, T, S]; None means causal if the module is causal.
        scaling: factor of the scores, D**-0.5 if None.
        softcap: scores become softcap * tanh(scores / softcap) before the mask.
        kwargs: what other implementations take; sliding windows are in the mask.

    Returns:
        output [B, T, H, D] and probabilities [B, H, T, S], in the dtype of `query`; None for those where a kernel attends to packed
        codes (`lowbit.held`), which it does unless `output_attentions` is asked.

    Raises:
        ValueError: softmax_bits out of range, or attention sinks (`s_aux`), which change the softmax.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError("attention sinks (s_aux) are not supported by 'lowbit'; use attn_implementation='eager'")
    softmax_bits = getattr(module, "softmax_bits", UNQUANTIZED_BITS)
    if not (dropout and module.training) and not kwargs.get("output_attentions"):
        y = attended(query, key, value, attention_mask, scaling=scaling, softcap=softcap, softmax_bits=softmax_bits)
        if y is not None:
            return y.transpose(1, 2), None  # [B, H, 1, D] -> [B, 1, H, D]
    repeats = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(repeats, dim=1)  # [B, KV heads, S, D] -> [B, H, S, D]
    value = value.repeat_interleave(repeats, dim=1)  # [B, KV heads, S, D] -> [B, H, S, D]
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)  # [B, H, T, S]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    causal = kwargs.get("is_causal")
    scores = _masked(scores, attention_mask, causal=getattr(module, "is_causal", True) if causal is None else causal)
    probabilities = scores.softmax(dim=-1, dtype=torch.float32)
    if softmax_bits != UNQUANTIZED_BITS:
        probabilities = quantize_probabilities(probabilities, softmax_bits)
    probabilities = nn.functional.dropout(probabilities.to(query.dtype), p=dropout, training=module.training)
    output = (probabilities @ value).transpose(1, 2).contiguous()  # [B, H, T, D] -> [B, T, H, D]
    return output, probabilities


def _written_mask(*args, **kwargs) -> Tensor | None:
    """transformers' bool mask [B, 1, T, S], true where a query may look, written down also where it is plainly causal."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, lowbit_attention)
# Without a mask function of its own name transformers would build no mask at all, and sliding windows and padding
# would be lost.
AttentionMaskInterface.register(NAME, _written_mask)
