"""torch.compile takes a packed model as one graph, activations, spared sinks and all, and it computes the same."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ptq


@torch.no_grad()
def test_a_packed_model_is_one_graph(tokenizer, tokens, recipe_for, run, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("llama", vocab_size=300, num_hidden_layers=1, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    options = {"clusters": {"wide": 0.16}, "weights": {"fine": 0.1}}
    run(recipe_for(tmp_path / "source", method="rptq+", preset="W4A4KV4", **options), tmp_path / "out")
    model = ptq.load(tmp_path / "out")
    expected = model(tokens, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens, use_cache=False).logits, expected)
