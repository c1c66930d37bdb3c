"""Tensors whose numbers are made when an operation asks for them, so that who knows a shorter way to the result can take it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Lazy(Tensor):
    """A tensor of known shape, dtype and device without memory: every operation on it is one on `made()`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def empty_like(cls, shape: tuple[int, ...], like: Tensor) -> Any:
        """One of this shape, of the dtype and on the device of `like`."""
        return Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    @abstractmethod
    def made(self) -> Tensor:
        """The numbers, in a plain tensor."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Lazy, lambda lazy: lazy.made(), (args, kwargs or {}))
        return func(*args, **kwargs)
