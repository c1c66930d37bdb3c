"""The packed KV cache inside real tiny models: whatever the cache returns must be what the uncached model sees.

Each model's keys (before rotary) and values are put on static grids by hooks at the projections, as a compressed
model's own modules do. Then the cache loses nothing, and decoding with it must equal one full forward pass.
"""

import functools

import pytest
import torch
from lowbit.cache import KVGrid, PackedCache, attach_packed_cache, rotate
from lowbit.packing import unpack
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

VOCAB, WINDOW = 61, 4
GROUPED = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
GEMMA = dict(GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW)
HALF_8 = dict(rotary="half", rotary_dim=8)
LOCAL_GLOBAL = ["sliding_attention", "full_attention"]
# config, KV heads, where the blocks are, how keys leave the projections, rotary
FAMILIES = {
    "opt": (
        dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4),
        (4, "model.decoder.layers", "separate", dict(rotary=None, rotary_dim=0)),
    ),
    "llama": (GROUPED, (2, "model.layers", "separate", HALF_8)),
    "mistral": (dict(GROUPED, sliding_window=WINDOW), (2, "model.layers", "separate", HALF_8)),
    "gemma2": (dict(GEMMA, layer_types=LOCAL_GLOBAL), (2, "model.layers", "separate", HALF_8)),
    "gemma3_text": (dict(GEMMA, layer_types=LOCAL_GLOBAL), (2, "model.layers", "normed", HALF_8)),
    "gpt_neox": (
        dict(hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, rotary_pct=0.25),
        (4, "gpt_neox.layers", "fused", dict(rotary="half", rotary_dim=4)),
    ),
    "phi": (
        dict(GROUPED, num_key_value_heads=4, partial_rotary_factor=0.5),
        (4, "model.layers", "separate", dict(rotary="half", rotary_dim=4)),
    ),
    "gptj": (
        dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
        (4, "transformer.h", "separate", dict(rotary="interleaved", rotary_dim=4)),
    ),
    "bloom": (
        dict(hidden_size=32, n_layer=2, n_head=4),
        (4, "transformer.h", "fused", dict(rotary=None, rotary_dim=0)),
    ),
}


@functools.cache
def _state(family):
    """A tiny model's weights, large enough that attention is far from uniform."""
    torch.manual_seed(7)
    state = new_model(family).state_dict()
    for name, tensor in state.items():
        spread = 1.5 / tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else 0.2
        tensor.copy_(torch.randn(tensor.shape) * spread + (tensor.dim() == 1 and "weight" in name))
    return state


