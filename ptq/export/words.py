"""Codes in int32 words: element i of a row at bits i*bits of its bit stream, least significant first, no padding between words.

compressed-tensors and GPTQ share this layout, along different axes. It is `lowbit.packing`'s bit stream, read four bytes at a time.
"""

from __future__ import annotations

import torch
from lowbit.packing import pack, packed_length, unpack
from torch.nn.functional import pad


def to_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [N, K] -> int32 [N, ceil(K bits / 32)], the unused high bits of a row's last word zero."""
    stream = pack(codes, bits)  # [N, K] -> [N, bytes]
    return pad(stream, (0, -stream.shape[1] % 4)).contiguous().view(torch.int32)  # [N, bytes] -> [N, words]


def from_words(words: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """int32 [N, ceil(length bits / 32)] -> uint8 [N, length]."""
    stream = words.contiguous().view(torch.uint8)  # [N, words] -> [N, 4 words]
    return unpack(stream[:, : packed_length(length, bits)].contiguous(), bits, length)
