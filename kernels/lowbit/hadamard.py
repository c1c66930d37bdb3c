"""Block Hadamard transforms: each run of n channels is turned by H / sqrt(n), which spreads an outlier over its run."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

DENSE = 128  # the largest matrix that is multiplied whole


def rotate(x: Tensor, block: int) -> Tensor:
    """x [..., C] times diag(H, ..., H), H the block's normalized Hadamard matrix: orthogonal, so (x H)(w H)^T = x w^T.

    Computed in float32 (C log2(block) additions a token where block is a power of two), returned in x's dtype.
    Raises ValueError if block does not divide C, or if no Hadamard matrix of that order is known here (see `largest_block`).
    """
    if block < 1 or x.shape[-1] % block or largest_block(block) != block:
        raise ValueError(f"blocks of {block} do not fit {x.shape[-1]} channels; use {largest_block(x.shape[-1])}")
    y = x.float().unflatten(-1, (-1, block))  # [..., C] -> [..., C/n, n]
    return (_turned(y) / block**0.5).flatten(-2).to(x.dtype)  # [..., C/n, n] -> [..., C]


def additions(channels: int, block: int) -> int:
    """Additions that `rotate` takes a token at best: C (log2 a + m - 1) for blocks of a m, a = 2^k, m = 1 or an order of Paley's."""
    m = block
    while m % 2 == 0 and _known(m // 2):
        m //= 2
    return channels * ((block // m).bit_length() - 1 + m - 1)


def _turned(x: Tensor) -> Tensor:
    """x [..., n] times H_n, which is H_a (x) H_b for n = a b and a a power of two: two small products where n is large."""
    n = x.shape[-1]
    a = 1
    while n // a > DENSE and n // a % 2 == 0 and _known(n // a // 2):
        a *= 2
    y = x.unflatten(-1, (a, n // a)) @ _hadamard(n // a).to(x.device)  # [..., n] -> [..., a, b]
    return y.flatten(-2) if a == 1 else _turned(y.mT).mT.flatten(-2)  # [..., b, a] -> [..., a, b] -> [..., n]


@lru_cache(maxsize=64)
def largest_block(channels: int) -> int:
    """The largest divisor of `channels` of which `rotate` has a matrix: 2^k, or 2^k times an order of Paley's constructions."""
    return next(n for n in range(channels, 0, -1) if channels % n == 0 and _known(n))


def _known(n: int) -> bool:
    return n == 1 or _is_paley(n) or (n % 2 == 0 and _known(n // 2))


def _is_paley(n: int) -> bool:
    return n % 4 == 0 and n <= DENSE and (_is_prime(n - 1) or (n % 8 == 4 and _is_prime(n // 2 - 1)))


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


@lru_cache(maxsize=16)
def _hadamard(n: int) -> Tensor:
    """Float32 [n, n] of 1 and -1 with orthogonal rows: by Sylvester's doubling down to 1 or, where n has none, to a Paley order."""
    if n == 1:
        return torch.ones(1, 1)
    if n & (n - 1) and _is_paley(n):
        return _paley(n)
    H = _hadamard(n // 2)
    return torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])


def _paley(n: int) -> Tensor:
    """Paley's matrix (J. Math. Phys. 12, 1933): his first construction for a prime n - 1 = 3 mod 4, else the second, n/2 - 1 = 1 mod 4."""
    first = _is_prime(n - 1)
    q = n - 1 if first else n // 2 - 1
    squares = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
    i = torch.arange(q)
    C = torch.ones(q + 1, q + 1)
    C[0, 0] = 0
    C[1:, 1:] = chi[(i[:, None] - i) % q]
    if first:
        C[1:, 0] = -1
        return C + torch.eye(q + 1)
    return torch.kron(C, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) + torch.kron(
        torch.eye(q + 1), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    )
