"""Codes as GGUF blocks of 32 channels, byte by byte as ggml lays them out.

Q4_0, 18 bytes: float16 d, then 16 bytes whose low nibbles are elements 0-15 and high nibbles 16-31; w = (q - 8) d.
Q4_1, 20 bytes: float16 d, float16 m, the same nibbles; w = q d + m. Q8_0, 34 bytes: float16 d, 32 int8; w = q d.
"""

from __future__ import annotations

import torch

from ptq.export.codes import Codes

BLOCK = 32


def q4_0(codes: Codes) -> torch.Tensor | None:
    """uint8 [R, 18 C / 32], None where a code less its zero point does not fit -8..7."""
    level, d, _ = _grouped(codes)
    if level is None or level.min() < -8 or level.max() > 7:
        return None
    return torch.cat([_bytes(d), _nibbles(level + 8)], -1).flatten(1)  # [R, G, 18] -> [R, 18 G]


def q4_1(codes: Codes) -> torch.Tensor | None:
    """uint8 [R, 20 C / 32]; the minimum -zero * scale is rounded to float16. None for codes of 8 bits."""
    level, d, zero = _grouped(codes)
    if level is None or codes.bits > 4:
        return None
    minimum = (-zero.float() * d.float()).half()
    return torch.cat([_bytes(d), _bytes(minimum), _nibbles(level + zero.unsqueeze(-1))], -1).flatten(1)  # -> [R, 20 G]


def q8_0(codes: Codes) -> torch.Tensor | None:
    """uint8 [R, 34 C / 32], None where a code less its zero point does not fit int8."""
    level, d, _ = _grouped(codes)
    if level is None or level.min() < -128 or level.max() > 127:
        return None
    return torch.cat([_bytes(d), level.to(torch.int8).view(torch.uint8)], -1).flatten(1)  # [R, G, 34] -> [R, 34 G]


def _grouped(codes: Codes) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(code less zero point int16 [R, C / 32, 32], scale float16, zero int16 [R, C / 32]), no codes unless a block is inside one group."""
    first = codes.group[::BLOCK]  # [C] -> [G]
    d, zero = codes.scale[:, first].half(), codes.zero[:, first].to(torch.int16)  # [R, G]
    fits = codes.run_length() % BLOCK == 0 and bool((torch.isfinite(d) & (d > 0)).all())
    if not fits:
        return None, d, zero
    return codes.codes.to(torch.int16).unflatten(1, (-1, BLOCK)) - zero.unsqueeze(-1), d, zero  # [R, C] -> [R, G, 32]


def _bytes(numbers: torch.Tensor) -> torch.Tensor:
    """float16 [R, G] -> uint8 [R, G, 2]."""
    return numbers.contiguous().unsqueeze(-1).view(torch.uint8)


def _nibbles(levels: torch.Tensor) -> torch.Tensor:
    """0..15 [R, G, 32] -> uint8 [R, G, 16]."""
    low, high = levels.to(torch.uint8).chunk(2, -1)
    return low | (high << 4)
