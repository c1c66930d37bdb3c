"""A native step computes what the modules compute on the same cache, and leaves the cache as they would."""

from __future__ import annotations

import copy
import itertools
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from lowbit import ActivationQuantizer, Linear, Norm, integer
from lowbit.attention import NAME as LOWBIT_ATTENTION
from lowbit.cache import KVGrid, attach_packed_cache
from lowbit.cpu import native as library
from lowbit.decode import CannotStep, Decoder, Roles, Shape
from lowbit.decode_attach import attach
from lowbit.decode_blocks import hadamard_base
from lowbit.hadamard import rotate
from lowbit.sinks import attach as spare_sinks
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

pytestmark = pytest.mark.skipif(not library.fast_avx2(), reason="no compiled kernels that this machine would run")
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
ROLES = {"llama": LLAMA, "opt": OPT}
PATHS = {"llama": "model.layers", "opt": "model.decoder.layers"}


def plain_model(family, heads, kv_heads, attention):
    settings = {
        "llama": dict(intermediate_size=F, num_key_value_heads=kv_heads, attention_bias=kv_heads == 1),
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
    family, *, heads=2, kv_heads=2, mode="tile", kv=4, q=16, sinks=0, rotation=True, bits=4, softmax=16, fine=False
):
    """A tiny compressed model whose blocks run on integer kernels, on a packed cache below 16 bits; its roles and shape."""
    roles = ROLES[family]
    shape = Shape(heads, kv_heads, C // heads, C // heads if roles.rotary else 0, "silu" if roles.rotary else "relu")
    model = plain_model(family, heads, kv_heads, LOWBIT_ATTENTION if softmax < 16 else "eager")
    blocks = list(model.get_submodule(PATHS[family]))
    for block in blocks:
        compress(block, roles, bits, rotation, fine)
        block.self_attn.softmax_bits = softmax
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
    """The model decodes by `decoder`; yields a list that grows with every step it takes."""
    taken, step = [], decoder.step

    def counted(*args, **kwargs):
        y = step(*args, **kwargs)
        taken.append(1)
        return y

    decoder.step = counted
    handles = attach(model, PATHS[family], decoder)
    yield taken
    for handle in handles:
        handle.remove()


def both(family, *, batch=3, steps=4, **settings):
    """Last hidden states by modules and natively, and both caches."""
    model, *parts = model_of(family, **settings)
    cache, mask = prefilled(model, batch)
    other = copy.deepcopy(cache)
    expected = decode(model, cache, mask, steps)
    with native_steps(model, family, Decoder(*parts)) as taken:
        found = decode(model, other, mask, steps)
    assert len(taken) == steps
    return expected, found, cache, other


def check_states(found, expected, mode="static"):
    """Float32 sums in another order: 1e-5 of the largest number, where all codes are equal.

    In mode "none" what enters the linears is rounded to 16 bits, two int8 codes a number: 2^-15 of a tile's largest each, a few times that
    after all linears.

    About one number in a million lies so close to the middle between two codes that it is rounded to the other one, which moves its
    token's state by some 1e-3 of its size, and perhaps those of the sequence's later tokens. A few tokens may have met one.
    """
    gaps = (found - expected).abs().amax(-1) / expected.abs().max()  # [steps, B]
    assert (gaps < (2.0**-12 if mode == "none" else 1e-5)).float().mean() > 0.6 and gaps.max() < 0.1, gaps


def check_caches(found, expected, mode="static"):
    near = 2.0**-12 if mode == "none" else 1e-5
    for a, b in zip(found.layers, expected.layers):
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            assert (
                x.shape == y.shape and torch.isclose(x.float(), y.float(), rtol=near, atol=near).float().mean() > 0.98
            )


@pytest.mark.parametrize("kv", [16, 8, 4, 3, 2])
@pytest.mark.parametrize("mode", ["static", "tile", "token", "none"])
@torch.no_grad()
def test_a_step_computes_what_the_modules_compute(mode, kv):
    expected, found, cache, other = both("llama", kv_heads=1, mode=mode, kv=kv, sinks=1)
    check_states(found, expected, mode)
    check_caches(other, cache, mode)


@pytest.mark.parametrize("mode, kv", [("static", 16), ("tile", 8), ("token", 4), ("none", 3)])
@torch.no_grad()
def test_so_does_a_step_of_opt(mode, kv):
    expected, found, cache, other = both("opt", mode=mode, kv=kv, sinks=1)
    check_states(found, expected, mode)
    check_caches(other, cache, mode)


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize(
    "settings",
    [
        dict(batch=1),
        dict(rotation=False),
        dict(q=4, softmax=6),
        dict(bits=3),
        dict(fine=True, mode="static"),
        dict(fine=True, mode="none"),
    ],
    ids=str,
)
@torch.no_grad()
def test_heads_may_share_keys(heads, kv_heads, settings):
    expected, found, cache, other = both("llama", heads=heads, kv_heads=kv_heads, **settings)
    check_states(found, expected, settings.get("mode"))
    check_caches(other, cache, settings.get("mode"))


@pytest.mark.parametrize(
    "settings",
    [dict(bits=2, heads=4, kv_heads=4), dict(q=4, kv=2, softmax=8), dict(rotation=False, bits=8), dict(fine=True)],
    ids=str,
)
@torch.no_grad()
def test_opt_without_sinks(settings):
    expected, found, cache, other = both("opt", **settings)
    check_states(found, expected)
    check_caches(other, cache)


def turn_of(model, position):
    inner = model.model
    return inner.rotary_emb(torch.zeros(1), torch.full((1, 1), position)) if hasattr(inner, "rotary_emb") else None


def native(family, batch=3, steps=3, *, path="fastest", settings):
    """States [steps, B, C] and the cache of a decoder called directly, without padding."""
    model, *parts = model_of(family, **settings)
    tokens = torch.randint(2, VOCAB, (batch, 21), generator=torch.Generator().manual_seed(2))
    cache = model(tokens, use_cache=True).past_key_values
    decoder, states = Decoder(*parts), []
    random = torch.Generator().manual_seed(4)
    for step in range(steps):
        hidden = torch.randn(batch, 1, C, generator=random)
        states.append(decoder.step(hidden, cache, turn=turn_of(model, 21 + step), path=path)[:, 0])
    return torch.stack(states), cache


MIXED = dict(family="llama", settings=dict(heads=4, kv_heads=2, mode="tile", kv=3))
PLAIN = dict(family="opt", settings=dict(mode="none", kv=16))


@pytest.mark.parametrize("case", [MIXED, PLAIN], ids=["llama", "opt"])
@torch.no_grad()
def test_threads_change_nothing(case):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, kept = native(**case)
        torch.set_num_threads(2)
        two, other = native(**case)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)
    for a, b in zip(kept.layers, other.layers):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


