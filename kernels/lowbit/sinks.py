"""Which tokens are attention sinks: the first few that a sequence attends to, which stay out of low bits.

A model parks attention on its first token and gives it activations hundreds of times as large as any other's. A static grid that
covered them would have no step left for the rest, and clipping them changes every later token (arXiv 2410.05265); they are S tokens of
a sequence whatever its length, so a kernel runs their rows apart. Modules that spare sinks do not see positions: whoever runs the
model announces them, and each thread (and greenlet) has its own announcement.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_ROWS: ContextVar[Tensor | None] = ContextVar("sink rows", default=None)


class _Seen:
    """The last announcement of any thread, for graphs of torch.compile, which cannot read context variables; `traced`: one made it."""

    rows: Tensor | None = None
    traced = False


_SEEN = _Seen()


def leading(batch: int, tokens: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """bool [B, T]: the first `count` tokens of windows that begin at their first token and have no padding."""
    return (torch.arange(tokens, device=device) < count).expand(batch, tokens)


def arriving(batch: int, tokens: int, count: int, *, held: int, attended: Tensor | None, device=None) -> Tensor:
    """bool [B, T]: which of T tokens that come after `held` cached ones are among the first `count` their row attends to.

    attended: [B, held + T], nonzero where a token is no padding; None for no padding.
    """
    if attended is None:
        if held >= count:
            return torch.zeros(batch, tokens, dtype=torch.bool, device=device)
        return leading(batch, held + tokens, count, device)[:, held:]
    real = attended.bool()
    return (real & (real.cumsum(1) <= count))[:, -tokens:]


def announce(rows: Tensor | None) -> None:
    """Say which rows bool [B, T] of the activations that follow are sinks; None withdraws it."""
    _SEEN.rows, _SEEN.traced = rows, torch.compiler.is_compiling()
    if not torch.compiler.is_compiling():
        _ROWS.set(rows)


def _announced() -> Tensor | None:
    if torch.compiler.is_compiling():
        return _SEEN.rows
    rows = _ROWS.get()
    return _SEEN.rows if rows is None and _SEEN.traced else rows


@contextmanager
def of_sequences(rows: slice) -> Iterator[None]:
    """Within, what was announced holds for these sequences of the batch only, which run apart."""
    known = _announced()
    announce(None if known is None else known[rows])
    try:
        yield
    finally:
        announce(known)


def sink_rows(x: Tensor) -> Tensor:
    """bool [..., 1]: the rows of x [..., C] that are sinks, in the order announced.

    Raises:
        ValueError: nothing was announced, or for another number of rows.
    """
    rows = _announced()
    if rows is None or rows.numel() != x[..., 0].numel():
        known = "none" if rows is None else f"those of {rows.numel()} tokens"
        raise ValueError(
            f"sinks of {x[..., 0].numel()} tokens are wanted, known are {known}; run the module in its model, or announce()"
        )
    return rows.reshape(x.shape[:-1]).unsqueeze(-1).to(x.device)  # [B, T] -> [..., 1]


def attach(model: nn.Module, count: int) -> list[RemovableHandle]:
    """Make every forward of `model`, the module that owns the blocks, announce its first `count` tokens."""

    def before(module: nn.Module, args, kwargs) -> None:
        source = kwargs.get("input_ids")
        source = kwargs.get("inputs_embeds") if source is None else source
        source = args[0] if source is None else source
        batch, tokens = source.shape[:2]
        past, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        held = 0 if past is None else past.get_seq_length()
        attended = mask if isinstance(mask, Tensor) and mask.shape == (batch, held + tokens) else None
        announce(arriving(batch, tokens, count, held=held, attended=attended, device=source.device))

    return [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(lambda *_: announce(None), always_call=True),
    ]
