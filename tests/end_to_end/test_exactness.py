"""Reordering and smoothing leave the function of a model as it was: in fp32, to 1e-5 of the largest value."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from tiny_models import FAMILIES
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, OPTConfig

import rptq
from ptq import reorder
from ptq.balance import balance
from ptq.blocks import linear_paths, load_block, norm_paths, run_block
from ptq.recipe_build import build
from ptq.sites import Statistics, collect, until_last_input

# What folding each site needs in an Orders dict: R2 and R3 act on query heads too, under "q" and "o".
PARTS = {"R1": ("R1",), "R2": ("R2", "q"), "R3": ("R3", "o"), "R4": ("R4",), "R5": ("R5",)}
MAY_PERMUTE_QK = ("opt", "gpt2", "bloom")
CLUSTERS = {"R1": 8, "R2": 2, "R3": 3, "R4": 8, "R5": 8}


def assert_same(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    """float32 sums in another order differ by far less than 1e-5 of the largest value; a wrong channel by about 1."""
    assert float((actual - expected).abs().max() / expected.abs().max()) < relative


def fresh_block(seen):
    return load_block(seen.model, seen.spec, 0, seen.names, seen.checkpoint, device=torch.device("cpu"))


def outputs(seen, block) -> torch.Tensor:
    with torch.no_grad():
        return run_block(block, seen.states, seen.call)


def statistics(seen, block) -> Statistics:
    def forward():
        until_last_input(lambda: run_block(block, seen.states, seen.call))

    with torch.no_grad():
        return collect(block, seen.spec, seen.geometry, forward, ranges=True, hessians=False, where="block", every=1)


def measured(seen, block) -> dict[str, rptq.ChannelRange]:
    return statistics(seen, block).ranges


def planned(seen) -> reorder.Orders:
    return reorder.plan_orders(
        measured(seen, fresh_block(seen)), build(clusters=CLUSTERS), seen.spec, seen.geometry, "block"
    )


def shuffled(seen, seed: int = 0) -> reorder.Orders:
    """Random orders at every site, R2 included, each KV head its own."""
    g, random = seen.geometry, torch.Generator().manual_seed(seed)
    groups = {"n_kv": g.kv_heads, "n_query_per_kv": g.heads // g.kv_heads}

    def flat(channels):
        return rptq.Order(torch.randperm(channels, generator=random), torch.tensor([channels]))

    def by_head():
        within = [torch.randperm(g.head_dim, generator=random) + h * g.head_dim for h in range(g.kv_heads)]
        return rptq.Order(torch.cat(within), torch.full((g.kv_heads,), g.head_dim))

    block = fresh_block(seen)
    width = block.get_submodule(seen.spec.down).in_features
    hidden = seen.states.shape[-1]
    orders = {"R1": flat(hidden), "R4": flat(hidden), "R5": flat(width), "R2": by_head(), "R3": by_head()}
    if seen.spec.mlp_norm is None:
        del orders["R4"]
    return orders | {
        "q": rptq.expand_to_query_groups(orders["R2"], **groups),
        "o": rptq.expand_to_query_groups(orders["R3"], **groups),
    }


def only(orders: reorder.Orders, *sites: str) -> reorder.Orders:
    return {name: orders[name] for site in sites for name in PARTS[site] if name in orders}


def folded(seen, orders):
    block = fresh_block(seen)
    reorder.fold_orders(block, seen.spec, seen.geometry, orders)
    return block


def test_a_loaded_block_computes_what_the_model_computes(family, opened, model_folder):
    seen = opened(model_folder(family))
    # sums run in the same order, only Conv1D is transposed and RMSNorm kinds are rewritten
    assert_same(outputs(seen, fresh_block(seen)), seen.after_block_0, 1e-6)


@pytest.mark.parametrize("make", [planned, shuffled], ids=["k-means", "random"])
def test_each_site_alone_and_all_together_change_nothing(family, opened, model_folder, make):
    seen = opened(model_folder(family))
    orders = make(seen)
    sites = [s for s in PARTS if s in orders and (s != "R2" or family in MAY_PERMUTE_QK)]
    assert len(sites) >= 3
    for chosen in [(site,) for site in sites] + [tuple(sites)]:
        some = only(orders, *chosen)
        assert any(not torch.equal(o.perm, torch.arange(o.perm.numel())) for o in some.values())
        assert_same(outputs(seen, folded(seen, some)), seen.after_block_0)


def test_queries_and_keys_are_permuted_only_where_nothing_pairs_their_channels(family, opened, model_folder):
    seen = opened(model_folder(family))
    assert ("R2" in planned(seen)) == ("q" in planned(seen)) == (family in MAY_PERMUTE_QK)
    if family not in MAY_PERMUTE_QK:  # and permuting them there would be wrong
        moved = outputs(seen, folded(seen, only(shuffled(seen), "R2")))
        assert float((moved - seen.after_block_0).abs().max() / seen.after_block_0.abs().max()) > 1e-3


_LLAMA = dict(vocab_size=tiny_models.VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2)
VARIANTS = {
    "three query heads a KV head, biases, wide heads": LlamaConfig(
        **_LLAMA, num_attention_heads=6, num_key_value_heads=2, head_dim=16, attention_bias=True, mlp_bias=True
    ),
    "one KV head": LlamaConfig(**_LLAMA, num_attention_heads=4, num_key_value_heads=1),
    "no biases, norms without weights": OPTConfig(
        vocab_size=tiny_models.VOCAB,
        hidden_size=64,
        word_embed_proj_dim=32,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
    ),
    "one residual after the other": GPTNeoXConfig(
        vocab_size=tiny_models.VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        use_parallel_residual=False,
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_odd_shapes_of_a_family_change_nothing_either(
    variant, opened, tokenizer, tmp_path, monkeypatch, recipe_for, run, tokens
):
    monkeypatch.setitem(FAMILIES, variant, VARIANTS[variant])
    model = tiny_models.build_model(variant)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    seen = opened(tmp_path / "m")
    sites = [s for s in PARTS if s != "R2" or seen.spec.rotary is None]
    for orders in (planned(seen), shuffled(seen)):
        assert_same(outputs(seen, folded(seen, only(orders, *sites))), seen.after_block_0)
    run(recipe_for(tmp_path / "m", activations={"kv_bits": 8}), tmp_path / "o")
    with torch.no_grad():
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / "o")(tokens).logits
        # 8 bits of keys and values: close, where garbage would be off by its whole size
        assert float((packed - model(tokens).logits).norm() / model(tokens).logits.norm()) < 0.05


def test_a_run_at_16_bits_saves_the_same_function(family, model_folder, recipe_for, run, tmp_path, tokens):
    source = model_folder(family)
    report = run(recipe_for(source), tmp_path / "o")
    assert sum(s["permuted"] for s in report["sites"]) >= 2 * 3  # R1, R3 and R5 in both blocks at the least
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(tokens).logits
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "o")(tokens).logits, expected)


@pytest.mark.parametrize("reordered", [False, True], ids=["alone", "with reordering"])
@pytest.mark.parametrize("smooth_family", ["opt", "llama", "phi", "gpt2", "gemma2"])
def test_smoothing_changes_nothing(smooth_family, reordered, opened, model_folder):
    seen = opened(model_folder(smooth_family))
    block = fresh_block(seen)
    before = {path: block.get_submodule(path).weight.clone() for path in norm_paths(seen.spec)}
    ranges = reorder.smooth(block, seen.spec, measured(seen, block), 0.5)
    assert all(not torch.allclose(block.get_submodule(p).weight, w, rtol=0.1) for p, w in before.items())
    if reordered:
        orders = reorder.plan_orders(ranges, build(clusters=CLUSTERS), seen.spec, seen.geometry, "block")
        reorder.fold_orders(block, seen.spec, seen.geometry, orders)
    assert_same(outputs(seen, block), seen.after_block_0)
    if not reordered:
        for name, found in measured(seen, block).items():
            torch.testing.assert_close(ranges[name].max, found.max, rtol=1e-4, atol=1e-5)  # s is rounded with the norm


@torch.no_grad()
def test_balancing_changes_nothing(family, opened, model_folder):
    seen = opened(model_folder(family))
    block = fresh_block(seen)
    before = {name: t.clone() for name, t in block.named_buffers()}
    plain = outputs(seen, block)
    found = balance(block, seen.spec, seen.geometry, statistics(seen, block))
    moved = {name.rpartition(".")[0] for name, t in block.named_buffers() if not torch.equal(t, before[name])}
    assert {seen.spec.output, seen.spec.qkv_linears[-1]} <= moved
    assert (seen.spec.down in moved) == (seen.geometry.scaled_up is not None)
    assert_same(outputs(seen, block), plain)
    for name, ranges in statistics(seen, block).ranges.items():
        torch.testing.assert_close(found.ranges[name].max, ranges.max, rtol=1e-4, atol=1e-5)


def test_a_factor_passes_gates_and_relu_only(opened, model_folder):
    scaled = {family: opened(model_folder(family)).geometry.scaled_up for family in ("opt", "llama", "gpt2")}
    assert scaled == {"opt": "fc1", "llama": "mlp.up_proj", "gpt2": None}


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_smoothed_and_reordered_run_saves_the_same_function(alpha, model_folder, recipe_for, run, tmp_path, tokens):
    source = model_folder("llama")
    run(recipe_for(source, smooth=alpha), tmp_path / "o")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(tokens).logits
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "o")(tokens).logits, expected)


def test_full_precision_modules_equal_the_ones_they_replace(family, opened, model_folder):
    seen = opened(model_folder(family))
    original = AutoModelForCausalLM.from_pretrained(model_folder(family)).get_submodule(seen.spec.blocks)[0]
    block = fresh_block(seen)
    generator = torch.Generator().manual_seed(1)
    for path in (*linear_paths(seen.spec, original), *norm_paths(seen.spec)):
        theirs, ours = original.get_submodule(path), block.get_submodule(path)
        channels = ours.in_features if hasattr(ours, "in_features") else ours.channels
        x = torch.randn(3, 5, channels, generator=generator)
        with torch.no_grad():
            # Conv1D multiplies through addmm and RMSNorms round in another order: the last bits of float32
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=2e-6)
