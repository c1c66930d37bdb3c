"""A packed model on the Triton kernels, norms, linears and decoding steps, which the interpreter runs, computes what it does without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from interpreter import interpret, needs_triton
from lowbit.cpu import native
from lowbit.modules import Linear
from transformers import AutoConfig, AutoModelForCausalLM

import ptq

pytestmark = needs_triton
ROOT = Path(__file__).resolve().parents[2]
LLAMA = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}
OPT = {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 192, "num_attention_heads": 2}
# what is measured -> family, its sizes, options of the run, functions that the model calls, norms in the pass of a quantizer, how close
MODELS = {
    # Without a grid, those of sinks, numbers are 2^-15 of a tile's largest off, and a code on the edge falls to its other side.
    "each token's grids": (
        "llama",
        LLAMA,
        {"method": "rptq+", "preset": "W4A4KV4", "clusters": {"wide": 0.16}, "weights": {"fine": 0.1, "head": 8}},
        {"quantize_tiles", "quantize_exactly", "planar_linear", "kv_append", "attention_decode"},
        ["rmsnorm"],
        1e-3,
    ),
    "static grids": (
        "opt",
        OPT,
        {"preset": "W4A8", "clusters": {"R1": 2, "R3": 1, "R4": 2, "R5": 2, "tile": 64}, "weights": {"groups": 64}},
        {"quantize_static", "planar_linear", "kv_append", "attention_decode"},
        ["layernorm"],
        1e-5,
    ),
}
CHILD = """
import json, sys, torch
import test_triton_model as here
from dataclasses import replace
from lowbit import integer
from lowbit.cpu import native
from lowbit.modules import Linear
from lowbit.triton import kv, linear as kernels, quantize
def counted(name, run):
    return lambda *given, **more: called.add(name) or run(*given, **more)
called, norms = set(), []
for name in ("quantize_static", "quantize_tiles", "quantize_token", "quantize_exactly", "planar_linear"):
    setattr(kernels, name, counted(name, getattr(kernels, name)))
for name in ("kv_append", "attention_decode"):
    setattr(kv, name, counted(name, getattr(kv, name)))
of_norms = quantize.norm_quantize
quantize.norm_quantize = lambda *given, **more: norms.append(more.get("kind")) or of_norms(*given, **more)
native.fast_avx2 = lambda: False  # no native block takes the linears' place
integer.KERNELS["cpu"] = replace(integer.KERNELS["cuda"], run_on=lambda device: True)
import ptq
model, tokens = ptq.load(sys.argv[1]), torch.load(sys.argv[2])
waiting = [n for n, m in model.named_modules() if isinstance(m, Linear) and m.planar is None]
with torch.no_grad():
    torch.save(here.generated(model, tokens), sys.argv[3])
print(json.dumps([sorted(called), sorted({kind for kind in norms if kind}), waiting]))
"""


def generated(model, tokens):
    """Tokens after a prompt, and logits [2, B, vocabulary]: of a prefill and of a step."""
    how = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(tokens, max_new_tokens=2, **how)
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_and_tokens_are_those_of_the_reference(name, tokenizer, recipe_for, run, tokens, tmp_path, monkeypatch):
    family, sizes, options, functions, norms, near = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=300, num_hidden_layers=1, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    run(recipe_for(tmp_path / "source", **options), tmp_path / "out")
    given = tokens[:2, :4]
    torch.save(given, tmp_path / "tokens")
    printed = interpret(CHILD, tmp_path, "out", "tokens", "found", paths=[ROOT, ROOT / "tests", Path(__file__).parent])
    assert json.loads(printed.splitlines()[-1]) == [sorted(functions), norms, []]
    found, logits = torch.load(tmp_path / "found")
    monkeypatch.setattr(native, "fast_avx2", lambda: False)
    model = ptq.load(tmp_path / "out")
    assert all(m.planar is None for m in model.modules() if isinstance(m, Linear))
    wanted, expected = generated(model, given)
    assert torch.equal(found, wanted)
    assert 0 < float((logits - expected).abs().max() / expected.abs().max()) < near