def new_model(family, attention="eager", **changes):
    settings = {**FAMILIES[family][0], "vocab_size": VOCAB, "max_position_embeddings": 64, **changes}
    config = AutoConfig.for_model(family, **settings, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def tap(family, model, change):
    """Apply change(layer, "key" or "value", x [..., H, D]) to keys before rotary and to values; returns handles."""
    heads, path, style, _ = FAMILIES[family][1]
    handles = []

    def on(module, convert):
        handles.append(module.register_forward_hook(lambda module, args, out: convert(out)))

    def flat(layer, kind):
        return lambda out: change(layer, kind, out.unflatten(-1, (heads, -1))).flatten(-2)  # [B, T, H*D] -> [.., H, D]

    def fused(layer):
        def convert(out):
            query, key, value = out.unflatten(-1, (heads, 3, -1)).unbind(-2)  # [B, T, H*3*D] -> 3 x [B, T, H, D]
            changed = [query, change(layer, "key", key), change(layer, "value", value)]
            return torch.stack(changed, dim=-2).flatten(-3)

        return convert

    for layer, block in enumerate(model.get_submodule(path)):
        inside = {name.rsplit(".", 1)[-1]: module for name, module in block.named_modules()}
        if style == "fused":
            on(inside["query_key_value"], fused(layer))
            continue
        on(inside["v_proj"], flat(layer, "value"))
        if style == "normed":  # [B, H, T, D]
            on(inside["k_norm"], lambda out, i=layer: change(i, "key", out.transpose(1, 2)).transpose(1, 2))
        else:
            on(inside["k_proj"], flat(layer, "key"))
    return handles


def fake_quantize(x, scale, zero, bits):
    codes = ((x.float() / scale).round() + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).to(x.dtype)


def observed_grids(family, model, bits):
    """Grids from the ranges of random tokens."""
    seen = {}
    handles = tap(family, model, lambda layer, kind, x: seen.setdefault((layer, kind), x))
    model(tokens(4, 16, seed=99), use_cache=False)
    for handle in handles:
        handle.remove()
    _, _, style, rotary = FAMILIES[family][1]

    def grid(layer, kind):
        low, high = (t.float() for t in seen[layer, kind].flatten(0, 1).aminmax(dim=0))  # [H, D]
        if style == "normed" and kind == "key":  # one norm weight for all heads, so one grid
            low, high = low.amin(0, keepdim=True).expand_as(low), high.amax(0, keepdim=True).expand_as(high)
        scale = (high - low) / (2**bits - 1)
        return scale, (-low / scale).round()

    return [KVGrid(*grid(i, "key"), *grid(i, "value"), bits, **rotary) for i in range(2)]


def quantized_model(family, bits, dtype=torch.float32, attention="eager"):
    """(model with K and V on grids, its grids, its blocks)"""
    model = new_model(family, attention)
    model.load_state_dict(_state(family))
    model.to(dtype)
    grids = observed_grids(family, model, bits)

    def change(layer, kind, x):
        scale, zero = (getattr(grids[layer], f"{kind}_{part}") for part in ("scale", "zero"))
        return fake_quantize(x, scale, zero, bits)

    tap(family, model, change)
    return model, grids, list(model.get_submodule(FAMILIES[family][1][1]))


def tokens(batch, length, seed=0):
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def decode_in_pieces(model, ids, pieces):
    cache, logits = None, []
    for piece in ids.split(pieces, dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


def assert_same_logits(actual, expected):
    # Equal codes leave float32 sums in another order: about 1e-6 of the largest logit. One wrong code moves it 1e-3.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_equal_one_full_forward(family, bits):
    model, grids, blocks = quantized_model(family, bits)
    ids = tokens(2, 11)
    expected = model(ids, use_cache=False).logits
    attach_packed_cache(model, blocks, grids)
    actual, cache = decode_in_pieces(model, ids, [5, 1, 1, 2, 1, 1])
    assert isinstance(cache, PackedCache) and cache.get_seq_length() == 11
    assert_same_logits(actual, expected)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_windows_hold_without_a_written_mask(family):
    """sdpa drops the mask where it can; the cache keeps tokens that left the window, so it must not drop it there."""
    model, grids, blocks = quantized_model(family, 4, attention="sdpa")
    ids = tokens(2, 11)
    expected = model(ids, use_cache=False).logits
    attach_packed_cache(model, blocks, grids)
    for pieces in ([3] + [1] * 8, [4, 4, 3], [11]):
        assert_same_logits(decode_in_pieces(model, ids, pieces)[0], expected)


def test_the_grids_are_what_the_tests_stand_on():
    """Without the hooks on the projections the same models differ visibly, so the equalities above are not vacuous."""
    model, grids, blocks = quantized_model("llama", 3)
    plain = new_model("llama")
    plain.load_state_dict(_state("llama"))
    ids = tokens(2, 11)
    difference = (model(ids).logits - plain(ids).logits).abs().max()
    assert difference > 1e-2 * plain(ids).logits.abs().max()


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_the_sliding_window_matters(family):
    ids = tokens(1, 11)
    narrow, wide = new_model(family), new_model(family, sliding_window=32)
    for model in (narrow, wide):
        model.load_state_dict(_state(family))
    narrow, wide = narrow(ids).logits, wide(ids).logits
    assert torch.allclose(narrow[:, 0], wide[:, 0]) and not torch.allclose(narrow[:, -1], wide[:, -1], rtol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_equals_no_cache(family):
    model, grids, blocks = quantized_model(family, 4)
    ids = tokens(2, 6)
    options = dict(max_new_tokens=6, do_sample=False)
    expected = model.generate(ids, use_cache=False, **options)
    attach_packed_cache(model, blocks, grids)
    out = model.generate(ids, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, expected)
    assert isinstance(out.past_key_values, PackedCache) and out.past_key_values.get_seq_length() == 11


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_rows_equal_rows_alone(family):
    model, grids, blocks = quantized_model(family, 4)
    attach_packed_cache(model, blocks, grids)
    long, short = tokens(1, 7), tokens(1, 4, seed=1)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1)])
    mask = (batch != 0).long()
    options = dict(max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
    together = model.generate(batch, attention_mask=mask, **options)
    for row, ids in enumerate((long, short)):
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(together.sequences[row, 7:], alone.sequences[0, ids.shape[1] :])
        assert_same_logits(torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0])


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_equals_the_dynamic_cache(family):
    model, grids, blocks = quantized_model(family, 4)
    batch = torch.cat([tokens(1, 6), torch.cat([torch.zeros(1, 2, dtype=torch.long), tokens(1, 4, seed=1)], dim=1)])
    options = dict(attention_mask=(batch != 0).long(), num_beams=2, max_new_tokens=6, do_sample=False)
    expected = model.generate(batch, **options)
    attach_packed_cache(model, blocks, grids)
    out = model.generate(batch, return_dict_in_generate=True, **options)
    assert isinstance(out.past_key_values, PackedCache)
    assert torch.equal(out.sequences, expected)


