"""A cache layer in the layout of a GPU's kernels, which append to it and attend to it; decoding steps unpack nothing.

Codes are those of `lowbit.cache.PackedCacheLayer`, and what this layer decodes is too, so whatever cannot attend to codes
(several tokens at once, eager attention, masks that are added to scores) sees the same keys and values.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from lowbit import integer, kv_planar
from lowbit.cache import KVGrid, PackedCacheLayer
from lowbit.held import Held
from lowbit.kv_planar import LEAST_TOKENS, PlanarKV


def kind_for(grid: KVGrid, keys: Tensor) -> type[PackedCacheLayer]:
    """The layer that is to hold keys like these [B, H, T, D], and their values."""
    kernels = integer.KERNELS.get(keys.device.type)
    if kernels is None or kernels.cache is None or keys.dtype not in kernels.dtypes or torch.compiler.is_compiling():
        return PackedCacheLayer
    fits = keys.shape[-1] % 8 == 0 and grid.rotary in (None, "half")
    return PlanarCacheLayer if fits and kernels.run_on(keys.device) else PackedCacheLayer


class PlanarCacheLayer(PackedCacheLayer):
    """One layer of a `PackedCache`: `kv` holds the codes, with memory for more tokens; `keys` and `values` are None."""

    def __init__(self, grid: KVGrid):
        super().__init__(grid)
        self.kv: PlanarKV | None = None

    def _begin(self, batch: int, tokens: int) -> None:
        capacity = (tokens // LEAST_TOKENS + 1) * LEAST_TOKENS
        self.kv = PlanarKV.empty(self.grid, batch, self.device, capacity)

    def get_seq_length(self) -> int:
        """How many tokens are held."""
        return 0 if self.kv is None else self.kv.length

    @property
    def bytes(self) -> int:
        """Bytes of the tokens held, sinks among them; not of memory for more."""
        if self.kv is None:
            return 0
        rows = sum(plane[:, :, : self.kv.length].numel() for plane in (*self.kv.keys, *self.kv.values))
        return rows + (0 if self.spared is None else self.spared.bytes)

    def _append(self, keys: Tensor, values: Tensor, held: int) -> None:
        new = tuple(t[:, held:] for t in self._turn())
        # A graph being compiled has the reference operations.
        append = kv_planar.append if torch.compiler.is_compiling() else self._kernels().kv_append
        append(self.kv, keys.detach(), values.detach(), *new)

    def _seen(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """One token at a time they are decoded only if something looks."""
        return self.decoded() if new.shape[-2] != 1 or torch.compiler.is_compiling() else Held.both(self, new)

    def _codes_decoded(self) -> tuple[Tensor, Tensor]:
        keys, values = kv_planar.decoded(self.kv, torch.float32)
        return keys.to(self.dtype), values.to(self.dtype)

    def attend(self, query: Tensor, mask: Tensor | None, **how) -> Tensor:
        """`lowbit.kv_planar.attention_decode` of query [B, Hq, D] over all tokens held."""
        return self._kernels().attention_decode(query, self.kv, *self._turn(), mask=mask, spared=self.spared, **how)

    def _turn(self) -> tuple[Tensor, ...]:
        """Cosines and sines of all tokens on this layer's device, () without rotary; layers on other devices share the tables."""
        if self.grid.rotary is None:
            return ()
        return self.rotation.cos.to(self.device), self.rotation.sin.to(self.device)

    def _kernels(self):
        return import_module(integer.KERNELS[self.device.type].cache)

    def reset(self) -> None:
        """Forget every token and the rotation they shared."""
        super().reset()
        self.kv = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; the count is negative, as transformers asks."""
        if tokens_to_remove >= 0 or self.kv is None:
            return super().crop(tokens_to_remove)  # nothing to do, or its error
        self.kv.length = max(0, self.kv.length + tokens_to_remove)
        self._crop_spared()

    def _transform_codes(self, change) -> None:
        self.kv.keys, self.kv.values = (tuple(map(change, planes)) for planes in (self.kv.keys, self.kv.values))