@pytest.mark.parametrize("case", [MIXED, PLAIN], ids=["llama", "opt"])
@torch.no_grad()
def test_the_portable_path_computes_the_same(case):
    fast, cache = native(**case, path="avx2")
    portable, other = native(**case, path="portable")
    assert not torch.equal(fast, portable)  # it sums in another order
    check_states(portable, fast, case["settings"].get("mode"))
    check_caches(other, cache, case["settings"].get("mode"))


@torch.no_grad()
def test_a_cache_grows_without_copies_until_its_room_is_taken():
    model, *parts = model_of("opt", kv=4)
    decoder, cache = Decoder(*parts), prefilled(model, 1)[0]
    places = []
    for _ in range(70):
        decoder.step(torch.randn(1, 1, C), cache)
        places.append((cache.layers[0].keys.data_ptr(), cache.layers[1].values.data_ptr()))
    assert len(set(places)) == 2 and cache.get_seq_length() == 79


@torch.no_grad()
def test_modules_crops_and_beams_go_on_with_the_cache():
    model, *parts = model_of("llama", kv_heads=1, kv=4, sinks=1)
    cache, mask = prefilled(model, 3)
    other, decoder, states = copy.deepcopy(cache), Decoder(*parts), []
    for held, natively in ((cache, False), (other, True)):
        seen, known = [], mask
        for change in (None, lambda c: c.crop(-2), lambda c: c.reorder_cache(torch.tensor([2, 2, 0])), None):
            with native_steps(model, "llama", decoder) if natively else nullcontext():
                seen.append(decode(model, held, known, 3))
            known = torch.cat([known, known.new_ones(3, 3)], 1)
            seen.append(decode(model, held, known, 1))
            known = torch.cat([known, known.new_ones(3, 1)], 1)
            if change is not None:
                change(held)
                known = (
                    known[:, : held.get_seq_length()] if held.get_seq_length() < known.shape[1] else known[[2, 2, 0]]
                )
        states.append(torch.cat(seen))
    check_states(states[1], states[0])
    check_caches(other, cache)