@pytest.mark.parametrize("bits, key_bytes", [(8, 8), (4, 4), (3, 3)])
def test_bytes_held_are_codes_and_one_table_per_rotation(bits, key_bytes):
    for family, tables in (("llama", 1), ("gemma3_text", 2)):
        model, grids, blocks = quantized_model(family, bits)
        attach_packed_cache(model, blocks, grids)
        _, cache = decode_in_pieces(model, tokens(3, 10), [9, 1])
        codes = 2 * 2 * 3 * 2 * 10 * key_bytes  # K and V, layers, batch, heads, tokens, bytes of 8 channels
        angles = tables * 2 * 10 * 4 * 4  # tables, cos and sin, tokens, pairs, float32
        assert cache.packed_bytes == codes + angles
        held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
        assert held == codes


def test_a_one_token_prompt_does_not_merge_two_rotations():
    """At position 0 every rotation is the identity: the two of Gemma 3 must be told apart all the same."""
    model, grids, blocks = quantized_model("gemma3_text", 4)
    ids = tokens(1, 9)
    expected = model(ids, use_cache=False).logits
    attach_packed_cache(model, blocks, grids)
    actual, cache = decode_in_pieces(model, ids, 1)
    assert len(cache.rotations) == 2
    assert_same_logits(actual, expected)


