"""Dense little-endian packing of 2, 3, 4 and 8-bit codes.

Element i of a row occupies bits i*bits .. i*bits + bits - 1 of the row's bit stream, least significant bit first; bit j
of the stream is bit j % 8 of byte j // 8. Rows start on a byte, the unused high bits of their last byte are zero.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

PACKABLE_BITS = (2, 3, 4, 8)


def packed_length(length: int, bits: int) -> int:
    """Bytes that `length` codes of `bits` bits take in one packed row.

    Raises:
        ValueError: `bits` is not packable or `length` is negative.
    """
    if bits not in PACKABLE_BITS:
        raise ValueError(f"cannot pack {bits}-bit codes; choose one of {PACKABLE_BITS}")
    if length < 0:
        raise ValueError(f"length {length} is negative; pass the number of codes in a row")
    return -(-length * bits // 8)


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """Codes and bytes in the smallest group that ends on a byte, and a dtype that holds the group."""
    common = math.gcd(8, bits)
    codes, octets = 8 // common, bits // common
    return codes, octets, torch.uint8 if octets == 1 else torch.int32


def _grouped(rows: Tensor, size: int) -> Tensor:
    """[..., K] -> [..., ceil(K/size), size], the last group filled with zeros."""
    groups = -(-rows.shape[-1] // size)
    return pad(rows, (0, groups * size - rows.shape[-1])).unflatten(-1, (groups, size))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack the last dimension of `codes` into bytes.

    Args:
        codes: uint8 [..., K], each code below 2**bits; any leading dimensions, any K, also 0. A meta tensor gives
            the shape of the result.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 [..., ceil(K*bits/8)], contiguous, on the device of `codes`.

    Raises:
        ValueError: wrong dtype, a scalar, unpackable bits, or a code that does not fit.
    """
    if codes.dtype != torch.uint8 or codes.dim() == 0:
        raise ValueError(
            f"codes are {codes.dtype} of shape {tuple(codes.shape)}; pass uint8 with at least one dimension"
        )
    length = packed_length(codes.shape[-1], bits)
    if bits < 8 and codes.numel() and not codes.is_meta and (largest := int(codes.max())) >= 2**bits:
        raise ValueError(f"code {largest} does not fit in {bits} bits; clamp codes to 0..{2**bits - 1} before packing")
    per_word, octets, dtype = _word(bits)
    grouped = _grouped(codes, per_word).to(dtype)  # [..., W, per_word]
    word = grouped[..., 0].clone()
    for i in range(1, per_word):
        word |= grouped[..., i] << (i * bits)
    stream = torch.stack([(word >> (8 * j)) & 255 for j in range(octets)], dim=-1)  # [..., W, octets]
    return stream.to(torch.uint8).flatten(-2)[..., :length].contiguous()


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of `pack`.

    Args:
        packed: uint8 [..., ceil(length*bits/8)].
        bits: 2, 3, 4 or 8.
        length: codes in a row, K.

    Returns:
        uint8 [..., length], contiguous.

    Raises:
        ValueError: wrong dtype, unpackable bits, or a row of bytes that does not hold exactly `length` codes.
    """
    expected = packed_length(length, bits)
    if packed.dtype != torch.uint8 or packed.dim() == 0 or packed.shape[-1] != expected:
        raise ValueError(
            f"packed is {packed.dtype} of shape {tuple(packed.shape)}; "
            f"{length} codes of {bits} bits are uint8 rows of {expected} bytes"
        )
    per_word, octets, dtype = _word(bits)
    grouped = _grouped(packed, octets).to(dtype)  # [..., W, octets]
    word = grouped[..., 0].clone()
    for j in range(1, octets):
        word |= grouped[..., j] << (8 * j)
    codes = torch.stack([(word >> (i * bits)) & (2**bits - 1) for i in range(per_word)], dim=-1)  # [..., W, per_word]
    return codes.to(torch.uint8).flatten(-2)[..., :length].contiguous()
