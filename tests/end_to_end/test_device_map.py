"""Packed models under accelerate's device maps: offloaded weights come when they are called, and give the numbers of the whole model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from accelerate.utils import has_offloaded_params
from lowbit.cache import PackedCache
from lowbit.modules import ActivationQuantizer, Linear
from lowbit.sparse_linear import sparse_tiles
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import ptq
from ptq.errors import BadInput

REST = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def half_on_disk(rest: str = "cpu") -> dict[str, str]:
    return {"model.layers.0": "cpu", "model.layers.1": "disk", **dict.fromkeys(REST, rest)}


@pytest.fixture(scope="module")
def source(tokenizer, tmp_path_factory):
    """A LLaMA whose channels are whole tiles."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=300, num_hidden_layers=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(source, recipe_for, run, tmp_path_factory):
    """W4A4KV4 with a packed head: all of it runs on integer kernels where the machine has them."""
    out = tmp_path_factory.mktemp("packed") / "out"
    options = {"clusters": {"wide": 0.16}, "weights": {"fine": 0.1, "head": 8}}
    run(recipe_for(source, method="rptq+", preset="W4A4KV4", **options), out)
    return out


@pytest.fixture(scope="module")
def pruned(source, recipe_for, run, tmp_path_factory):
    """Half of the weights, stored under bitmasks."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    run(recipe_for(source, pruning={"sparsity": 0.5, "storage": "packed"}), out)
    return out


@pytest.mark.parametrize(
    "device_map, waiting, more",
    [
        ("cpu", 0, {}),
        (half_on_disk(), 1, {}),
        (half_on_disk("disk"), 1, {"offload_buffers": True}),
        ({"": "disk"}, 2, {}),
    ],
)
def test_logits_and_tokens_are_those_of_the_whole_model(device_map, waiting, more, packed, tokens, tmp_path):
    how, expected = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}, ptq.load(packed)
    model = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map, offload_folder=tmp_path, **more)
    for _ in range(2):  # what a call brought is gone after it
        blocks = [[m for m in block.modules() if isinstance(m, Linear)] for block in model.model.layers]
        offloaded = [all(has_offloaded_params(m) for m in linears) for linears in blocks]
        assert offloaded == [False] * (2 - waiting) + [True] * waiting
        for linear in blocks[1]:
            assert (linear.weight_packed.is_meta and linear.planar is None) == bool(waiting)
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
    found = model.generate(tokens[:2], return_dict_in_generate=True, **how)
    assert isinstance(found.past_key_values, PackedCache)
    assert torch.equal(found.sequences, expected.generate(tokens[:2], **how))
    assert not any(t.is_meta for m in model.modules() if isinstance(m, ActivationQuantizer) for t in m.buffers())
    assert not list(tmp_path.iterdir())  # read from the checkpoint itself


def test_a_model_that_was_not_offloaded_is_as_without_a_map(packed):
    plain, mapped = (AutoModelForCausalLM.from_pretrained(packed, **how) for how in ({}, {"device_map": "cpu"}))
    assert [n for n, _ in plain.named_buffers()] == [n for n, _ in mapped.named_buffers()]
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in mapped.named_parameters()]


def test_zeros_are_left_out_of_offloaded_products_too(pruned, tokens, monkeypatch):
    built = []
    monkeypatch.setattr("lowbit.modules.pays", lambda weight: True)
    monkeypatch.setattr("lowbit.modules.sparse_tiles", lambda weight: built.append(1) or sparse_tiles(weight))
    expected = ptq.load(pruned)(tokens).logits
    linears = len(built)
    model = ptq.load(pruned, device_map=half_on_disk())
    assert torch.equal(model(tokens).logits, expected)
    assert len(built) == 2 * linears + linears // 2  # those of the block on disk at the load and at the call
    assert all(m.tiles is None for m in model.model.layers[1].modules() if isinstance(m, Linear))


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_other_families(family, model_folder, recipe_for, run, tokens, tmp_path):
    full = {"bits": 16, "norm_bits": 16, "q_bits": 16, "kv_bits": 16, "softmax_bits": 16}
    run(recipe_for(model_folder(family), method="rtn", weights={"bits": 4}, activations=full), tmp_path / "out")
    expected = ptq.load(tmp_path / "out")(tokens).logits
    assert torch.equal(ptq.load(tmp_path / "out", device_map={"": "disk"})(tokens).logits, expected)


def test_an_offloaded_model_is_saved_whole(packed, tokens, tmp_path):
    model = ptq.load(packed, device_map=half_on_disk())
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path)
    assert torch.equal(ptq.load(tmp_path)(tokens).logits, model(tokens).logits)


def test_what_does_not_fit_stays_on_disk(packed, tokens):
    model = AutoModelForCausalLM.from_pretrained(packed, device_map="auto", max_memory={"cpu": 300_000})
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(model(tokens).logits, ptq.load(packed)(tokens).logits)


def damaged(packed, folder, change):
    """A copy of the checkpoint; `change` edits the tensors of its block 1."""
    shutil.copytree(packed, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index["model.layers.1.mlp.down_proj.weight_packed"]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


def test_damage_is_refused_though_it_lies_on_disk(packed, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight_scale"
    spoils = {
        "missing keys": lambda t: t.pop(name),
        "mismatched keys": lambda t: t.update({name: t[name][:-1].clone()}),
        "not positive and finite": lambda t: t[name].fill_(float("nan")),
    }
    for i, (problem, change) in enumerate(spoils.items()):
        folder = damaged(packed, tmp_path / str(i), change)
        with pytest.raises(BadInput, match=f"down_proj.*{problem}|{problem}.*down_proj") as refused:
            AutoModelForCausalLM.from_pretrained(folder, device_map=half_on_disk())
        assert "\n" not in str(refused.value)


def test_maps_that_cannot_be_are_refused_in_one_line(packed):
    with pytest.raises(BadInput, match="does not give any device") as refused:
        ptq.load(packed, device_map={"model.layers.1": "disk"})
    assert "\n" not in str(refused.value)
    with pytest.raises(BadInput, match="not both"):
        ptq.load(packed, device_map="auto", stream=True)
