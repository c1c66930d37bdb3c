"""Specs against the real model classes: every path, row and head count a spec claims is looked up or computed."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES as TINY
from tiny_models import MOE, build_model
from transformers import AutoConfig, BloomConfig, FalconConfig, OPTConfig

from ptq.architectures import FAMILIES, geometry_of, spec_for
from ptq.architectures.geometry import qkv_rows
from ptq.architectures.lookup import block_paths
from ptq.blocks import linear_paths, swap
from ptq.errors import UnsupportedModel


def test_every_family_has_a_tiny_model_here():
    assert set(TINY) | set(MOE) == set(FAMILIES)
    assert all(name == spec.model_type == AutoConfig.for_model(name).model_type for name, spec in FAMILIES.items())


def test_every_linear_of_a_block_is_named_once(family):
    model = build_model(family)
    spec = spec_for(model.config, model)
    for block in model.get_submodule(spec.blocks):
        wide = [n for n, m in block.named_modules() if getattr(m, "weight", None) is not None and m.weight.ndim == 2]
        assert sorted(linear_paths(spec, block)) == sorted(wide)
        norms = {n for n, m in block.named_modules() if "norm" in type(m).__name__.lower()}
        # Gemma's norms after attention and MLP feed the residual stream, no linear: nothing to permute there
        after = {"post_attention_layernorm", "post_feedforward_layernorm"} if family.startswith("gemma") else set()
        assert norms - after == set(block_paths(spec, block)) & norms


def test_geometry_is_that_of_the_weights(family):
    model = build_model(family)
    spec = spec_for(model.config, model)
    g, block = geometry_of(model.config, spec), model.get_submodule(spec.blocks)[0]
    rows = qkv_rows(spec, g)
    widths = [len(r) for _, r in rows]
    assert widths == [g.heads * g.head_dim, g.kv_heads * g.head_dim, g.kv_heads * g.head_dim]
    for path in {path for path, _ in rows}:
        claimed = torch.cat([r for p, r in rows if p == path]).sort().values
        linear = block.get_submodule(path)
        out = linear.weight.shape[1] if type(linear).__name__ == "Conv1D" else linear.weight.shape[0]
        assert torch.equal(claimed, torch.arange(out))  # every row belongs to one of q, k, v


@pytest.mark.parametrize("family", sorted(name for name, spec in FAMILIES.items() if spec.rotary))
def test_rotary_dim_is_how_many_channels_turn(family):
    model = build_model(family)
    spec = spec_for(model.config, model)
    expected = {"gpt_neox": 4, "gptj": 8, "phi": 8}.get(
        family, 16
    )  # of heads of 16 channels: a quarter, 8, a half, all
    assert geometry_of(model.config, spec).rotary_dim == expected


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_query_key_and_value_rows_are_what_attention_takes_them_for(family):
    """Zero the rows of v: the attention's output no longer depends on the input, only on the output projection's bias."""
    model = build_model(family)
    spec = spec_for(model.config, model)
    block = model.get_submodule(spec.blocks)[0]
    path, rows = qkv_rows(spec, geometry_of(model.config, spec))[2]
    seen = {}
    with torch.no_grad():
        linear = block.get_submodule(path)
        weight = linear.weight.T if type(linear).__name__ == "Conv1D" else linear.weight
        weight[rows] = 0
        if linear.bias is not None:
            linear.bias[rows] = 0
        block.get_submodule(spec.output).register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
        model(torch.arange(3, 15)[None])
    assert seen["x"].shape[-1] > 0 and not seen["x"].any()


def test_an_unknown_family_is_answered_with_a_tree_and_a_stub():
    config = FalconConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2)
    with pytest.raises(UnsupportedModel, match="'falcon' has no spec .known: bloom, gemma2") as caught:
        spec_for(config)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(do_layer_norm_before=False),
        BloomConfig(slow_but_exact=True),
        AutoConfig.for_model("phi", qk_layernorm=True),
    ],
    ids=["post-norm", "slow", "qk norm"],
)
def test_refused_configurations_say_why(config):
    with pytest.raises(UnsupportedModel, match="no method here applies"):
        spec_for(config)


def test_a_model_without_the_spec_s_modules_is_refused_with_what_it_has():
    model = build_model("llama")
    swap(model.model.layers[1], "mlp", lambda mlp: torch.nn.Sequential(torch.nn.Linear(64, 64)))
    match = "model.layers.1 has no mlp.gate_proj, mlp.up_proj, mlp.down_proj; it has .*mlp.0"
    with pytest.raises(UnsupportedModel, match=match):
        spec_for(model.config, model)
