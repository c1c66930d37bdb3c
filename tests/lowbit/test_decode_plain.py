"""A plain step leaves out the model's own Python and changes no bit: of the logits, of the cache, of what the hooks see.

Where the head is packed the last norm is the native pass's, whose sums are in another order.
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from lowbit.cpu import native as library
from lowbit.decode import Decoder
from lowbit.decode_plain import AT_ONCE
from lowbit.integer import FEW_TOKENS
from lowbit.modules import Linear
from transformers import DynamicCache

from .decoding import LAYERS, PATHS, VOCAB, model_of, native_steps, prompt

pytestmark = pytest.mark.skipif(not library.fast_avx2(), reason="no compiled kernels that this machine would run")
FAMILIES = ["llama", "mistral", "opt", "qwen2"]


def owner_of(model, family):
    return model.get_submodule(PATHS[family].rpartition(".")[0])


def run(model, family, decoder, steps, *, plain, batch=1, mask=None, positions=None, between=None):
    """Logits [steps, B, vocabulary] after a prompt, the cache, and how each token was run. between: (step, change of the cache)."""
    tokens = torch.randint(2, VOCAB, (batch, 9), generator=torch.Generator().manual_seed(6))
    cache, seen = DynamicCache(config=model.config), []
    with native_steps(model, family, decoder) as taken:
        if not plain:
            del owner_of(model, family).forward
            vars(model).pop("forward", None)
        where = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        cache = model(tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **where).past_key_values
        taken.clear()
        for step in range(steps):
            if between is not None and step == between[0]:
                between[1](cache)
            more = {} if positions is None else {"position_ids": positions(step, cache)}
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(batch, 1)], 1)
                more = {"attention_mask": mask, "position_ids": mask.cumsum(1)[:, -1:] - 1, **more}
            token = torch.full((batch, 1), 5 + step) + torch.arange(batch)[:, None]
            seen.append(model(token, past_key_values=cache, use_cache=True, **more).logits[:, 0])
    return torch.stack(seen), cache, list(taken)


def check_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert found[1].get_seq_length() == expected[1].get_seq_length()
    for a, b in zip(found[1].layers, expected[1].layers):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    for a, b in zip(getattr(found[1], "rotations", ()), getattr(expected[1], "rotations", ())):
        assert torch.equal(a.cos, b.cos) and torch.equal(a.sin, b.sin)


def apart(step, cache):
    """Each of 3 sequences at a position of its own."""
    return torch.tensor([[3], [12], [40]]) + step


CASES = {
    "alone": (dict(), "ppppp"),
    "together": (dict(batch=3), "ppppp"),
    "nothing masked": (dict(batch=2, mask=torch.ones(2, 9, dtype=torch.int64)), "ppppp"),
    "padded": (dict(batch=3, mask=prompt(3)[1]), "sssss"),
    "a position given": (dict(batch=2, positions=lambda step, cache: torch.full((1, 1), 20 + step)), "ppppp"),
    "a position each": (dict(batch=3, positions=apart), "ppppp"),
    "cropped": (dict(batch=2, between=(2, lambda cache: cache.crop(-2))), "ppspp"),
    "reordered": (dict(batch=3, between=(3, lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])))), "pppsp"),
}


@pytest.mark.parametrize("kv, sinks", [(4, 1), (16, 0)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_plain_step_computes_the_same_bits(family, case, kv, sinks):
    model, *parts = model_of(family, kv_heads=1 if family != "opt" else 2, kv=kv, sinks=sinks)
    settings, ways = CASES[case]
    if (
        case == "a position each" and family != "opt" and kv < 16
    ):  # kept angles: a row each is another room than one for all
        ways = "spppp"
    expected = run(model, family, Decoder(*parts), 5, plain=False, **settings)
    found = run(model, family, Decoder(*parts), 5, plain=True, **settings)
    check_same(found, expected)
    assert set(expected[2]) == {"step"}
    assert found[2] == [{"p": "step_on", "s": "step"}[way] for way in ways]


@torch.no_grad()
def test_rotations_are_those_of_the_module_wherever_the_position_and_whatever_becomes_of_it():
    model, *parts = model_of("llama", kv=4)
    rotary = model.model.rotary_emb

    def far(step, cache):
        return torch.tensor([[[AT_ONCE - 1, AT_ONCE, 3 * AT_ONCE + 1, 7, 8][step]]])[0]

    ways = [run(model, "llama", Decoder(*parts), 5, plain=plain, positions=far) for plain in (False, True)]
    check_same(ways[1], ways[0])
    first = owner_of(model, "llama")
    with native_steps(model, "llama", Decoder(*parts)) as taken:
        starts = []
        for _ in range(2):
            cache = model(torch.arange(2, 9)[None], past_key_values=DynamicCache(), use_cache=True).past_key_values
            starts.append(model(torch.tensor([[5]]), past_key_values=cache, use_cache=True).logits)
            rotary.inv_freq.mul_(0.5)
        last = copy.deepcopy(cache)
        natively = model(torch.tensor([[6]]), past_key_values=cache, use_cache=True).logits
        del first.forward
        assert taken[-1] == "step_on" and not torch.equal(*starts)
        assert torch.equal(natively, model(torch.tensor([[6]]), past_key_values=last, use_cache=True).logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_plain_generation_takes_plain_steps(family):
    model, *parts = model_of(family, sinks=1)
    tokens = prompt(1)[0]
    expected = model.generate(tokens, max_new_tokens=24, do_sample=False)
    with native_steps(model, family, Decoder(*parts)) as taken:
        assert torch.equal(model.generate(tokens, max_new_tokens=24, do_sample=False), expected)
        assert taken == ["step"] + ["step_on"] * 22 or taken == ["step"] + ["step_on"] * 23
        beams = model.generate(tokens, max_new_tokens=6, num_beams=3, do_sample=False)
        del owner_of(model, family).forward
        assert torch.equal(model.generate(tokens, max_new_tokens=6, num_beams=3, do_sample=False), beams)


def started(model, family):
    """A cache on which a plain step may come next."""
    return model(prompt(2)[0], past_key_values=DynamicCache(config=model.config), use_cache=True).past_key_values


NEXT = torch.tensor([[5], [6]])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_unusual_calls_are_the_models_own(family):
    model, *parts = model_of(family, kv=4)
    owner = owner_of(model, family)
    with native_steps(model, family, Decoder(*parts)) as taken:
        cache = started(model, family)

        def call(**more):
            taken.clear()
            return owner(**{"input_ids": NEXT, "past_key_values": cache, "use_cache": True, **more}), taken == [
                "step_on"
            ]

        assert call()[1]
        shown, plain = call(output_hidden_states=True)
        assert len(shown.hidden_states) == LAYERS + 1 and not plain
        assert len(call(output_attentions=True)[0].attentions) == LAYERS and not taken
        assert call()[1] is False and call()[1]  # the blocks themselves ran: the cache is to be met again
        given, plain = call(return_dict=False)
        assert isinstance(given, tuple) and not plain
        assert not call(input_ids=None, inputs_embeds=owner.embed_tokens(NEXT))[1]
        assert not call(input_ids=NEXT.repeat(1, 2))[1]
        assert not call(use_cache=False)[1]
        owner.config.output_hidden_states = True
        assert len(call()[0].hidden_states) == LAYERS + 1
        owner.config.output_hidden_states = False
        call()
        with torch.enable_grad():
            assert not call()[1]
        assert call()[1]


@torch.no_grad()
def test_a_window_that_is_full_is_left_to_the_model():
    model, *parts = model_of("mistral", kv=4)
    model.config.sliding_window = 11
    expected = run(model, "mistral", Decoder(*parts), 4, plain=False)
    found = run(model, "mistral", Decoder(*parts), 4, plain=True)
    check_same(found, expected)
    assert found[2] == ["step_on", "step_on", "step", "step"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_hooks_on_the_base_model_and_its_parts_run(family):
    model, *parts = model_of(family)
    owner, seen = owner_of(model, family), []
    with native_steps(model, family, Decoder(*parts)) as taken:
        cache = started(model, family)
        for module in (owner, owner.embed_tokens, getattr(owner, "norm", None) or owner.final_layer_norm):
            module.register_forward_hook(lambda *_, module=module: seen.append(module))
        owner.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
        model(NEXT, past_key_values=cache, use_cache=True)
    assert taken[-1] == "step_on" and len(seen) == 4 and seen[-1].shape == (2, 1, model.config.hidden_size)


@pytest.mark.parametrize("kv", [4, 16])
@torch.no_grad()
def test_a_pass_that_fails_leaves_the_cache_as_it_was(kv):
    model, *parts = model_of("llama", kv=kv)
    decoder = Decoder(*parts)
    with native_steps(model, "llama", decoder) as taken:
        caches = [started(model, "llama") for _ in range(2)]
        run_pass = decoder._pass

        def fail(*args, **kwargs):
            run_pass(*args, **kwargs)
            raise RuntimeError("in the middle")

        decoder._pass = fail
        with pytest.raises(RuntimeError, match="in the middle"):
            model(NEXT, past_key_values=caches[0], use_cache=True)
        decoder._pass = run_pass
        logits = [model(NEXT, past_key_values=cache, use_cache=True).logits for cache in caches]
    assert taken[-1] == "step_on" and torch.equal(*logits)
    check_same((logits[0], caches[0]), (logits[1], caches[1]))


@torch.no_grad()
def test_what_was_taken_out_of_a_cache_stays_while_it_grows_and_goes_with_it():
    model, *parts = model_of("llama", kv=4)
    with native_steps(model, "llama", Decoder(*parts)):
        cache = started(model, "llama")
        layer, rotation = cache.layers[1], cache.rotations[0]
        copies = copy.deepcopy(cache).layers[1], copy.copy(layer)
        tables, held = (copy.deepcopy(rotation), copy.copy(rotation)), layer.keys
        before = held.clone()
        model(NEXT, past_key_values=cache, use_cache=True)
    assert layer.keys.shape[2] == held.shape[2] + 1 == layer.get_seq_length() == len(rotation)
    assert torch.equal(layer.keys[:, :, :-1], before) and torch.equal(held, before)
    assert all(torch.equal(one.keys, before) and one.get_seq_length() == before.shape[2] for one in copies)
    assert all(one.cos.shape[1] == len(one) == before.shape[2] for one in tables)
    space = weakref.ref(layer.space)
    gc.disable()
    try:
        del cache, layer, rotation, copies
        assert space() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_copy_of_the_model_embeds_by_its_own_table():
    model, *parts = model_of("llama")
    with native_steps(model, "llama", Decoder(*parts)):
        other = copy.deepcopy(model)
        other.model.embed_tokens.weight.data.neg_()
        states = [m(NEXT, past_key_values=started(m, "llama"), use_cache=True).logits for m in (model, other)]
    assert not torch.equal(*states)


@pytest.fixture
def heads(monkeypatch):
    """How many times the head's module has multiplied."""
    seen, product = [], Linear._product

    def counted(self, x):
        seen.extend([1] if self.out_features == VOCAB else [])
        return product(self, x)

    monkeypatch.setattr(Linear, "_product", counted)
    return seen


