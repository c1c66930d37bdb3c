"""The output head at few bits: an untied copy that loads, runs and is reported."""

from __future__ import annotations

import json

import lowbit
import pytest
import torch
from safetensors.torch import load_file

import ptq
import sparsegpt
from ptq.errors import BadInput
from ptq.recipe_build import build


@pytest.mark.parametrize("family", ["opt", "llama", "phi"])
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_a_packed_head_is_its_weight_on_grids(family, bits, model_folder, recipe_for, run, tokens, tmp_path):
    source = model_folder(family)
    report = run(recipe_for(source, weights={"head": bits}), tmp_path / "out")
    full, packed = ptq.load(source), ptq.load(tmp_path / "out")
    head, like = packed.get_output_embeddings(), full.get_output_embeddings()
    assert isinstance(head, lowbit.Linear) and head.bits == bits and not packed.config.tie_word_embeddings
    sizes = torch.tensor([64] * (like.in_features // 64) + [like.in_features % 64] * (like.in_features % 64 > 0))
    grid = sparsegpt.fit_grid(like.weight, sizes, bits, importance=torch.ones(like.in_features))
    expected = sparsegpt.dequantize(sparsegpt.encode(like.weight, grid), grid)
    assert torch.equal(head.dequantized_weight(), expected)
    assert torch.equal(packed.get_input_embeddings().weight, full.get_input_embeddings().weight)
    like.weight = torch.nn.Parameter(expected)  # of a tied model, this unties it
    ids = tokens[:2, :9]
    # float32 sums in another order
    torch.testing.assert_close(packed(ids).logits, full(ids).logits, rtol=1e-4, atol=1e-4)
    row = report["modules"][-1]
    assert row["shape"] == list(like.weight.shape) and row["bits"] == bits and row["sparsity"] is None
    assert row["name"] not in [skipped["name"] for skipped in report["coverage"]["skipped"]]
    held = sum(
        t.numel() for name, t in load_file(source / "model.safetensors").items() if f"{row['name']}." not in name
    )
    counted = report["coverage"]["compressed_parameters"] + report["coverage"]["other_parameters"]
    bias = like.bias.numel() if like.bias is not None else 0
    assert counted == held + like.weight.numel() + bias


@torch.no_grad()
def test_it_goes_with_compressed_blocks_and_generates(model_folder, recipe_for, run, tokens, tmp_path):
    recipe = recipe_for(model_folder("llama"), preset="W4A8", weights={"head": 8})
    report = run(recipe, tmp_path / "out")
    model = ptq.load(tmp_path / "out")
    again = model.generate(tokens[:1, :5], max_new_tokens=4, do_sample=False)
    assert again.shape == (1, 9)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["modules"]["lm_head"]["bits"] == 8
    names = [row["name"] for row in report["modules"]]
    assert names[-1] == "lm_head" and report["run_time"]["multiplications"] == sum(
        row["shape"][0] * row["shape"][1] for row in report["modules"][:-1]
    )


def test_bits_that_a_head_cannot_have():
    with pytest.raises(BadInput, match="weights.head: 3 is not one of 4, 8, 16"):
        build(weights={"head": 3})
    with pytest.raises(BadInput, match="pruning.storage: dense stores plain weights"):
        build(method="sparsegpt", pruning={"sparsity": 0.5}, weights={"head": 8})
