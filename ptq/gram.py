"""H = sum x x^T over the tokens that reach a linear, accumulated one half at a time."""

from __future__ import annotations

import lowbit
import torch
from lowbit.gram import panels

from ptq import distributed


class Gram:
    """Sum of x x^T, float32 [C, C], and the number of tokens; only the upper half is computed (arXiv 2301.00774, section 3.2).

    The sum is scaled nowhere: what uses H is indifferent to its scale. Each `add` makes float32 products, which are summed in float64:
    29 bits to spare make the sum of a few dozen exact, so that H does not depend on which process adds what.
    """

    def __init__(self, channels: int, device: torch.device):
        self.upper = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Add the tokens of x [..., C]."""
        x = x.reshape(-1, x.shape[-1]).float()  # [..., C] -> [T, C]
        self.tokens += x.shape[0]
        lowbit.add_gram(self.upper, x)

    def take(self) -> tuple[torch.Tensor, int]:
        """(H, tokens) of all processes, which take together; H symmetric to the last bit. Uses up the accumulator."""
        upper, self.upper = self.upper, None
        H = torch.empty_like(upper, dtype=torch.float32)
        for columns in panels(H.shape[0]):
            H[: columns.stop, columns] = distributed.total(upper[: columns.stop, columns])
            block = H[columns, columns]
            block.copy_(block.triu() + block.triu(1).t())
            H[columns, : columns.start] = H[: columns.start, columns].t()
        return H, int(distributed.total(torch.tensor(self.tokens)))


class Drift:
    """Sum of (x - xhat) xhat^T, float32 [C, C]: how far the inputs xhat of a linear have drifted from full precision's x.

    Summed over the calls of `add` in float64, as H is.
    """

    def __init__(self, channels: int, device: torch.device):
        self.sum = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def add(self, xhat: torch.Tensor, x: torch.Tensor) -> None:
        """Add the tokens of xhat [..., C], which are those of x [..., C]."""
        xhat, x = (t.reshape(-1, t.shape[-1]).float() for t in (xhat, x))  # [..., C] -> [T, C]
        self.sum += (x - xhat).t() @ xhat

    def take(self) -> torch.Tensor:
        """The sum over all processes, which take together."""
        return distributed.total(self.sum).float()
