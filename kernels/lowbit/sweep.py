"""The inner loop of SparseGPT and GPTQ over one block of columns, by the fastest kernel that the tensors' device has."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch

from lowbit.cpu import native
from lowbit.sweep_reference import sweep_reference


def sweep(
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
    """Prune, quantize or both, column by column, each error moved to the columns after it (SparseGPT, arXiv 2301.00774,
    Alg. 1; GPTQ, arXiv 2210.17323, Alg. 1; both at once: SparseGPT eq. 7).

    Row i of every [b, R] tensor is step i: one column of W, its R rows contiguous. For each i in turn, with w = W1[i]:
    v = 0 where pruned, else w, or level * scale with level = clamp(round_half_even(w / scale), low, high);
    e = w - v; W1[j] -= steps[i, j] e for all j > i. Rows of W do not see each other.

    Args:
        W1: float32 [b, R], used up.
        steps: float32 [b, b], U_ij / U_ii with U the upper Cholesky factor of the inverse Hessian; zero for j <= i.
        mask: bool [b, R], False where pruned.
        keep: (n, m), n < m: at each i that m divides, choose in every row of W which n of the steps i..i+m-1 are kept, by
            the largest W1[j]^2 score[j], the later of two equals, NaN before all; of a last group of t < m steps,
            ceil(n t / m). What `mask` prunes goes first and counts.
        score: float32 [b], read with keep: 1 / U_jj^2.
        scale, low, high: float32 [b, R], all or none.

    Returns:
        values float32 [b, R]: levels when quantizing, else v; never -0.0. kept bool [b, R], None without mask and keep.
        errors float32 [b, R]: e, maybe in W1's memory. NaN passes through to all later steps of its row.

    Raises:
        ValueError: a shape, dtype, device or layout that is not the one above, or a bad keep.
    """
    _check_tensors(W1, steps, mask, scale, low, high)
    if keep is not None:
        _check_keep(keep, score, W1)
    run = _kernel(W1.device.type)
    with torch.no_grad():
        return run(W1, steps, mask=mask, keep=keep, score=score, scale=scale, low=low, high=high)


@cache
def _kernel(device_type: str) -> Callable:
    """The kernel for a device; says once where only the slow loop is left."""
    if device_type == "cpu" and native.library():
        from lowbit.cpu.sweep import sweep as compiled

        return compiled
    if device_type == "cuda" and find_spec("triton"):
        from lowbit.triton.sweep import sweep as fused

        return fused
    mend = {"cpu": "install with a C++ compiler", "cuda": "install triton"}.get(device_type, "none exists")
    warnings.warn(f"lowbit.sweep has no kernel for {device_type} ({mend}): a slow PyTorch loop runs", stacklevel=3)
    return sweep_reference


def _check_tensors(
    W1: torch.Tensor, steps: torch.Tensor, mask: torch.Tensor | None, *grid: torch.Tensor | None
) -> None:
    if W1.dim() != 2:
        raise ValueError(f"W1 must be a matrix [steps, rows of W], got shape {list(W1.shape)}")
    if any(t is None for t in grid) != all(t is None for t in grid):
        missing = [name for name, t in zip(("scale", "low", "high"), grid) if t is None]
        raise ValueError(f"scale, low and high go together: {', '.join(missing)} missing; pass all three or none")
    _check("W1", W1, W1, W1.shape, torch.float32)
    _check("steps", steps, W1, (W1.shape[0], W1.shape[0]), torch.float32)
    _check("mask", mask, W1, W1.shape, torch.bool)
    for name, tensor in zip(("scale", "low", "high"), grid):
        _check(name, tensor, W1, W1.shape, torch.float32)


def _check_keep(keep: tuple[int, int], score: torch.Tensor | None, W1: torch.Tensor) -> None:
    if len(keep) != 2 or not all(isinstance(k, int) for k in keep) or not 0 < keep[0] < keep[1]:
        raise ValueError(f"keep must be whole numbers (n, m) with 0 < n < m, got {keep}")
    if score is None:
        raise ValueError("keep chooses by score: pass score, float32 [steps]")
    _check("score", score, W1, W1.shape[:1], torch.float32)


def _check(
    name: str, tensor: torch.Tensor | None, W1: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if tensor is None:
        return
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"{name} must be {dtype} {list(shape)} for W1 {list(W1.shape)}, got {found}")
    if tensor.device != W1.device:
        raise ValueError(f"{name} is on {tensor.device}, W1 on {W1.device}: move one to the other")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, its strides are {list(tensor.stride())}: call .contiguous()")
