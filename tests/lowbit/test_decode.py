"""A native step computes what the modules compute on the same cache, and leaves the cache as they would."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from lowbit import ActivationQuantizer
from lowbit.cpu import native as library
from lowbit.decode import CannotStep, Decoder
from lowbit.decode_blocks import hadamard_base
from lowbit.hadamard import rotate
from transformers import DynamicCache

from .decoding import LAYERS, VOCAB, C, decode, model_of, native_steps, prefilled, prompt

pytestmark = pytest.mark.skipif(not library.fast_avx2(), reason="no compiled kernels that this machine would run")


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
