"""The plain decoding step of a transformers model: one token a sequence, no padding, on a cache that its decoder knows.

The model's own Python around the blocks finds out anew at every step that there is nothing to mask, and how the next position rotates,
while the weights that stream by leave none of its code in the processor's caches. A plain step runs what is left of it: the embedding,
one native pass and the last norm; or, where the output head runs on integer kernels too, one native pass up to the logits. Every other
step is run by the model's own `forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from lowbit.decode import CannotStep, Decoder, Seat, Turn
from lowbit.modules import Linear

KNOWN = {
    *("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache"),
    *("return_dict", "output_hidden_states", "output_attentions"),
}
STEADY = ("default", "linear", "yarn", "llama3")  # rotary tables that do not depend on how long the sequence is
AT_ONCE = 512  # positions whose rotation is computed at a time


class _Restore:
    """A handle whose `remove()` gives a module back the forward of its class."""

    def __init__(self, owner: nn.Module):
        self.owner = owner

    def remove(self) -> None:
        vars(self.owner).pop("forward", None)


def attach_plain(model: nn.Module, owner: nn.Module, decoder: Decoder) -> list[_Restore]:
    """Let plain steps run without the rest of the forward of `owner`, the module of `model` that owns the decoder's blocks, and of `model`.

    Returns:
        handles that undo this; none for modules that are of no known class, or have a forward of their own.
    """
    make = STARTS.get(type(owner).__name__)
    if make is None or "forward" in vars(owner):
        return []
    start = make()

    def states(owner: nn.Module, kwargs: dict) -> BaseModelOutputWithPast | None:
        begun = _begin(owner, decoder, start, kwargs)
        if begun is None:
            return None
        cache, seat, hidden, turn = begun
        return BaseModelOutputWithPast(start.end(owner, decoder.step_on(cache, seat, hidden, turn)), cache)

    handles = [_attach(owner, states)]
    path = BASES.get(type(model).__name__)
    if path is None or model.get_submodule(path) is not owner or "forward" in vars(model):
        return handles
    try:
        end = _End(model, path, decoder, start)
    except ValueError:
        return handles
    return [*handles, _attach(model, end.logits)]


def _attach(module: nn.Module, plain: Callable[[nn.Module, dict], ModelOutput | None]) -> _Restore:
    """Let plain(module, arguments), to which the arguments belong, answer calls of the module's forward that it does not answer by None."""
    forward = type(module).forward

    @wraps(forward)
    def plain_or_not(self, *args, **kwargs):
        output, known = None, len(args) < (1 if "input_ids" in kwargs else 2)
        if known and not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
            try:
                output = plain(self, {"input_ids": args[0], **kwargs} if args else dict(kwargs))
            except CannotStep:
                pass
        return forward(self, *args, **kwargs) if output is None else output

    module.forward = MethodType(plain_or_not, module)  # type: ignore[method-assign]  # a copy of the model binds it to itself
    return _Restore(module)


class _End:
    """Logits by the native pass of `decoder`, for as long as norm and head are what they are now, and no new hook wants what is left out.

    path: of the module that owns the blocks. Raises ValueError where norm or head cannot run natively.
    """

    def __init__(self, model: nn.Module, path: str, decoder: Decoder, start: _Rotated | _Learned):
        self.decoder, self.start, self.path = decoder, start, path
        owner, self.head = model.get_submodule(path), model.lm_head
        self.norm, self.hooks = start.norm_of(owner), _hooks(owner)
        if self.norm is None or not isinstance(self.head, Linear):
            raise ValueError("other modules make logits than a norm and a packed head")
        decoder.end_with(self.norm, self.head)
        self.planar = self.head.planar

    def logits(self, model: nn.Module, kwargs: dict) -> CausalLMOutputWithPast | None:
        """What the model returns for a plain step; None if this is none. Takes out of `kwargs` what is the model's own."""
        labels, keep = kwargs.pop("labels", None), kwargs.pop("logits_to_keep", 0)
        if labels is not None or not isinstance(keep, int) or keep < 0:
            return None
        owner = model.get_submodule(self.path)
        begun = _begin(owner, self.decoder, self.start, kwargs) if self._holds(model, owner) else None
        if begun is None or not self.decoder.makes_logits(len(begun[2])):
            return None
        logits = torch.empty(len(begun[2]), 1, self.head.out_features)
        self.decoder.step_on(*begun, logits=logits)
        return CausalLMOutputWithPast(logits=logits, past_key_values=begun[0])

    def _holds(self, model: nn.Module, owner: nn.Module) -> bool:
        ours = model.lm_head is self.head and self.head.planar is self.planar and self.start.norm_of(owner) is self.norm
        return ours and not (_hooked(self.head) or _hooked(self.norm)) and _hooks(owner) == self.hooks


def shows_inside(config, kwargs: dict) -> bool:
    """Whether outputs of single blocks are asked for."""
    asked = ("output_hidden_states", "output_attentions")
    return any(getattr(config, name, False) if kwargs.get(name) is None else kwargs[name] for name in asked)


