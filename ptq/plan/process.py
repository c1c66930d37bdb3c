"""What this process holds before a run's tensors come: interpreter, libraries, tokenizer, text."""

from __future__ import annotations

import gc
from pathlib import Path

import lowbit
import torch

import sparsegpt
from ptq.report import peak_bytes

STATUS = Path("/proc/self/status")


def resident() -> int:
    """Bytes of memory held now, holes in the heap included, for a run's tensors fit into few of them; elsewhere than on Linux the peak."""
    gc.collect()
    return _kilobytes("VmRSS") if STATUS.is_file() else peak_bytes()


def highest() -> int:
    """Most bytes of memory that this process has held. Linux's `ru_maxrss` begins with what the parent held, this does not."""
    return _kilobytes("VmHWM") if STATUS.is_file() else peak_bytes()


def touch(*, kmeans: bool) -> None:
    """Bring in code that a run uses and that loads when it is first called: products, factors, kernels, perhaps k-means."""
    x = torch.eye(256)
    lowbit.add_gram(torch.zeros(256, 256, dtype=torch.float64), x)
    sparsegpt.solve(x, sparsegpt.factor(x), pattern=sparsegpt.Pattern(sparsity=0.5), sweep=lowbit.sweep)
    torch.softmax(x, 0)
    if kmeans:
        import sklearn.cluster  # noqa: F401


def _kilobytes(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])
