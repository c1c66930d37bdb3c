"""One run on several processes, started by torchrun: calibration shared out, statistics summed, rows of the weights solved apart.

    torchrun --nproc-per-node 4 -m ptq prune MODEL --out DIR --sparsity 0.5

Every process reads the text and the weights, runs its own micro-batches, and solves its own rows of each linear; all of them then hold the
whole block. The first writes and prints; each keeps its own activations, so OUT must lie where all can write. Without torchrun each
function here is what one process needs: nothing.

What does not depend on the number of processes: micro-batches (their shape is that of one process), ranges (extremes), H of equal inputs
(float64 sums of float32 products, exact but for entries that differ 2^24-fold between micro-batches), its factor, the number of zeros of
each linear, and the choice among equal scores. Products of fewer rows may round otherwise, so a solve gives the same weights to float32
rounding times H's condition, and the same masks and codes but where scores or levels are that near. Refinement that stops before it
converges may stop elsewhere, where the layer error is as low. The same number of processes gives the same bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ptq.errors import BadInput, LostProcess

# How long one process may work while another waits for it: the micro-batches of a block, or the writing of a shard.
PATIENCE = timedelta(minutes=30)
FAILED = "ptq failed"  # a counter of the processes that failed
CODE = "ptq exit code"  # of the first of them

_store: dist.Store | None = None


def start() -> None:
    """Meet the other processes of torchrun's environment, before anything else of a run.

    Raises:
        BadInput: an environment that is not torchrun's, or nobody there.
    """
    global _store
    try:
        _store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=_store, rank=number, world_size=count, timeout=PATIENCE)
    except (RuntimeError, ValueError) as err:
        found = " ".join(str(err).split())[:200]
        raise BadInput(f"the processes did not meet: {found}; start them with torchrun --nproc-per-node N") from err


def stop() -> None:
    """Part from the others after a run that went well on all of them."""
    if size() > 1:
        wait()
        dist.destroy_process_group()


def size() -> int:
    """Processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This one's number; number 0 writes and prints."""
    return dist.get_rank() if size() > 1 else 0


def fail(code: int) -> tuple[bool, int]:
    """Say that this process ends with exit `code`: (whether it is the first to, and so the one to tell why; the first's code)."""
    if _store is None:
        return True, code
    try:
        if _store.add(FAILED, 1) == 1:
            _store.set(CODE, str(code))
            return True, code
        _store.wait([CODE], timedelta(seconds=5))
        return False, int(_store.get(CODE))
    except RuntimeError:  # whoever kept the store is gone, and has told
        return False, code


def own_device(device: str) -> str:
    """The device of this process: of several, each takes the GPU of its number. Raises BadInput where there are too few."""
    number, there = int(os.environ.get("LOCAL_RANK", rank())), torch.cuda.device_count()
    if size() == 1 or there == 0 or not device.startswith(("auto", "cuda")):
        return device
    if device not in ("auto", "cuda"):
        raise BadInput(f"--device {device}: {size()} processes would share it; use --device cuda, each takes its own")
    if number >= there:
        raise BadInput(f"{there} GPUs for more processes than that; lower --nproc-per-node to {there}")
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def mine(items: list[Any]) -> list[Any]:
    """Every size()-th of `items`, this process's."""
    return items[rank() :: size()]


def wait() -> None:
    """Until all are here."""
    total(torch.zeros(1))


def total(x: torch.Tensor) -> torch.Tensor:
    """Sum of all processes' x, which has one shape, dtype and kind of device everywhere. The same bytes in all of them."""
    return _reduced(x, dist.ReduceOp.SUM)


def extremes(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least of all processes' `low` and the greatest of their `high`, elementwise."""
    return _reduced(low, dist.ReduceOp.MIN), _reduced(high, dist.ReduceOp.MAX)


def differing(facts: dict[str, str]) -> list[str]:
    """The keys of `facts` whose values are not the same in all processes."""
    digests = [hashlib.sha256(facts[key].encode()).digest()[:8] for key in sorted(facts)]
    numbers = torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])
    low, high = extremes(numbers, numbers)
    return [key for key, equal in zip(sorted(facts), (low == high).tolist()) if not equal]


def share(rows: int) -> slice:
    """Which of `rows` rows this process solves: contiguous, in the order of the processes, near-equal."""
    return slice(rows * rank() // size(), rows * (rank() + 1) // size())


def whole(x: torch.Tensor, rows: int) -> torch.Tensor:
    """All `rows` rows from every process's `share` of them: [r, C] -> [rows, C], bit for bit."""
    if size() == 1:
        return x
    data = x.contiguous().view(torch.uint8)  # [r, C] -> [r, bytes]
    padded = data.new_zeros(-(-rows // size()), data.shape[1])
    padded[: x.shape[0]] = data
    parts = [torch.empty_like(padded) for _ in range(size())]
    _together(dist.all_gather, parts, padded)
    counts = [rows * (r + 1) // size() - rows * r // size() for r in range(size())]
    found = torch.cat([part[:count] for part, count in zip(parts, counts)])  # [rows, bytes]
    return found.view(x.dtype)  # [rows, C]


def lowest(score: torch.Tensor, count: int) -> torch.Tensor:
    """`sparsegpt.lowest` over the rows of all processes: each has its `share` of a score [b, R], float32, not NaN.

    `count` smallest of the whole, ties by step and then by row, as bool [b, r] for the rows that are here. A radix search: the bits of a
    float, seen as an ordered integer, are fixed in four passes of 256 bins, whose counts are all that the processes exchange.
    """
    chosen = torch.zeros_like(score, dtype=torch.bool)
    if count <= 0:
        return chosen
    bits = (score + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are one value
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as signed integers these ascend with the score
    left, candidates, threshold = count, ordered.flatten(), 0
    for shift in (24, 16, 8, 0):
        digit = ((candidates >> shift) & 0xFF) ^ (0x80 if shift == 24 else 0)  # the highest carries the sign
        upto = total(torch.bincount(digit, minlength=256)).cumsum(0).cpu()
        if left >= int(upto[-1]) and shift == 24:
            return ~chosen
        found = int(torch.searchsorted(upto, left))
        below = int(upto[found - 1]) if found else 0
        left, equal = left - below, int(upto[found]) - below
        candidates = candidates[digit == found]
        threshold = threshold << 8 | found
    threshold -= 1 << 31  # the sign's bit was flipped: back to a signed integer
    if left == equal:
        return ordered <= threshold
    tied = ordered == threshold
    return (ordered < threshold) | (tied & (_place(tied) < left))


def _place(tied: torch.Tensor) -> torch.Tensor:
    """How many of all processes' `tied` [b, R] come before each entry, by step and then by row: int64 [b, r] for the rows that are here."""
    counts = tied.new_zeros(size(), tied.shape[0], dtype=torch.int64)
    counts[rank()] = tied.sum(1)
    counts = total(counts)  # [processes, b]
    steps = counts.sum(0)  # [b]
    before = steps.cumsum(0) - steps + counts[: rank()].sum(0)  # [b]
    return before[:, None] + tied.cumsum(1) - 1


def _reduced(x: torch.Tensor, how: Any) -> torch.Tensor:
    if size() == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    _together(dist.all_reduce, x, how)
    return x


def _together(collective: Callable, *args: Any) -> None:
    try:
        collective(*args)
    except RuntimeError as err:
        minutes = PATIENCE.seconds // 60
        raise LostProcess(f"another process of this run ended, or was silent for {minutes} minutes") from err