def check_near(found, expected):
    """The same caches; logits but for the last norm's sums and, of a few numbers, the last of their 16 bits."""
    check_same((expected[0], found[1]), expected)
    assert torch.allclose(found[0], expected[0], rtol=0, atol=2.0**-14 * float(expected[0].abs().max()))


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_packed_head_multiplies_in_the_native_pass(family, case, bits, heads):
    model, *parts = model_of(family, head=bits, sinks=1)
    settings, ways = CASES[case]
    if case == "a position each" and family != "opt":
        ways = "spppp"
    expected = run(model, family, Decoder(*parts), 5, plain=False, **settings)
    heads.clear()
    found = run(model, family, Decoder(*parts), 5, plain=True, **settings)
    check_near(found, expected)
    assert found[2] == [{"p": "step_on", "s": "step"}[way] for way in ways]
    assert len(heads) == 1 + ways.count("s")  # the prompt, and the steps that are not plain


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_threads_change_no_logit(family):
    model, *parts = model_of(family, head=8)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(model, family, Decoder(*parts), 3, plain=True)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@torch.no_grad()
def test_whoever_looks_at_the_head_or_what_is_before_it_sees_it(heads):
    model, *parts = model_of("llama", head=8)
    decoder, seen = Decoder(*parts), []
    with native_steps(model, "llama", decoder) as taken:
        cache = started(model, "llama")

        def native():
            heads.clear()
            model(NEXT, past_key_values=cache, use_cache=True)
            return not heads and taken[-1] == "step_on"

        assert native()
        for module in (model.lm_head, model.model.norm, model.model):
            handle = module.register_forward_hook(lambda *_: seen.append(1))
            assert not native()
            handle.remove()
            assert native()
        head, norm = model.lm_head, model.model.norm
        model.lm_head = copy.deepcopy(head)
        assert not native()
        model.lm_head, model.model.norm = head, copy.deepcopy(norm)
        assert not native()
        model.model.norm = norm
        assert native()
    assert len(seen) == 3