@torch.no_grad()
def test_a_token_that_is_a_sink_is_left_to_the_modules():
    model, *parts = model_of("opt", sinks=2)
    cache, mask = prefilled(model, 1, length=1)
    other = copy.deepcopy(cache)
    expected = decode(model, cache, mask, 3)
    with native_steps(model, "opt", Decoder(*parts)) as taken:
        found = decode(model, other, mask, 3)
    assert len(taken) == 2
    check_states(found, expected)


def both_prefills(family, lengths, *, batch=2, pad=0, **settings):
    """Last hidden states of prompts, one after another, by modules and natively, and both caches."""
    model, *parts = model_of(family, **settings)
    tokens = torch.randint(2, VOCAB, (batch, sum(lengths)), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    mask[0, :pad] = 0
    states = []
    for natively in (False, True):
        # without a cache the modules make one inside, where nothing can take its place
        cache, seen, end = DynamicCache(config=model.config), [], 0
        with native_steps(model, family, Decoder(*parts)) if natively else nullcontext([]) as taken:
            for length in lengths:
                end += length
                known, positions = mask[:, :end], (mask.cumsum(1) - 1).clamp(min=0)[:, end - length : end]
                some = dict(attention_mask=known, position_ids=positions, past_key_values=cache, use_cache=True)
                out = model.base_model(tokens[:, end - length : end], **some)
                cache = out.past_key_values
                seen.append(out.last_hidden_state)
        states.append((torch.cat(seen, 1)[:, pad:].transpose(0, 1), cache))
        assert len(taken) == natively * len(lengths)
    return *states[0], *states[1]


def without(cache, settings):
    """The cache less padding, whose keys nobody reads, and less sinks, whose codes nobody reads: they are kept in full precision."""
    first = max(settings.get("pad", 0), settings.get("sinks", 0))
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]
    return cache


