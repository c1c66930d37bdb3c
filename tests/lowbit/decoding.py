"""Tiny compressed models of some families, whose blocks run on integer kernels, and how they decode."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import torch
from lowbit import ActivationQuantizer, Linear, Norm, integer
from lowbit.attention import NAME as LOWBIT_ATTENTION
from lowbit.cache import KVGrid, attach_packed_cache
from lowbit.decode import Roles, Shape
from lowbit.decode_attach import attach
from lowbit.sinks import attach as spare_sinks
from transformers import AutoConfig, AutoModelForCausalLM

C, F, VOCAB, LAYERS = 128, 200, 61, 2  # an MLP whose last tile and last rows are not whole
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = Roles(
    norm="rmsnorm",
    attention_norm="input_layernorm",
    qkv=QKV,
    output="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    rotary="half",
)
OPT = Roles(
    norm="layernorm",
    attention_norm="self_attn_layer_norm",
    qkv=QKV,
    output="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    up=("fc1",),
    down="fc2",
    rotary=None,
)
ROLES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "opt": OPT}
PATHS = {**dict.fromkeys(ROLES, "model.layers"), "opt": "model.decoder.layers"}


def plain_model(family, heads, kv_heads, attention):
    settings = {
        "llama": dict(intermediate_size=F, num_key_value_heads=kv_heads, attention_bias=kv_heads == 1),
        "mistral": dict(intermediate_size=F, num_key_value_heads=kv_heads, sliding_window=None),
        "qwen2": dict(intermediate_size=F, num_key_value_heads=kv_heads),
        "opt": dict(ffn_dim=F, word_embed_proj_dim=C, dropout=0.0),
    }[family]
    common = dict(hidden_size=C, num_hidden_layers=LAYERS, num_attention_heads=heads, vocab_size=VOCAB)
    tokens = dict(max_position_embeddings=128, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    config = AutoConfig.for_model(family, **settings, **common, **tokens)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().requires_grad_(False)
    for name, tensor in model.named_parameters():
        spread = 0.1 if tensor.dim() == 1 else 1.0 if "embed" in name else 0.5
        tensor.copy_(torch.randn(tensor.shape) * spread + ("norm" in name and name.endswith("weight")))
    return model


def packed(like, bits, rotation, fine=False):
    """Random codes in groups of a tile, every other one of twice the bits if `fine`; weights of variance 1 / channels."""
    R, channels = like.weight.shape
    new = Linear(channels, R, bias=like.bias is not None, rotation=rotation)
    new.weight = torch.zeros(R, channels)
    sizes = torch.tensor([min(64, channels - start) for start in range(0, channels, 64)])
    wide = (
        bits + bits * (torch.arange(sizes.numel()) % 2) if fine else torch.full_like(sizes, bits)
    )  # bits of a group's codes
    top = 2**wide
    codes = (torch.rand(R, channels) * top.repeat_interleave(sizes)).to(torch.uint8)
    scale = (torch.rand(R, sizes.numel()) + 0.5) * (12 / channels) ** 0.5 / 2**bits
    zero = top // 2 - torch.randint(2, scale.shape)
    new.pack_(codes, scale.half(), zero, sizes, bits, fine=wide > bits)
    new.bias = None if like.bias is None else like.bias.data
    return new


def normed(like, kind, rotation):
    new = Norm.full_precision(like, kind)
    new.permutation, new.rotation = torch.randperm(C).int(), rotation
    return new


def grid(x, bits, sizes):
    parts = x.split(sizes.tolist(), -1)
    low, high = torch.stack([t.min().clamp(max=0) for t in parts]), torch.stack([t.max().clamp(min=0) for t in parts])
    scale = (high - low) / (2.0**bits - 1) * 0.9  # some numbers are clipped
    return scale, torch.round(-low / scale)


def quantizer(mode, x, sinks):
    """For inputs like x [T, C]: clusters of a tile and of the rest, at 8 and 4 bits; or one grid a token."""
    sizes, bits = torch.tensor([64, x.shape[1] - 64]), torch.tensor([8, 4])
    if mode == "static":
        return ActivationQuantizer.static(*grid(x, bits, sizes), bits, sizes, sinks=sinks)
    if mode == "tile":
        return ActivationQuantizer.tiles(bits, sizes, sinks=sinks)
    return ActivationQuantizer("token", token_bits=8, sinks=sinks)


def per_channel(y, bits, sinks):
    sizes = torch.ones(y.shape[1], dtype=torch.int64)
    bits = torch.full_like(sizes, bits)
    return ActivationQuantizer.static(*grid(y, bits, sizes), bits, sizes, sinks=sinks)


def watch(model, blocks, paths):
    """(block, path) -> inputs as multiplied [T, C] and outputs [T, R] of linears on random tokens."""
    seen, handles = {}, []
    for i, path in itertools.product(range(LAYERS), paths):

        def see(linear, args, y, key=(i, path)):
            seen[key] = linear.multiplied(args[0]).flatten(0, -2), y.flatten(0, -2)

        handles.append(blocks[i].get_submodule(path).register_forward_hook(see))
    model(torch.randint(2, VOCAB, (4, 16)), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def compress(block, roles, bits, rotation, fine):
    """Packed weights, permuting and rotating norms."""
    for path in (*roles.qkv, roles.output, *roles.up, roles.down):
        inner = {roles.output: 64, roles.down: 40}.get(path, 1) if rotation else 1
        block.set_submodule(path, packed(block.get_submodule(path), bits, inner, fine))
    for path in (roles.attention_norm, roles.mlp_norm):
        block.set_submodule(path, normed(block.get_submodule(path), roles.norm, 128 if rotation else 1))


def quantize(block, roles, seen, mode, widths, sinks):
    """Grids of inputs and of q, k, v, at `widths` bits."""
    get = block.get_submodule
    if mode != "none":
        for path, source in ((roles.attention_norm, roles.qkv[0]), (roles.mlp_norm, roles.up[0])):
            get(path).quantizer = quantizer(mode, seen[source][0], sinks)
        for path in (roles.output, roles.down):
            get(path).input_quantizer = quantizer(mode, seen[path][0], sinks)
    for path, width in zip(roles.qkv, widths):
        if width < 16:
            get(path).output_quantizer = per_channel(seen[path][1], width, sinks)
    assert integer.take([get(path) for path in roles.qkv], get(roles.attention_norm))
    assert integer.take([get(path) for path in roles.up], get(roles.mlp_norm))
    assert integer.take([get(roles.output)]) and integer.take([get(roles.down)])


def kv_grid(block, roles, bits, shape, sinks):
    k, v = (block.get_submodule(path).output_quantizer for path in roles.qkv[1:])
    each = [t.view(-1, shape.head_dim) for t in (k.scale, k.zero, v.scale, v.zero)]
    return KVGrid(*each, bits, roles.rotary, shape.rotary_dim, sinks)


def model_of(
    family,
    *,
    heads=2,
    kv_heads=2,
    mode="tile",
    kv=4,
    q=16,
    sinks=0,
    rotation=True,
    bits=4,
    softmax=16,
    fine=False,
    head=16,
):
    """A tiny compressed model whose blocks run on integer kernels, on a packed cache below 16 bits; its roles and shape.

    head: bits of the output head, which runs on integer kernels too if they are few.
    """
    roles = ROLES[family]
    shape = Shape(heads, kv_heads, C // heads, C // heads if roles.rotary else 0, "silu" if roles.rotary else "relu")
    model = plain_model(family, heads, kv_heads, LOWBIT_ATTENTION if softmax < 16 else "eager")
    blocks = list(model.get_submodule(PATHS[family]))
    for block in blocks:
        compress(block, roles, bits, rotation, fine)
        block.self_attn.softmax_bits = softmax
    if head < 16:
        model.lm_head = packed(model.lm_head, head, 1)
        assert integer.take([model.lm_head])
    seen = watch(model, blocks, (*roles.qkv, roles.output, *roles.up, roles.down))
    for i, block in enumerate(blocks):
        quantize(block, roles, {path: x for (at, path), x in seen.items() if at == i}, mode, (q, kv, kv), sinks)
    if sinks:
        spare_sinks(model.get_submodule(PATHS[family].rpartition(".")[0]), sinks)
    if kv < 16:
        attach_packed_cache(model, blocks, [kv_grid(block, roles, kv, shape, sinks) for block in blocks])
    return model, blocks, roles, shape


def prompt(batch, length=9):
    """Tokens and mask, the first rows padded on the left."""
    tokens = torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    for row in range(batch - 1):
        mask[row, : 2 + row] = 0
    return tokens.where(mask.bool(), 0), mask


def prefilled(model, batch, length=9):
    tokens, mask = prompt(batch, length)
    return model(tokens, attention_mask=mask, use_cache=True).past_key_values, mask


def decode(model, cache, mask, steps):
    """Last hidden states [steps, B, C] of tokens that do not depend on them."""
    states, batch = [], len(mask)
    for step in range(steps):
        mask = torch.cat([mask, mask.new_ones(batch, 1)], 1)
        tokens = torch.full((batch, 1), 5 + step) + torch.arange(batch)[:, None]
        positions = mask.cumsum(1)[:, -1:] - 1
        out = model.base_model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
        states.append(out.last_hidden_state[:, 0])
    return torch.stack(states)


@contextmanager
def native_steps(model, family, decoder):
    """The model decodes by `decoder`; yields a list that grows by the name of every step it takes."""
    taken = []

    def counted(step):
        def run(*args, **kwargs):
            y = step(*args, **kwargs)
            taken.append(step.__name__)
            return y

        return run

    decoder.step, decoder.step_on = counted(decoder.step), counted(decoder.step_on)
    handles = attach(model, PATHS[family], decoder)
    yield taken
    for handle in handles:
        handle.remove()
