"""What this process holds before a run's tensors come: interpreter, libraries, tokenizer, text."""

from __future__ import annotations

import gc

import lowbit
import torch

import sparsegpt
from ptq.memory import resident_bytes


def resident() -> int:
    """Bytes of memory held now, holes in the heap included, for a run's tensors fit into few of them."""
    gc.collect()
    return resident_bytes()


def touch(*, kmeans: bool) -> None:
    """Bring in code that a run uses and that loads when it is first called: products, factors, kernels, perhaps k-means."""
    x = torch.eye(256)
    lowbit.add_gram(torch.zeros(256, 256, dtype=torch.float64), x)
    sparsegpt.solve(x, sparsegpt.factor(x), pattern=sparsegpt.Pattern(sparsity=0.5), sweep=lowbit.sweep)
    torch.softmax(x, 0)
    if kmeans:
        import sklearn.cluster  # noqa: F401
