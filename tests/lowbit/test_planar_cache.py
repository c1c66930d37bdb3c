"""Decoding steps on the Triton kernels, which Triton's interpreter runs on CPU tensors: each says what the packed cache says without.

What is run stands in `SCENARIOS`, once for both: here on reference operations, in a child process on the kernels.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from interpreter import interpret, launches_of, needs_triton

sys.path.insert(0, str(Path(__file__).parent))

from lowbit import integer, kv_planar, planar_cache
from lowbit.cache import KVGrid, PackedCache, PackedCacheLayer, attach_packed_cache
from lowbit.held import Held, attended
from lowbit.micro_batches import in_micro_batches
from lowbit.planar_cache import PlanarCacheLayer, kind_for
from lowbit.sinks import announce, leading
from lowbit.sinks import attach as attach_sinks
from test_cache import FAMILIES, decode_in_pieces, new_model, observed_grids, quantized_model, tokens

STEPS = [4, 1, 2, 1]


def packed_model(family, bits=4, attention="sdpa", dtype=torch.float32, **changes):
    model, grids, blocks = quantized_model(family, bits, dtype, attention)
    attach_packed_cache(model, blocks, [replace(grid, **changes) for grid in grids])
    return model


def in_steps(family, *how, batch=1, length=8, pieces=STEPS, **more):
    """Logits of decoding in pieces."""
    return decode_in_pieces(packed_model(family, *how, **more), tokens(batch, length), pieces)[0]


def past_the_memory():
    """Memory for four tokens at first."""
    with patch.object(planar_cache, "LEAST_TOKENS", 4):
        return in_steps("llama", length=5, pieces=[3, 1, 1])


def quantized_softmax(family, bits):
    model = packed_model(family, attention="lowbit")
    for module in model.modules():
        module.softmax_bits = bits
    return decode_in_pieces(model, tokens(2, 8), [6, 1, 1])[0]


def with_sinks(count):
    """The first tokens of each row stay in full precision; the first row is padded on the left."""
    model, ids, mask = packed_model("llama", sinks=count), tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    attach_sinks(model.model, count)
    mask[0, :3], cache, logits = 0, None, []
    for step in (slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 8)):
        out = model(ids[:, step], attention_mask=mask[:, : step.stop], past_key_values=cache)
        cache, logits = out.past_key_values, [*logits, out.logits[:, -1]]
    return torch.stack(logits)


def padded_rows(**options):
    """Logits and sequences that `generate` finds for two rows, one with padding on its left."""
    model, ids = packed_model("mistral", **options), tokens(2, 6)
    ids[1, :3] = 0
    how = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=3, **how)
    return torch.cat([torch.stack(out.logits).flatten(), out.sequences.flatten()])


def beams():
    model, ids = packed_model("llama"), tokens(2, 5)
    return model.generate(ids, num_beams=2, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(ids))


def cropped():
    model, ids = packed_model("llama"), tokens(2, 7)
    _, cache = decode_in_pieces(model, ids, [5, 1, 1])
    cache.crop(-4)
    assert cache.get_seq_length() == 3
    return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(3, 6)])


def moved_rows():
    """Rows are swapped, repeated and selected; the cache is then forgotten and filled again."""
    model, ids, found = packed_model("llama"), tokens(2, 6), []
    cache = model(ids).past_key_values
    for change, argument, rows in (
        ("reorder_cache", torch.tensor([1, 0]), [1, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
        ("batch_select_indices", torch.tensor([0, 3]), [0, 3]),
    ):
        getattr(cache, change)(argument)
        ids = ids[rows]
        found.append(model(ids[:, :1], past_key_values=cache).logits.flatten())
    before = cache.get_seq_length()
    cache.reset()
    assert before == 9 and cache.get_seq_length() == 0 and cache.packed_bytes == 0
    return torch.cat([*found, decode_in_pieces(model, ids, [4, 1, 1])[0].flatten()])


def with_gradients():
    """Embeddings ask for a gradient, which no kernel has."""
    model = packed_model("llama")
    cache = model(tokens(1, 4)).past_key_values
    with torch.enable_grad():
        logits = model(tokens(1, 1), past_key_values=cache).logits
        logits.sum().backward()
    return torch.cat([logits.detach().flatten(), model.model.embed_tokens.weight.grad.flatten()])


def all_attentions():
    model, ids = packed_model("llama", attention="lowbit"), tokens(1, 6)
    cache = model(ids[:, :5]).past_key_values
    return torch.cat([a.flatten() for a in model(ids[:, 5:], past_key_values=cache, output_attentions=True).attentions])


def in_parts():
    """A layer filled by two batches of sequences, and then by a step of both."""
    cache = PackedCache([grid_of()])

    def run(x, past_key_values=None):
        return sum(past_key_values.update(x, x + 1, 0))

    x = torch.randn(4, 2, 5, 8, generator=torch.Generator().manual_seed(0)) * 4
    filled = in_micro_batches(run, (x,), {"past_key_values": cache}, layer=0, tokens=10)
    key, value = cache.update(x[:, :, :1], x[:, :, 1:2], 0)
    return torch.cat([filled.flatten(), (key + 0).flatten(), (value + 0).flatten()])


def grid_of(bits=4, **more):
    scale, zero = torch.linspace(0.4, 0.9, 16).view(2, 8), torch.arange(16.0).view(2, 8) % 7
    return KVGrid(scale, zero, scale.flip(0), zero.flip(0), bits, None, 0, **more)


# name -> what runs, and how many layers of how many steps attend by the kernel
SCENARIOS = {
    "8 bits": (functools.partial(in_steps, "llama", 8), 2 * 2),
    "4 bits": (functools.partial(in_steps, "llama", 4, batch=2), 2 * 2),
    "3 bits": (functools.partial(in_steps, "llama", 3), 2 * 2),
    "a prompt of one token": (functools.partial(in_steps, "llama", length=3, pieces=1), 2 * 3),
    "past the memory": (past_the_memory, 2 * 2),
    "bfloat16": (functools.partial(in_steps, "llama", dtype=torch.bfloat16), 2 * 2),
    "float16": (functools.partial(in_steps, "llama", dtype=torch.float16), 2 * 2),
    "no rotary": (functools.partial(in_steps, "opt", 4), 2 * 2),
    "partly rotary": (functools.partial(in_steps, "gpt_neox", 8), 2 * 2),
    "two rotations, windows": (functools.partial(in_steps, "gemma3_text"), 2 * 2),
    "softcap": (functools.partial(in_steps, "gemma2", attention="lowbit"), 2 * 2),
    "quantized softmax": (functools.partial(quantized_softmax, "llama", 6), 2 * 2),
    "sinks": (functools.partial(with_sinks, 2), 2 * 3),
    "padding on the left": (padded_rows, 2 * 2),
    "padding on the left, written masks": (functools.partial(padded_rows, attention="lowbit"), 2 * 2),
    "beams": (beams, 2 * 2),
    "crop": (cropped, 2 * 2 + 2 * 3),
    "moved rows": (moved_rows, 2 * 3 + 2 * 2),
    "eager attention": (functools.partial(in_steps, "llama", attention="eager"), 0),
    "pairs of neighbours": (functools.partial(in_steps, "gptj", attention="eager"), 0),
    "float64": (functools.partial(in_steps, "llama", dtype=torch.float64), 0),
    "gradients": (with_gradients, 0),
    "attentions": (all_attentions, 0),
    "micro-batches": (in_parts, 0),
}
CHILD = """
import sys, torch
from dataclasses import replace
from lowbit import integer
integer.KERNELS["cpu"] = replace(integer.KERNELS["cuda"], run_on=lambda device: True)
from lowbit.triton import kv
import test_planar_cache as here
def counted(name, run):
    def call(*given, **more):
        calls[name] += 1
        return run(*given, **more)
    return call