@torch.no_grad()
def test_calls_of_the_whole_model_that_are_not_plain_are_its_own(heads):
    model, *parts = model_of("llama", head=8)
    with native_steps(model, "llama", Decoder(*parts)):
        cache = started(model, "llama")

        def call(*args, **more):
            heads.clear()
            out = model(*args, **{"past_key_values": cache, "use_cache": True, **more})
            return out, not heads

        assert call(NEXT)[1] and call(input_ids=NEXT)[1] and call(NEXT, logits_to_keep=1)[1]
        out, native = call(NEXT, labels=NEXT)
        assert out.loss is not None and not native
        assert not call(NEXT, logits_to_keep=torch.tensor([0]))[1]
        given, native = call(NEXT, return_dict=False)
        assert isinstance(given, tuple) and not native
        with pytest.raises(TypeError, match="input_ids"):
            call(NEXT, input_ids=NEXT)
        call(NEXT)
        with torch.enable_grad():
            assert not call(NEXT)[1]


@torch.no_grad()
def test_a_large_batch_is_multiplied_by_the_heads_module(heads):
    model, *parts = model_of("llama", head=8)
    with native_steps(model, "llama", Decoder(*parts)) as taken:
        for batch, native in ((FEW_TOKENS, True), (FEW_TOKENS + 1, False)):
            tokens = torch.randint(2, VOCAB, (batch, 5))
            cache = model(tokens, past_key_values=DynamicCache(), use_cache=True).past_key_values
            heads.clear()
            assert model(tokens[:, :1], past_key_values=cache, use_cache=True).logits.shape == (batch, 1, VOCAB)
            assert taken[-1] == "step_on" and (not heads) == native
