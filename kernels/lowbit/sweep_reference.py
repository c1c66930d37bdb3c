"""The column sweep of SparseGPT and GPTQ over one block, one step at a time in plain PyTorch: it defines what every kernel must equal."""

from __future__ import annotations

import torch


def sweep_reference(
    W1: torch.Tensor,
    steps: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    keep: tuple[int, int] | None = None,
    score: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    low: torch.Tensor | None = None,
    high: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """`lowbit.sweep` for checked tensors on any device; W1 is used up."""
    values, errors = torch.empty_like(W1), torch.empty_like(W1)
    kept = None
    if mask is not None or keep is not None:
        kept = torch.ones_like(W1, dtype=torch.bool) if mask is None else mask.clone()
    for i, w in enumerate(W1.unbind(0)):
        if keep is not None and i % keep[1] == 0:
            group = slice(i, i + keep[1])
            kept[group] = _choose(W1[group].square() * score[group, None], kept[group], *keep)
        value = w if scale is None else torch.clamp(torch.round(w / scale[i]), low[i], high[i])
        if kept is not None:
            value = value.where(kept[i], 0)
        torch.sub(w, value if scale is None else value * scale[i], out=errors[i])
        torch.add(value, 0.0, out=values[i])  # -0 + 0 is +0
        W1[i + 1 :] -= steps[i, i + 1 :, None] * errors[i]  # [b - i - 1, R]
    return values, kept, errors


def _choose(scores: torch.Tensor, alive: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Keep ceil(n t / m) of a group's t <= m steps in each row, the later of two equal scores; bool [t, R] from [t, R]."""
    pruned = scores.shape[0] - -(-n * scores.shape[0] // m)
    order = torch.argsort(scores.masked_fill(~alive, -1), dim=0, stable=True)
    return alive.scatter(0, order[:pruned], False)
