"""Where cached tokens lie, and how they are rotated: what the layers of a cache (`lowbit.cache`) share."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Space:
    """What layers hold and how it rotates, with space behind: the first `tokens` are taken.

    held: [layers, 2, B, H, capacity, bytes]. cos, sin: [B or 1, capacity, R/2], None without rotary.
    """

    held: Tensor
    tokens: int
    cos: Tensor | None = None
    sin: Tensor | None = None

    def turned(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the tokens: [B or 1, tokens, R/2] each."""
        return self.cos[:, : self.tokens], self.sin[:, : self.tokens]

    def view(self, place: int, which: int) -> Tensor:
        """The keys (0) or values (1) of the layer at `place`: [B, H, tokens, bytes]."""
        return self.held[place, which, :, :, : self.tokens]


class Rotation:
    """Cosines and sines [B or 1, T, R/2] of every cached token, for all layers that rotate alike.

    As a layer's keys they may be kept in a `space`, until they are set.
    """

    def __init__(self, source: Tensor):
        self.source = weakref.ref(source)  # names the rotation while the first forward binds layers to it
        self._own: tuple[Tensor | None, Tensor | None] = (None, None)
        self.space: Space | None = None

    @property
    def cos(self) -> Tensor | None:
        return self._own[0] if self.space is None else self.space.turned()[0]

    @property
    def sin(self) -> Tensor | None:
        return self._own[1] if self.space is None else self.space.turned()[1]

    def put(self, cos: Tensor, sin: Tensor) -> None:
        """Hold these tables."""
        self._own, self.space = (cos, sin), None

    def keep_in(self, space: Space) -> None:
        """Show the tables of a space from now on."""
        self._own, self.space = (None, None), space

    def __getstate__(self) -> dict:
        """A copy has tables of its own."""
        return {**vars(self), "_own": (self.cos, self.sin), "space": None}

    def __len__(self) -> int:
        if self.space is not None:
            return self.space.tokens
        return 0 if self.cos is None else self.cos.shape[1]

    def append(self, cos: Tensor, sin: Tensor) -> None:
        """Add the rotation of new tokens, [B or 1, T, R/2] each."""
        self.put(*(_append_rows(old, new) for old, new in ((self.cos, cos), (self.sin, sin))))

    def transform(self, change) -> None:
        """Replace both tables by `change(table)`."""
        if self.cos is not None:
            self.put(change(self.cos), change(self.sin))


def _append_rows(old: Tensor | None, new: Tensor) -> Tensor:
    """Concatenate [B or 1, T, R/2] tables over tokens; a row that serves the whole batch is repeated if needed."""
    if old is None:
        return new.clone()  # `new` may be a view of a table twice as wide
    batch = max(old.shape[0], new.shape[0])
    return torch.cat([t.expand(batch, -1, -1) for t in (old, new)], dim=1)