def test_cached_codes_are_the_codes_of_the_projections():
    model, grids, blocks = quantized_model("llama", 4)
    seen = {}
    tap("llama", model, lambda layer, kind, x: seen.setdefault((layer, kind), x))
    attach_packed_cache(model, blocks, grids)
    cache = model(tokens(2, 7)).past_key_values
    for index, (layer, grid) in enumerate(zip(cache.layers, grids)):
        for packed, kind, scale, zero in (
            (layer.keys, "key", grid.key_scale, grid.key_zero),
            (layer.values, "value", grid.value_scale, grid.value_zero),
        ):
            expected = ((seen[index, kind] / scale).round() + zero).transpose(1, 2)  # [B, T, H, D] -> [B, H, T, D]
            assert torch.equal(unpack(packed, 4, 8).float(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary, rotary_dim", [("half", 12), ("half", 4), ("interleaved", 6), (None, 0)])
def test_update_returns_the_very_bits_it_was_given(dtype, rotary, rotary_dim):
    """On-grid keys come back bit for bit, also when cos and sin carry a scale, as YaRN's do."""
    generator = torch.Generator().manual_seed(3)
    scale, zero = torch.rand(2, 12, generator=generator) + 0.5, torch.randint(4, 12, (2, 12), generator=generator)
    grid = KVGrid(scale, zero.float(), scale, zero.float(), 4, rotary, rotary_dim)
    codes = torch.randint(0, 16, (3, 2, 5, 12), generator=generator)
    x = ((codes - zero.unsqueeze(1)) * scale.unsqueeze(1)).to(dtype)
    angles = torch.rand(3, 5, rotary_dim // 2, generator=generator) * 6
    cos, sin = (1.3 * angles.cos()).to(dtype), (1.3 * angles.sin()).to(dtype)
    cache, keys = PackedCache([grid]), x
    if rotary:
        keys = rotate(x, cos, sin, rotary)
        cache.announce(0, cos, cos, sin)
    decoded_keys, decoded_values = cache.update(keys, x, 0)
    assert torch.equal(decoded_keys, keys) and torch.equal(decoded_values, x)
    assert torch.equal(unpack(cache.layers[0].keys, 4, 12), codes.to(torch.uint8))


def test_rotate_matches_complex_multiplication():
    generator = torch.Generator().manual_seed(5)
    x, angles = torch.randn(2, 3, 4, 10, generator=generator), torch.rand(1, 4, 3, generator=generator) * 6
    turn = torch.polar(torch.ones(()), angles).unsqueeze(1)  # [1, 1, T, R/2]
    half = torch.complex(x[..., 0:3], x[..., 3:6]) * turn
    expected = torch.cat([half.real, half.imag, x[..., 6:]], dim=-1)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin(), "half"), expected)
    pairs = torch.complex(x[..., 0:6:2], x[..., 1:6:2]) * turn
    expected = torch.cat([torch.view_as_real(pairs).flatten(-2), x[..., 6:]], dim=-1)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin(), "interleaved"), expected)


def test_tables_follow_keys_to_another_device():
    cos, sin = torch.ones(1, 4, 3), torch.zeros(1, 4, 3)
    assert rotate(torch.empty(2, 3, 4, 10, device="meta"), cos, sin, "half").device.type == "meta"


@pytest.mark.parametrize("family", ["llama", "gptj", "gemma3_text"])
def test_cropping_and_decoding_again_changes_nothing(family):
    model, grids, blocks = quantized_model(family, 4)
    attach_packed_cache(model, blocks, grids)
    ids = tokens(2, 9)
    expected, cache = decode_in_pieces(model, ids, [6, 3])
    cache.crop(-5)
    assert cache.get_seq_length() == 4
    again = model(ids[:, 4:], past_key_values=cache).logits
    assert_same_logits(again, expected[:, 4:])
    cache.crop(0)
    assert cache.get_seq_length() == 9
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)


def test_rows_can_be_repeated_selected_and_reset():
    model, grids, blocks = quantized_model("llama", 4)
    attach_packed_cache(model, blocks, grids)
    ids, position_ids = tokens(2, 6), torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])

    def step(cache, rows):
        """The next token on `rows` of the batch."""
        grown = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)[rows]
        positions = (position_ids[:, -1:] + 1)[rows]
        return model(ids[rows, -1:], attention_mask=grown, position_ids=positions, past_key_values=cache).logits

    def prefill():
        return model(ids, attention_mask=mask, position_ids=position_ids).past_key_values

    expected = step(prefill(), [0, 1])
    repeated = prefill()
    repeated.batch_repeat_interleave(2)
    assert_same_logits(step(repeated, [0, 0, 1, 1]), expected[[0, 0, 1, 1]])
    selected = prefill()
    selected.batch_select_indices(torch.tensor([1]))
    assert_same_logits(step(selected, [1]), expected[[1]])
    swapped = prefill()
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert_same_logits(step(swapped, [1, 0]), expected[[1, 0]])
    swapped.reset()
    assert swapped.get_seq_length() == 0 and swapped.packed_bytes == 0
    refilled = model(ids, attention_mask=mask, position_ids=position_ids, past_key_values=swapped).past_key_values
    assert refilled is swapped
    assert_same_logits(step(swapped, [0, 1]), expected)