def _begin(
    owner: nn.Module, decoder: Decoder, start: _Rotated | _Learned, kwargs: dict
) -> tuple[Cache, Seat, Tensor, Turn | None] | None:
    """What `Decoder.step_on` takes, for a plain step of the module; None if this is none."""
    ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
    if owner.training or not kwargs.keys() <= KNOWN:
        return None
    if ids is None or kwargs.get("inputs_embeds") is not None or ids.ndim != 2 or ids.shape[1] != 1 or not ids.is_cpu:
        return None
    seat = decoder.seat_for_one(cache, ids) if isinstance(cache, Cache) and _returns_all(owner.config, kwargs) else None
    if seat is None or not _looks_at_all(owner.config, kwargs.get("attention_mask"), len(ids), seat.room.space.tokens):
        return None
    positions = kwargs.get("position_ids")
    positions = ids.new_full((1, 1), seat.room.space.tokens) if positions is None else positions
    if positions.is_floating_point() or positions.shape not in ((1, 1), (len(ids), 1)):
        return None
    if seat.room.rotation is not None and len(positions) > seat.room.rows:
        return None
    begun = start(owner, ids, positions)
    return None if begun is None else (cache, seat, *begun)


def _returns_all(config, kwargs: dict) -> bool:
    """Whether the output is the module's usual one: the cache too, nothing of single blocks, no tuple."""
    usual = all(
        kwargs.get(name) or kwargs.get(name) is None and getattr(config, name) for name in ("use_cache", "return_dict")
    )
    return usual and not shows_inside(config, kwargs)


def _looks_at_all(config, mask: Tensor | None, batch: int, held: int) -> bool:
    """Whether the next token of each sequence looks at all of those before it."""
    window = getattr(config, "sliding_window", None)
    if window is not None and held >= window:
        return False
    return mask is None or isinstance(mask, Tensor) and mask.shape == (batch, held + 1) and bool((mask == 1).all())


class _Rotated:
    """Begin and end of LLaMA and its like. Rotations come out of the model's own module, many positions at a time."""

    table: Tensor | None = None

    def __call__(self, owner: nn.Module, ids: Tensor, positions: Tensor) -> tuple[Tensor, Turn] | None:
        hidden = owner.embed_tokens(ids)
        at = [row[0] for row in positions.tolist()]
        rotary = owner.rotary_emb
        if hidden.dtype != torch.float32 or rotary.rope_type not in STEADY or min(at) < 0 or _hooked(rotary):
            return None
        if self.table is None or len(self.table) <= max(at) or not self._is_of(rotary):
            self._fill(rotary, hidden, (max(at) // AT_ONCE + 1) * AT_ONCE)
        cos, sin = F.embedding(positions, self.table).chunk(2, -1)  # [B or 1, 1, R] -> 2 x [B or 1, 1, R/2]
        return hidden, (cos, sin)

    def _is_of(self, rotary: nn.Module) -> bool:
        return self.scaling == rotary.attention_scaling and torch.equal(self.frequencies, rotary.inv_freq)

    def _fill(self, rotary: nn.Module, like: Tensor, count: int) -> None:
        """Cosines beside sines [count, R]; both halves of what the model computes are alike."""
        turns = rotary(like, position_ids=torch.arange(count)[None])
        self.table = torch.cat([t[0, :, : t.shape[2] // 2] for t in turns], 1)  # 2 x [1, count, R] -> [count, R]
        self.frequencies, self.scaling = rotary.inv_freq.clone(), rotary.attention_scaling

    def end(self, owner: nn.Module, hidden: Tensor) -> Tensor:
        return owner.norm(hidden)

    def norm_of(self, owner: nn.Module) -> nn.Module | None:
        """What alone makes the module's output of its blocks'; None if nothing or more does."""
        return owner.norm


class _Learned:
    """Begin and end of OPT, whose positions are embedded."""

    def __call__(self, owner: nn.Module, ids: Tensor, positions: Tensor) -> tuple[Tensor, None] | None:
        hidden = owner.embed_tokens(ids)
        hidden = hidden if owner.project_in is None else owner.project_in(hidden)
        hidden = hidden + owner.embed_positions(None, position_ids=positions)
        return (hidden, None) if hidden.dtype == torch.float32 else None

    def end(self, owner: nn.Module, hidden: Tensor) -> Tensor:
        hidden = hidden if owner.final_layer_norm is None else owner.final_layer_norm(hidden)
        return hidden if owner.project_out is None else owner.project_out(hidden)

    def norm_of(self, owner: nn.Module) -> nn.Module | None:
        """As above."""
        return owner.final_layer_norm if owner.project_out is None else None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _hooks(module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(module._forward_pre_hooks), tuple(module._forward_hooks)


STARTS: dict[str, type[_Rotated] | type[_Learned]] = {
    "LlamaModel": _Rotated,
    "MistralModel": _Rotated,
    "Qwen2Model": _Rotated,
    "OPTDecoder": _Learned,
}
BASES = {
    **dict.fromkeys(("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"), "model"),
    "OPTForCausalLM": "model.decoder",
}
