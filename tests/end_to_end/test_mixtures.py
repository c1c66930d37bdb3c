"""Whole runs of families with experts."""

from __future__ import annotations

import pytest
import torch
from lowbit import Linear
from safetensors.torch import load_file, save_file
from tiny_models import MOE, build_model
from transformers import AutoModelForCausalLM, MixtralConfig

import ptq
from ptq.errors import UnsupportedModel

HALF = {"method": "sparsegpt", "pruning": {"sparsity": 0.5}}


def tensors_of(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.mark.parametrize("family", MOE)
def test_half_of_every_expert_is_pruned_and_the_result_is_laid_out_as_the_source(
    family, model_folder, recipe_for, run, tmp_path, tokens
):
    source = model_folder(family)
    report = run(recipe_for(source, **HALF), tmp_path / "o")
    before, after = tensors_of(source), tensors_of(tmp_path / "o")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    experts = [name for name in after if ".experts." in name]
    assert len(experts) == (1 if family == "qwen2_moe" else 2) * 4 * 3
    assert all(int((after[name] == 0).sum()) * 2 == after[name].numel() for name in experts)
    routers = [name for name in after if name.endswith((".gate.weight", "shared_expert_gate.weight"))]
    assert routers and all(torch.equal(after[name], before[name]) for name in routers)
    rows = {row["name"]: row for row in report["modules"]}
    gates = [rows[f"model.layers.0.mlp.experts.{e}.gate_proj"]["tokens"] for e in range(4)]
    assert sum(gates) == 2 * tokens.numel()  # two experts a token, each solved on its own
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "o")(tokens).logits
        run(recipe_for(source, method="sparsegpt", pruning=HALF["pruning"] | {"storage": "packed"}), tmp_path / "p")
        packed = ptq.load(tmp_path / "p")(tokens).logits
    # the same weights; the experts of a token may be added in another order
    assert float((packed - plain).abs().max() / plain.abs().max()) < 1e-5


@pytest.mark.parametrize("family", MOE)
def test_experts_that_the_checkpoint_holds_fused_come_out_the_same_and_fused(
    family, model_folder, recipe_for, run, tmp_path, tokenizer, tokens
):
    model = build_model(family)
    model.config.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    save_file(model.state_dict(), tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    run(recipe_for(tmp_path / "m", **HALF), tmp_path / "o")
    run(recipe_for(model_folder(family), **HALF), tmp_path / "apart")
    assert tensors_of(tmp_path / "o").keys() == model.state_dict().keys()
    fused, apart = (AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("o", "apart"))
    assert all(torch.equal(fused[name], t) for name, t in apart.items())


@torch.no_grad()
def unpacked(model, source):
    """The source's own model with every weight as the packed `model` has it."""
    plain = AutoModelForCausalLM.from_pretrained(source)
    weights = {name: m.dequantized_weight() for name, m in model.named_modules() if isinstance(m, Linear)}
    for name, p in plain.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            p.copy_(
                torch.stack([torch.cat([weights[f"{owner}.{e}.{r}_proj"] for r in ("gate", "up")]) for e in range(4)])
            )
        elif leaf == "down_proj":
            p.copy_(torch.stack([weights[f"{owner}.{e}.down_proj"] for e in range(4)]))
        elif leaf == "weight" and owner in weights:
            p.copy_(weights[owner])
    return plain


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("family", MOE)
def test_weights_alone_are_quantized_and_load(family, method, model_folder, recipe_for, run, tmp_path, tokens):
    source = model_folder(family)
    report = run(recipe_for(source, method=method, weights={"bits": 4}), tmp_path / "o")
    assert len(report["modules"]) >= 26 and all(row["bits"] == 4 for row in report["modules"])
    model = ptq.load(tmp_path / "o")
    with torch.no_grad():
        found, expected = model(tokens).logits, unpacked(model, source)(tokens).logits
        before = AutoModelForCausalLM.from_pretrained(source)(tokens).logits
    # float32 sums in another order; 4 bits a weight show far above
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    assert float((found - before).abs().max() / before.abs().max()) > 1e-2


def test_an_expert_that_no_token_reaches_is_pruned_all_the_same_and_reported(
    recipe_for, run, tmp_path, tokenizer, monkeypatch
):
    common = MOE["mixtral"].to_dict() | {"num_local_experts": 3, "num_experts_per_tok": 1, "num_experts": 3}
    monkeypatch.setitem(MOE, "lonely", MixtralConfig(**common))
    model = build_model("lonely")
    for layer in model.model.layers:  # logits s, -s and 0: the third is never the largest
        layer.mlp.gate.weight.data[1] = -layer.mlp.gate.weight.data[0]
        layer.mlp.gate.weight.data[2] = 0
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    report = run(recipe_for(tmp_path / "m", **HALF), tmp_path / "o")
    alone = [row for row in report["modules"] if ".experts.2." in row["name"]]
    assert [(row["tokens"], row["sparsity"]) for row in alone] == [(0, 0.5)] * 6
    assert any("fewer calibration tokens than they have input channels" in line for line in report["warnings"])
    # without a token, down is pruned by the weights' own size
    before, after = (tensors_of(tmp_path / name) for name in ("m", "o"))
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    kept = after[name] != 0
    assert float(before[name][kept].abs().min()) > float(before[name][~kept].abs().max()) / 2


def test_reordering_is_refused_before_anything_is_written(model_folder, recipe_for, run, tmp_path):
    with pytest.raises(UnsupportedModel, match="has experts: what works is ptq prune"):
        run(recipe_for(model_folder("mixtral"), preset="W4A16"), tmp_path / "o")
    assert list(tmp_path.iterdir()) == []
