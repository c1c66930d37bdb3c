"""Which implementation runs an operation.

A backend is a module (or namespace) with the functions of `lowbit.reference` that it implements; what it lacks, the reference runs.
Modules ask for an operation by name at each call, so a backend registered later takes over without touching them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from lowbit import reference

_BACKENDS: dict[str, ModuleType | Any] = {}


def register_backend(device_type: str, operations: ModuleType | Any) -> None:
    """Run `operations`' functions for tensors on `device_type` ("cpu", "cuda"); each must equal the reference's within tolerance."""
    _BACKENDS[device_type] = operations


def operation(name: str, device_type: str) -> Callable:
    """The function that runs `name` on `device_type`: the registered backend's, else the reference's.

    AttributeError if neither has it.
    """
    return getattr(_BACKENDS.get(device_type), name, None) or getattr(reference, name)
