"""The keys and values of attention sinks, which a packed cache keeps in full precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Spared:
    """Some columns of a cache. keys, values: [B, H, N, D]. rows: bool [B, N], whose column n is a sink. at: int64 [N], ascending."""

    keys: Tensor
    values: Tensor
    rows: Tensor
    at: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, rows: Tensor, held: int) -> Spared:
        """The columns of new tokens, [B, H, T, D] after `held` cached ones, that are a sink to any row of bool [B, T]."""
        new = rows.any(0).nonzero().flatten()  # [N]
        return cls(keys[:, :, new].clone(), values[:, :, new].clone(), rows[:, new], new + held)

    def append(self, other: Spared) -> Spared:
        """Both; `other` is of later columns."""
        keys, values = (torch.cat([getattr(self, n), getattr(other, n)], dim=2) for n in ("keys", "values"))
        return Spared(keys, values, torch.cat([self.rows, other.rows], dim=1), torch.cat([self.at, other.at]))

    @classmethod
    def of_batches(cls, parts: list[Spared]) -> Spared:
        """Those of several batches as one; a column that a batch lacks is no sink to its rows."""
        at = torch.cat([part.at for part in parts]).unique()
        wide = [part._among(at) for part in parts]
        keys, values, rows = (torch.cat([getattr(part, n) for part in wide]) for n in ("keys", "values", "rows"))
        return cls(keys, values, rows, at)

    def _among(self, at: Tensor) -> Spared:
        """With columns `at` int64 [N'], which include its own."""
        place = torch.searchsorted(at, self.at)

        def widened(t: Tensor, dim: int) -> Tensor:
            shape = list(t.shape)
            shape[dim] = len(at)
            return t.new_zeros(shape).index_copy_(dim, place, t)

        return Spared(widened(self.keys, 2), widened(self.values, 2), widened(self.rows, 1), at)

    def restore(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Decoded keys and values [B, H, all tokens, D], changed in place, with the sinks as they were."""
        rows = self.rows[:, None, :, None]  # [B, N] -> [B, 1, N, 1]
        for decoded, kept in ((keys, self.keys), (values, self.values)):
            decoded[:, :, self.at] = torch.where(rows, kept, decoded[:, :, self.at])
        return keys, values

    def first(self, tokens: int) -> Spared:
        """What belongs to the first `tokens` columns."""
        n = int((self.at < tokens).sum())
        return Spared(self.keys[:, :, :n], self.values[:, :, :n], self.rows[:, :n], self.at[:n])

    def of_rows(self, change) -> Spared:
        """`change` applied to every tensor that has a batch dimension, the first."""
        return Spared(change(self.keys), change(self.values), change(self.rows), self.at)

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values))
