"""Some of the tokens that pass a site, for what ranges do not tell."""

from __future__ import annotations

import torch

from ptq import distributed

# Of a calibration set, about this many tokens show the distribution of a channel as well as all do.
TOKENS = 1024


class Sample:
    """Every `every`-th token of each micro-batch."""

    def __init__(self, every: int):
        self.every = every
        self.parts: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        """Look at x [T, C]."""
        self.parts.append(x[:: self.every].float())

    def take(self, channels: int, device: torch.device) -> torch.Tensor:
        """float32 [S, C], the tokens of all processes in the order of the micro-batches, whichever process ran them."""
        if distributed.size() == 1:
            return torch.cat(self.parts) if self.parts else torch.zeros(0, channels, device=device)
        counts = torch.tensor([len(self.parts), max((len(p) for p in self.parts), default=0)])
        batches, most = distributed.extremes(counts, counts)[1].tolist()
        slots = torch.zeros(batches, distributed.size(), most, channels, device=device)
        filled = torch.zeros(batches, distributed.size(), most, device=device)
        for i, part in enumerate(self.parts):
            slots[i, distributed.rank(), : len(part)] = part
            filled[i, distributed.rank(), : len(part)] = 1
        return distributed.total(slots)[distributed.total(filled) > 0]  # [batches, processes, most, C] -> [S, C]


def every_of(tokens: int) -> int:
    """One of how many tokens to keep, of `tokens` in all."""
    return max(1, tokens // TOKENS)
