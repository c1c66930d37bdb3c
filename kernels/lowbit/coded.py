"""What a norm gives the linears behind it on a GPU: codes, made once for all of them, in the place of numbers that each would round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lowbit.lazy import Lazy
from lowbit.planar_reference import Quantized


class Coded(Lazy):
    """The output [..., C] of a norm whose quantizer acts in linears: `codes` of its rows [T, C] by that `quantizer`.

    The numbers before they are rounded are computed only if something looks.
    """

    codes: Quantized
    quantizer: Any
    numbers: Callable[[], Tensor]

    @classmethod
    def of(cls, codes: Quantized, quantizer, numbers: Callable[[], Tensor], like: Tensor) -> Coded:
        """In the shape and dtype of `like`, which the norm was given."""
        new = cls.empty_like(tuple(like.shape), like)
        new.codes, new.quantizer, new.numbers = codes, quantizer, numbers
        return new

    def made(self) -> Tensor:
        """The norm's output, as it is."""
        return self.numbers()
