"""The "lowbit" attention: eager's results without softmax_bits, the fixed [0, 1] grid with it."""

import pytest
import torch
from lowbit.attention import lowbit_attention, quantize_probabilities
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, WINDOW = 61, 4
GROUPED = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
GEMMA = dict(GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW)
FAMILIES = {
    "opt": dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4),
    "llama": GROUPED,
    "mistral": dict(GROUPED, sliding_window=WINDOW),
    "gemma2": dict(GEMMA, layer_types=["sliding_attention", "full_attention"], attn_logit_softcapping=0.5),
    "gpt_neox": dict(hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
}


def new_model(family):
    torch.manual_seed(7)
    settings = {**FAMILIES[family], "vocab_size": VOCAB, "max_position_embeddings": 64, "initializer_range": 0.3}
    config = AutoConfig.for_model(family, **settings, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def padded_batch():
    ids = torch.randint(2, VOCAB, (2, 10), generator=torch.Generator().manual_seed(1))
    ids[1, :3] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def attentions(model):
    return [module for name, module in model.named_modules() if name.endswith(("attn", "attention"))]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_without_softmax_bits_it_is_eager(family):
    model, batch = new_model(family), padded_batch()
    seen = batch["attention_mask"].bool()  # rows of padding attend to nothing and may hold anything
    expected = model(**batch).logits[seen]
    model.set_attn_implementation("lowbit")
    for bits in (None, 16):
        for module in attentions(model) if bits else []:
            module.softmax_bits = bits
        actual = model(**batch).logits[seen]
        # the same operations in the same order; grouped heads are repeated by another call
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_softmax_bits_reach_the_model_and_fewer_bits_err_more(family):
    model, batch = new_model(family), padded_batch()
    expected = model(**batch).logits[batch["attention_mask"].bool()]
    model.set_attn_implementation("lowbit")
    errors = []
    for bits in (8, 4, 2):
        assert len(attentions(model)) == 2
        for module in attentions(model):
            module.softmax_bits = bits
        out = model(**batch, output_attentions=True)
        errors.append((out.logits[batch["attention_mask"].bool()] - expected).abs().mean())
        scaled = out.attentions[0] * (2**bits - 1)
        torch.testing.assert_close(scaled, scaled.round(), rtol=0, atol=1e-4)  # float32 division and product
    assert 0 < errors[0] < errors[1] < errors[2]


def oracle(query, key, value, *, scaling, bits, window=None, softcap=None):
    """One query and head at a time, from the formula."""
    B, H, T, D = query.shape
    S, repeats = key.shape[2], H // key.shape[1]
    out = torch.zeros(B, T, H, D)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                last = S - T + t
                first = 0 if window is None else max(0, last - window + 1)
                scores = key[b, h // repeats, first : last + 1] @ query[b, h, t] * scaling
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                p = (scores - scores.max()).exp()
                p = (p / p.sum() * (2**bits - 1)).round() / (2**bits - 1)
                out[b, t, h] = p @ value[b, h // repeats, first : last + 1]
    return out


def example(T=5, S=5):
    generator = torch.Generator().manual_seed(2)
    sizes = ((2, 4, T, 8), (2, 2, S, 8), (2, 2, S, 8))
    return [torch.randn(size, generator=generator) for size in sizes]


def module_with(**attributes):
    module = nn.Module().eval()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("T, S, softcap", [(5, 5, None), (2, 5, None), (1, 5, 2.0), (5, 5, 2.0)])
def test_matches_the_oracle(bits, T, S, softcap):
    query, key, value = example(T, S)
    module = module_with(softmax_bits=bits, is_causal=True)
    actual, _ = lowbit_attention(module, query, key, value, None, scaling=0.7, softcap=softcap)
    expected = oracle(query, key, value, scaling=0.7, bits=bits, softcap=softcap)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_additive_and_bool_masks_carry_the_window():
    query, key, value = example()
    look = torch.ones(5, 5, dtype=torch.bool).tril() & torch.ones(5, 5, dtype=torch.bool).triu(-1)
    additive = torch.zeros(5, 5).masked_fill(~look, torch.finfo(torch.float32).min)
    expected = oracle(query, key, value, scaling=0.7, bits=8, window=2)
    for mask in (look, additive):
        actual, _ = lowbit_attention(module_with(softmax_bits=8), query, key, value, mask[None, None], scaling=0.7)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_no_mask_and_not_causal_looks_everywhere():
    query, key, value = example()
    _, probabilities = lowbit_attention(module_with(is_causal=False), query, key, value, None)
    assert (probabilities > 0).all()
    _, probabilities = lowbit_attention(module_with(is_causal=True), query, key, value, None, is_causal=False)
    assert (probabilities > 0).all()


def test_probabilities_by_hand():
    p = torch.tensor([0.0, 0.1, 0.5, 1.0])
    assert torch.equal(quantize_probabilities(p, 2), torch.tensor([0.0, 0.0, 2.0, 3.0]) / 3)  # 0.3, 1.5 to even, 3


def test_bfloat16_softmax_is_quantized_in_float32():
    """255 levels do not survive bfloat16's 8 bits: rounding must come before the cast."""
    query, key, value = (t.bfloat16() for t in example())
    _, actual = lowbit_attention(module_with(softmax_bits=8), query, key, value, None, scaling=0.7)
    scores = (query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * 0.7).float()
    scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    assert torch.equal(actual, ((scores.softmax(-1) * 255).round() / 255).bfloat16())


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_bits_without_a_grid_are_refused(bits):
    with pytest.raises(ValueError, match=f"softmax_bits is {bits}"):
        lowbit_attention(module_with(softmax_bits=bits), *example(), None)


def test_attention_sinks_are_refused():
    with pytest.raises(ValueError, match="attention sinks"):
        lowbit_attention(module_with(), *example(), None, s_aux=torch.zeros(4))
