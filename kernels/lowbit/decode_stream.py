"""Native decoding through blocks of which only a few have their tensors at a time: one native call a block."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor, nn

from lowbit.cpu import decode as cpu
from lowbit.decode import CannotStep, Decoder, Roles, Seat, Shape
from lowbit.decode_blocks import block_of


class StreamedDecoder(Decoder):
    """A `Decoder` that computes the same, and asks for each block before it runs it.

    visit: called with a block's number; within the context it returns, that block's tensors are there and `read` has seen them.

    Raises:
        ValueError: why these blocks cannot run natively, as far as can be told without their tensors.
    """

    def __init__(
        self,
        blocks: list[nn.Module],
        roles: Roles,
        shape: Shape,
        *,
        visit: Callable[[int], AbstractContextManager],
    ):
        self._modules, self._visit = blocks, visit
        self._there: dict[int, tuple[cpu.Block, list[Tensor]]] = {}
        self._why_not: str | None = None
        super().__init__(blocks, roles, shape)

    def _read(self, blocks: list[nn.Module]) -> None:
        """Nothing yet: the tensors come later."""

    def read(self, i: int) -> None:
        """Read what block i computes; its tensors are there. May run on another thread than the steps."""
        keep: list[Tensor] = []
        try:
            self._there[i] = block_of(self._modules[i], self.roles, self.shape, keep), keep
        except ValueError as error:
            self._why_not = f"block {i}: {error}"

    def forget(self, i: int) -> None:
        """Let go of the tensors of block i."""
        self._there.pop(i, None)

    def obstacle(self, *args, **kwargs) -> str | None:
        """As of `Decoder`; a block that cannot run natively stands in the way of every step once it has been read."""
        return self._why_not or super().obstacle(*args, **kwargs)

    def seat_for_one(self, *args, **kwargs) -> Seat | None:
        """As of `Decoder`; None where a block that was read cannot run natively."""
        return None if self._why_not else super().seat_for_one(*args, **kwargs)

    def _pass(self, steps: list[cpu.Step], path: str, *, memory: Tensor | None = None) -> None:
        """All steps through a block before the next is asked for. `memory` was sized when no block had been read."""
        for i in range(len(self.layers)):
            with self._visit(i):
                if i not in self._there:
                    raise CannotStep(f"no native step: {self._why_not}; run the blocks")
                block = cpu.Block.from_buffer_copy(self._there[i][0])
                for step in steps:
                    block.cache = step.block[i].cache
                    one = cpu.Step.from_buffer_copy(step)
                    one.blocks, one.block = 1, ctypes.pointer(block)
                    one.end = step.end if i == len(self.layers) - 1 else None
                    cpu.run(one, cpu.scratch(one), path=path)
