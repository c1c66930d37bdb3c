"""What a planar cache layer gives an attention module at a decoding step: keys and values that are decoded only if something looks.

transformers hands them to the model's attention function as they are. The two that can attend to packed codes, PyTorch's
`scaled_dot_product_attention` and `lowbit.attention`, ask `attended` first; for every other they are tensors like any.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.lazy import Lazy


class Held(Lazy):
    """Keys (which 0) or values (which 1) [B, H, T, D] of `layer`, a `lowbit.planar_cache.PlanarCacheLayer`, as of its newest token."""

    layer: Any
    which: int
    decoded: list[Tensor]  # both, once something has looked; the other one of the pair has the same list

    @classmethod
    def both(cls, layer, like: Tensor) -> tuple[Held, Held]:
        """Keys and values of all that `layer` holds, in the dtype and shape, but for tokens, of `like` [B, H, 1, D]."""
        batch, heads, _, channels = like.shape
        pair = [cls.empty_like((batch, heads, layer.get_seq_length(), channels), like) for _ in range(2)]
        decoded: list[Tensor] = []
        for which, held in enumerate(pair):
            held.layer, held.which, held.decoded = layer, which, decoded
        return pair[0], pair[1]

    def made(self) -> Tensor:
        """Decoded; RuntimeError if that is asked for the first time when the layer holds another number of tokens."""
        if not self.decoded:
            if self.layer.get_seq_length() != self.shape[2]:
                raise RuntimeError(
                    f"keys and values of {self.shape[2]} tokens are asked for when the cache holds {self.layer.get_seq_length()}; "
                    "use them in their step"
                )
            self.decoded.extend(self.layer.decoded())
        return self.decoded[self.which]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            y = _of_pytorch(*args, **(kwargs or {}))
            if y is not None:
                return y
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})


def _of_pytorch(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor | None:
    """`attended` with the arguments of `scaled_dot_product_attention`; its causal mask aligns one query with the first token."""
    return None if dropout_p or is_causal else attended(query, key, value, attn_mask, scaling=scale)


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **how: Any) -> Tensor | None:
    """Attention of queries [B, Hq, N, D], which all see the same tokens, over packed codes; None where the kernel cannot.

    Query heads share KV heads in a row, and so do the N queries of a head.

    Args:
        key, value: any; the kernel takes both `Held` of one layer.
        mask: the kernel takes none, and bool [B or 1, 1, 1, T], true where a token is seen.
        how: scaling, softcap and softmax_bits of `lowbit.kv_planar.attention_decode`.
    """
    if not (isinstance(key, Held) and isinstance(value, Held) and value.layer is key.layer):
        return None
    if (key.which, value.which) != (0, 1) or not _taken(query, key, mask):
        return None
    seen = None if mask is None else mask[:, 0, 0].expand(query.shape[0], -1)  # [B or 1, 1, 1, T] -> [B, T]
    return key.layer.attend(query.flatten(1, 2), seen, **how).view(query.shape)  # [B, Hq, N, D] -> [B, Hq N, D]


def _taken(query: Tensor, key: Held, mask: Tensor | None) -> bool:
    """Whether shapes, dtypes and devices are the kernel's, and no gradient is asked."""
    batch, heads, tokens, channels = key.shape
    like = query.dim() == 4 and (query.dtype, query.device) == (key.dtype, key.device)
    if not like or (query.shape[0], query.shape[3]) != (batch, channels) or query.shape[1] % heads:
        return False
    if torch.is_grad_enabled() and query.requires_grad:
        return False
    shapes = [(b, 1, 1, tokens) for b in (1, batch)]
    return mask is None or (mask.dtype == torch.bool and mask.device == query.device and tuple(mask.shape) in shapes)