def test_a_layer_without_a_grid_stays_in_full_precision():
    model, grids, blocks = quantized_model("llama", 4)
    ids = tokens(2, 8)
    expected = model(ids, use_cache=False).logits
    attach_packed_cache(model, blocks, [None, grids[1]])
    actual, cache = decode_in_pieces(model, ids, [5, 1, 1, 1])
    assert_same_logits(actual, expected)
    assert cache.layers[0].keys.dtype == torch.float32 and cache.layers[1].keys.dtype == torch.uint8
    codes, full, angles = 2 * 2 * 2 * 8 * 4, 2 * 2 * 2 * 8 * 8 * 4, 2 * 8 * 4 * 4
    assert cache.packed_bytes == codes + full + angles


@pytest.mark.parametrize("family", ["llama", "gptj", "gemma3_text"])
def test_bfloat16_equals_the_dynamic_cache(family):
    """Bit for bit at 4 bits, where turning a bfloat16 key back stays within half a step; at 8 bits it may leave it."""
    ids, pieces = tokens(2, 9), [5, 1, 1, 1, 1]
    for bits, allowed in ((4, 0.0), (8, 0.03)):  # a flipped 8-bit code moves a bfloat16 logit about 1% of the largest
        model, grids, blocks = quantized_model(family, bits, torch.bfloat16)
        expected, _ = decode_in_pieces(model, ids, pieces)
        attach_packed_cache(model, blocks, grids)
        actual, cache = decode_in_pieces(model, ids, pieces)
        assert cache.layers[0].keys.dtype == torch.uint8
        assert (actual - expected).abs().max() <= allowed * expected.abs().max()


def test_caches_the_caller_brings_are_respected():
    model, grids, blocks = quantized_model("llama", 4)
    ids = tokens(1, 6)
    used = model(ids).past_key_values
    handles = attach_packed_cache(model, blocks, grids)
    assert model(ids, use_cache=False).past_key_values is None
    assert isinstance(model(ids, past_key_values=DynamicCache()).past_key_values, PackedCache)
    assert type(model(ids[:, :1], past_key_values=used).past_key_values) is DynamicCache
    for handle in handles:
        handle.remove()
    assert type(model(ids).past_key_values) is DynamicCache


def grid_of(**changes):
    fields = dict(bits=4, rotary="half", rotary_dim=8)
    tensors = ("key_scale", "key_zero", "value_scale", "value_zero")
    return KVGrid(**{name: torch.ones(2, 8) for name in tensors} | fields | changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(bits=5),
        dict(rotary="full"),
        dict(rotary_dim=7),
        dict(rotary_dim=10),
        dict(rotary=None),
        dict(rotary_dim=0),
        dict(key_scale=torch.zeros(2, 8)),
        dict(value_zero=torch.zeros(2, 4)),
    ],
)
def test_grids_that_make_no_sense_are_refused(changes):
    with pytest.raises(ValueError) as refused:
        grid_of(**changes)
    assert "\n" not in str(refused.value)


def test_keys_without_their_rotation_are_refused():
    cache, x = PackedCache([grid_of()]), torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="rotation of 0 tokens is known, 0 are cached and 3 arrive"):
        cache.update(x, x, 0)
    cos = torch.ones(1, 2, 4)
    cache.announce(0, cos, cos, cos)
    with pytest.raises(ValueError, match="rotation of 2 tokens is known, 0 are cached and 3 arrive"):
        cache.update(x, x, 0)
    with pytest.raises(ValueError, match="rotates 6 channels, its grid says 8"):
        PackedCache([grid_of()]).announce(0, cos, cos[..., :3], cos[..., :3])


def test_models_and_grids_that_do_not_match_are_refused():
    model, grids, blocks = quantized_model("llama", 4)
    with pytest.raises(ValueError, match="1 grids for 2 blocks"):
        attach_packed_cache(model, blocks, grids[:1])
    with pytest.raises(ValueError, match="not inside"):
        attach_packed_cache(new_model("llama"), blocks, grids)
    opt, opt_grids, _ = quantized_model("opt", 4)
    attach_packed_cache(model, blocks, opt_grids)
    with pytest.raises(ValueError, match="keys have 2 heads of 8 channels, the grid"):
        model(tokens(1, 4))