for name in ("kv_append", "attention_decode"):
    setattr(kv, name, counted(name, getattr(kv, name)))
found = {}
with torch.no_grad():
    for scenario, (run, _) in here.SCENARIOS.items():
        calls = dict.fromkeys(("kv_append", "attention_decode"), 0)
        found[scenario] = run(), calls
torch.save(found, sys.argv[1])
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results and calls on the kernels."""
    folder = tmp_path_factory.mktemp("planar")
    tests = Path(__file__).parent
    interpret(CHILD, folder, "out", paths=[tests, tests.parent])
    return torch.load(folder / "out")


@needs_triton
@pytest.mark.parametrize("name", SCENARIOS)
@torch.no_grad()
def test_the_kernels_find_what_the_reference_does(name, found):
    run, steps = SCENARIOS[name]
    (actual, calls), expected = found[name], run()
    # float32: sums in another order. In half precision keys, scores and probabilities are rounded at other places, to 2^-8 and 2^-11, so
    # that a key or value of the next block at the edge between two of 16 codes falls to its other side: a few hundredths of a logit.
    near = 5e-2 if "float16" in name else 1e-4
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= near * expected.abs().max()
    assert calls["attention_decode"] == steps
    assert (calls["kv_append"] == 0) == (name in ("pairs of neighbours", "float64"))


@pytest.fixture
def launches(monkeypatch):
    """What would be launched on a device without numbers, "meta": (kernel, its tensors' devices)."""
    from lowbit.triton import kv

    return launches_of(monkeypatch, [(kv, f"{name}_kernel") for name in ("append", "decode", "join")], kv)


@needs_triton
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
def test_no_number_leaves_the_device_and_no_tensor_is_elsewhere(family, launches):
    """Grids are made on the CPU; any look at a number on "meta" is an error."""
    with torch.no_grad():
        model, (_, path, *_) = new_model(family, "sdpa"), FAMILIES[family][1]
        attach_packed_cache(model, list(model.get_submodule(path)), observed_grids(family, model, 3))
        model.to("meta")
        cache = model(torch.ones(2, 5, dtype=torch.long, device="meta")).past_key_values
        assert launches == [("append_kernel", {"meta"})] * 2
        launches.clear()
        logits = model(torch.ones(2, 1, dtype=torch.long, device="meta"), past_key_values=cache).logits
    assert launches == [(f"{kernel}_kernel", {"meta"}) for kernel in ("append", "decode", "join")] * 2
    assert logits.is_meta and all(type(layer) is PlanarCacheLayer for layer in cache.layers)


@pytest.fixture
def planar(monkeypatch):
    """A planar layer of 3 tokens of 2 sequences, held by reference operations in the kernels' place, and what the next step shows of it."""
    monkeypatch.setitem(
        integer.KERNELS, "cpu", replace(integer.KERNELS["cuda"], run_on=lambda device: True, cache="lowbit.kv_planar")
    )
    monkeypatch.setattr(kv_planar, "kv_append", kv_planar.append, raising=False)
    cache = PackedCache([grid_of()])
    cache.update(*[torch.randn(2, 2, 2, 8, generator=torch.Generator().manual_seed(i)) * 3 for i in range(2)], 0)
    keys, values = cache.update(torch.ones(2, 2, 1, 8), torch.ones(2, 2, 1, 8), 0)
    return cache.layers[0], keys, values


def test_what_is_held_is_decoded_by_any_operation(planar):
    layer, keys, values = planar
    assert type(keys) is Held and (keys.shape, keys.dtype, keys.device.type) == ((2, 2, 3, 8), torch.float32, "cpu")
    for held, plain in zip((keys, values), layer.decoded()):
        for made in (
            held + 0,
            torch.cat([held]),
            held[:, :, :, None].expand(-1, -1, -1, 2, -1)[..., 0, :],
            held.clone(),
        ):
            assert type(made) is torch.Tensor and torch.equal(made, plain)
    late, _ = layer.update(torch.ones(2, 2, 1, 8), torch.ones(2, 2, 1, 8))
    layer.crop(-1)
    with pytest.raises(RuntimeError, match="of 4 tokens are asked for when the cache holds 3"):
        late + 0
    assert torch.equal(keys + 0, layer.decoded()[0])


def test_keys_and_values_are_decoded_once_for_whatever_looks(planar, monkeypatch):
    layer, keys, values = planar
    calls, run = [], layer.decoded
    monkeypatch.setattr(layer, "decoded", lambda: calls.append(1) or run())
    torch.cat([keys, values, keys + values])
    assert calls == [1]


def test_attention_is_that_of_what_is_decoded(planar, monkeypatch):
    """Whatever the kernel does not take: other queries, masks, dropout, gradients, keys in the place of values."""
    layer, keys, values = planar
    plain_keys, plain_values = layer.decoded()
    random = torch.Generator().manual_seed(3)
    one, two, wide = (torch.randn(2, 2, n, 8, generator=random) for n in (1, 2, 6))
    seen = torch.tensor([[True, True, False], [True, False, True]])
    bias = torch.randn(2, 1, 1, 3, generator=random)
    calls, run = [], kv_planar.attention_decode
    monkeypatch.setattr(kv_planar, "attention_decode", lambda *given, **more: calls.append(1) or run(*given, **more))
    for query, given, more, taken in (
        (one, (keys, values), {}, True),
        (one, (keys, values), {"scale": 0.7, "attn_mask": seen[:, None, None]}, True),
        (one, (keys, values), {"attn_mask": seen[:1, None, None]}, True),
        (two, (keys, values), {}, True),
        (wide.transpose(1, 2), (keys, values), {"enable_gqa": True}, True),
        (torch.cat([one, one + 1], 1), (keys, values), {"enable_gqa": True}, True),
        (two, (keys, values), {"is_causal": True}, False),
        (two, (keys, values), {"attn_mask": seen[:, None, :2, None].expand(-1, 1, 2, 3)}, False),
        (one, (keys, values), {"attn_mask": bias}, False),
        (one, (keys, values), {"dropout_p": 1.0}, False),
        (one, (values, keys), {}, False),
        (one, (keys, plain_values), {}, False),
        (one.clone().requires_grad_(), (keys, values), {}, False),
    ):
        by_hand = [{id(keys): plain_keys, id(values): plain_values}.get(id(t), t) for t in given]
        expected = F.scaled_dot_product_attention(query, *by_hand, **more)
        calls.clear()
        actual = F.scaled_dot_product_attention(query, *given, **more)
        torch.testing.assert_close(actual, expected)
        assert bool(calls) == taken and type(actual) is torch.Tensor
    assert attended(one.double(), keys, values, None) is None and attended(one[:1], keys, values, None) is None
    assert (
        attended(one[:, :1].expand(-1, 3, -1, -1), keys, values, None) is None
        and attended(one, *(keys, 0), None) is None
    )


def test_a_layer_is_planar_only_where_the_kernels_are(planar):
    keys = torch.zeros(1, 2, 3, 8)
    for grid, like, kind in (
        (grid_of(3), keys.half(), PlanarCacheLayer),
        (grid_of(), keys.double(), PackedCacheLayer),
        (replace(grid_of(), rotary="interleaved", rotary_dim=4), keys, PackedCacheLayer),
        (KVGrid(*torch.ones(4, 2, 12).unbind(0), 4, None, 0), torch.zeros(1, 2, 3, 12), PackedCacheLayer),
        (grid_of(), keys.to("meta"), PackedCacheLayer),
    ):
        assert kind_for(grid, like) is kind


def test_bytes_are_those_of_the_tokens_held(planar):
    layer, *_ = planar
    assert layer.bytes == 2 * 2 * 2 * 3 * 4 and layer.kv.capacity == kv_planar.LEAST_TOKENS
    cache = PackedCache([grid_of(sinks=1)])
    announce(leading(2, 2, 1))
    cache.update(torch.ones(2, 2, 2, 8), torch.ones(2, 2, 2, 8), 0)
    announce(None)
    assert cache.packed_bytes == 2 * 2 * 2 * 2 * 4 + 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_a_graph_being_compiled_has_reference_operations(family, planar, monkeypatch):
    model, ids = packed_model(family), tokens(1, 6)
    expected = model(ids, use_cache=False).logits[:, 5:]
    cache = model(ids[:, :5]).past_key_values
    assert all(type(layer) is PlanarCacheLayer for layer in cache.layers)
    monkeypatch.setattr(kv_planar, "kv_append", None)
    torch._dynamo.reset()
    found = torch.compile(model, backend="eager")(ids[:, 5:], past_key_values=cache).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_sinks_go_where_their_tokens_go(planar):
    """Through all that moves rows and tokens, beside the layer that is not planar."""
    layers, x = [kind(grid_of(sinks=1)) for kind in (PlanarCacheLayer, PackedCacheLayer)], torch.randn(2, 2, 4, 8) * 3
    announce(torch.tensor([[False, True, False, False], [True, False, False, False]]))
    for layer in layers:
        layer.update(x, x + 1)
    announce(None)
    for method, argument in (
        ("reorder_cache", torch.tensor([1, 0])),
        ("batch_repeat_interleave", 2),
        ("batch_select_indices", torch.tensor([3, 0])),
        ("crop", 0),
        ("crop", -2),
        ("crop", -1),
    ):
        for layer in layers:
            getattr(layer, method)(argument)
        for actual, expected in zip(layers[0].decoded(), layers[1].decoded(), strict=True):
            assert actual.shape == expected.shape and torch.equal(actual, expected)
        assert layers[0].bytes == layers[1].bytes and layers[0].get_seq_length() == layers[1].get_seq_length()
    with pytest.raises(ValueError, match="negative"):
        layers[0].crop(1)
