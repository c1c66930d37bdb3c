"""A `Decoder` inside a transformers model: it takes the steps that it can, and leaves all others to the blocks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from lowbit.decode import CannotStep, Decoder
from lowbit.decode_plain import attach_plain, shows_inside


class _Blocks(nn.Module):
    """Stands where a model iterates over its blocks, and runs all of them."""

    def __init__(self, decoder: Decoder, blocks: nn.ModuleList):
        super().__init__()
        self.decoder, self.blocks = decoder, (blocks,)  # in a tuple: the model stays their only owner

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        cache, turn = kwargs["past_key_values"], kwargs.get("position_embeddings")
        try:
            return self.decoder.step(hidden, cache, turn=turn, mask=attention_mask)
        except CannotStep:
            pass
        for block in self.blocks[0]:
            hidden = block(hidden, attention_mask=attention_mask, **kwargs)
        return hidden


def attach(model: nn.Module, path: str, decoder: Decoder) -> list[RemovableHandle]:
    """Let `decoder`, made of all the blocks at `path` of the model, run the forward calls that fill a cache.

    While such a call runs, the list at `path` holds one module in their place, so that hooks on blocks do not run.

    Returns:
        handles whose `remove()` undoes this.

    Raises:
        ValueError: a decoder of other blocks, or blocks that do not all attend alike (sliding windows in some of them).
    """
    owner, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    blocks = getattr(owner, name)
    types = sorted(set(getattr(owner.config, "layer_types", None) or ()))
    if len(types) > 1 or decoder.layers != range(len(blocks)):
        raise ValueError(f"{path} has {len(blocks)} blocks of types {types}, the decoder is of {decoder.layers}")
    instead = nn.ModuleList([_Blocks(decoder, blocks)]).eval()

    def before(module: nn.Module, args, kwargs) -> None:
        if (
            not module.training
            and isinstance(kwargs.get("past_key_values"), Cache)
            and not shows_inside(module.config, kwargs)
        ):
            module._modules[name] = instead

    def after(module: nn.Module, *_) -> None:
        module._modules[name] = blocks

    handles = [
        owner.register_forward_pre_hook(before, with_kwargs=True),
        owner.register_forward_hook(after, always_call=True),
    ]
    return [*handles, *attach_plain(model, owner, decoder)]