@pytest.mark.parametrize(
    "settings",
    [
        dict(family="llama", kv_heads=1, kv=4, sinks=1),
        dict(family="llama", heads=4, kv_heads=2, kv=3, sinks=2, mode="static", fine=True),
        dict(family="llama", kv=16, sinks=1, q=4, softmax=6),
        dict(family="llama", kv=8, mode="token", pad=3, rotation=False),
        dict(family="opt", kv=4, sinks=1, mode="static", batch=1),
        dict(family="opt", kv=2, heads=4, kv_heads=4, bits=3, pad=2, softmax=8),
        dict(family="opt", kv=16, bits=8, mode="token", batch=3),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_prefill_computes_what_the_modules_compute(settings, monkeypatch):
    monkeypatch.setattr("lowbit.decode.PREFILL_TOKENS", 60)  # in several parts
    expected, cache, found, other = both_prefills(lengths=(70, 1, 5, 1), **settings)
    check_states(found, expected)
    check_caches(without(other, settings), without(cache, settings))


@pytest.mark.parametrize("lengths", [(1, 3), (2, 1), (12,)])
@torch.no_grad()
def test_so_does_a_prompt_of_sinks_or_of_few_tokens_that_are_not_rounded(lengths):
    expected, cache, found, other = both_prefills("llama", lengths, kv_heads=1, kv=4, sinks=1, mode="none", batch=1)
    check_states(found, expected, "none")
    check_caches(without(other, dict(sinks=1)), without(cache, dict(sinks=1)), "none")


@torch.no_grad()
def test_nan_stays_in_its_sequence():
    model, *parts = model_of("opt")
    cache, hidden = prefilled(model, 3)[0], torch.randn(3, 1, C)
    hidden[1, 0, 7] = torch.nan
    y = Decoder(*parts).step(hidden, cache)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_generate_finds_the_same_tokens(family):
    model, *parts = model_of(family, sinks=1)
    tokens, mask = prompt(2)
    settings = dict(attention_mask=mask, max_new_tokens=24, do_sample=False)
    expected = model.generate(tokens, **settings)
    with native_steps(model, family, Decoder(*parts)) as taken:
        found = model.generate(tokens, **settings)
        assert len(taken) == 23  # the first comes of the prefill
        shown = model(tokens[:, :1], past_key_values=prefilled(model, 2)[0], output_hidden_states=True)
        assert len(taken) == 23 and len(shown.hidden_states) == LAYERS + 1
    assert torch.equal(found, expected) and len(set(found[1].tolist())) > 5


@pytest.mark.parametrize("block", [8, 40, 64, 72, 128, 576, 1536])
def test_hadamard_matrices_split(block):
    base = hadamard_base(block)
    H = torch.ones(1, 1)
    while len(H) * len(base) < block:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), H)
    assert torch.equal(torch.kron(H, base), rotate(torch.eye(block), block)) and len(base) <= 72


@torch.no_grad()
def test_blocks_that_cannot_run_say_why():
    def refused(match, change=lambda blocks: None, **shape):
        model, blocks, roles, known = model_of("llama")
        change(blocks)
        with pytest.raises(ValueError, match=match):
            Decoder(blocks, roles, replace(known, **shape))

    refused("activation 'gelu'", activation="gelu")
    refused("multiple of 8", head_dim=20)
    refused("block 0: self_attn.q_proj is 128 -> 128", heads=4)
    refused("block 1: mlp.down_proj is not laid out", lambda blocks: setattr(blocks[1].mlp.down_proj, "planar", None))
    refused(
        "block 0: the output of self_attn.v_proj is rounded in mode 'group4'",
        lambda blocks: setattr(blocks[0].self_attn.v_proj, "output_quantizer", ActivationQuantizer("group4")),
    )
    refused("do not rotate and round their input alike", lambda blocks: setattr(blocks[0].mlp.up_proj, "rotation", 64))


@torch.no_grad()
def test_steps_that_cannot_run_say_why():
    model, *parts = model_of("llama", kv=4)
    decoder, cache, turn = Decoder(*parts), prefilled(model, 2)[0], turn_of(model, 9)
    hidden = torch.randn(2, 1, C)
    whys = {
        "not float32 tokens": (hidden.double(), cache, turn),
        "has no layers 0 to 1": (hidden, DynamicCache(), turn),
        "3 sequences, 2 in the cache": (torch.randn(3, 1, C), cache, turn),
        "cosines and sines": (hidden, cache, None),
        "a mask of": (hidden, cache, turn, torch.ones(2, 1, 1, 9)),
    }
    for why, arguments in whys.items():
        assert why in decoder.obstacle(*arguments)
    assert decoder.obstacle(hidden, cache, turn) is None
    with pytest.raises(CannotStep, match="3 sequences"):
        decoder.step(torch.randn(3, 1, C), cache, turn=turn)
