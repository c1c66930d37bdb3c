"""A model of decoding speed: bytes that a step must read over the bandwidth of memory, or its products over the machine's arithmetic.

The roofline as FlexGen (arXiv 2303.06865) and Pope et al. (arXiv 2211.05102) count it: weights are read once for the whole batch, keys and
values for each sequence. It leaves out everything else, so a measured speed (`ptq bench`) lies below.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

READ_BYTES = 128 << 20  # well above a cache
SECONDS = 0.2


@dataclass(frozen=True)
class Machine:
    """bandwidth: bytes a second that a sum over a large tensor reads. arithmetic: float32 multiplications a second of a matrix product."""

    bandwidth: float
    arithmetic: float


def measure(device: torch.device) -> Machine:
    """The best of repeated short trials, half a second in all."""
    x = torch.ones(READ_BYTES // 4, device=device)
    n = 1024 if device.type == "cpu" else 4096
    a = torch.ones(n, n, device=device)
    return Machine(x.nbytes / _fastest(x.sum, device), n**3 / _fastest(lambda: a @ a, device))


def _fastest(run: Callable, device: torch.device) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


@dataclass(frozen=True)
class Step:
    """What decoding one token of each of `batch` sequences reads, in bytes, and its multiplications."""

    batch: int
    weights: float
    keys_values: float
    activations: float
    multiplications: float


@dataclass(frozen=True)
class Speed:
    """tokens_per_second: of all sequences. shares: of the bytes, by kind. bound: "memory" or "arithmetic"."""

    tokens_per_second: float
    shares: dict[str, float]
    bound: str


def speed(step: Step, machine: Machine) -> Speed:
    """What the roofline allows."""
    parts = {"weights": step.weights, "keys and values": step.keys_values, "activations": step.activations}
    total = sum(parts.values())
    reading, computing = total / machine.bandwidth, step.multiplications / machine.arithmetic
    return Speed(
        tokens_per_second=step.batch / max(reading, computing),
        shares={name: part / total for name, part in parts.items()},
        bound="memory" if reading >= computing else "arithmetic",
    )


def pays(found: Speed) -> str:
    """Which bits buy speed at this batch and context."""
    if found.bound == "arithmetic":
        return "arithmetic sets the pace: activation bits, on kernels that multiply integers, not weight or cache bits"
    largest = max(found.shares, key=found.shares.get)
    return f"{largest} are {found.shares[largest]:.0%} of the bytes read: their bits pay most"
