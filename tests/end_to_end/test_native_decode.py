"""A packed model decodes in native calls where its blocks allow it, and finds the tokens that its modules find."""

from __future__ import annotations

import pytest
import torch
from lowbit.cpu import native
from lowbit.decode import Decoder
from transformers import AutoConfig, AutoModelForCausalLM

import ptq
from ptq.hf_quantizer import spec_of
from ptq.native_decode import decode_natively

needs_kernels = pytest.mark.skipif(not native.fast_avx2(), reason="no compiled kernels that this machine would run")
SIZES = {
    "llama": {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1},
    "opt": {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 192, "num_attention_heads": 2},
}


@pytest.fixture(scope="module", params=sorted(SIZES))
def packed(request, tokenizer, recipe_for, run, tmp_path_factory):
    """A W4A4KV4 model whose heads are whole tiles."""
    family, folder = request.param, tmp_path_factory.mktemp("native")
    config = AutoConfig.for_model(family, vocab_size=300, num_hidden_layers=2, **SIZES[family])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    options = {"clusters": {"wide": 0.16}, "weights": {"fine": 0.1}}
    run(recipe_for(folder / "source", method="rptq+", preset="W4A4KV4", **options), folder / "out")
    return folder / "out"


@needs_kernels
@torch.no_grad()
def test_generate_takes_native_steps_and_finds_the_same_tokens(packed, tokens, monkeypatch):
    steps, step = [], Decoder.step

    def counted(self, hidden, *args, **more):
        out = step(self, hidden, *args, **more)
        steps.append(len(hidden))
        return out

    monkeypatch.setattr(Decoder, "step", counted)
    batch = torch.cat([tokens[:1, :9], torch.cat([torch.zeros(1, 3, dtype=torch.int64), tokens[1:2, :6]], 1)])
    mask = torch.ones_like(batch)
    mask[1, :3] = 0  # a shorter prompt, padded on the left
    how = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = ptq.load(packed).generate(batch, **how)
    assert steps == [2] * 7  # the first new token comes out of the prefill
    monkeypatch.setattr(native, "fast_avx2", lambda: False)
    steps.clear()
    assert torch.equal(ptq.load(packed).generate(batch, **how), found) and not steps


@needs_kernels
def test_what_cannot_is_left_to_the_modules(packed, model_folder):
    model = ptq.load(packed)
    model.config.hidden_act = model.config.activation_function = "gelu_new"
    assert "'gelu_new'" in decode_natively(model, spec_of(model.config))
    other = ptq.load(model_folder("qwen3"))
    other.config.model_type = "ptq_qwen3"
    assert decode_natively(other, spec_of(other.config)) == "blocks of family qwen3 with silu are not known"
