"""What cannot be compressed or loaded is refused in one line that says what, where and how to mend; nothing half-made stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, OPTConfig, T5Config

import ptq
from ptq import ledger
from ptq.errors import BadInput, NumericalFailure, PtqError, UnsupportedModel
from ptq.pipeline import pick_device

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(model_folder, tmp_path):
    """A copy of the tiny OPT that a test may damage."""
    return Path(shutil.copytree(model_folder("opt"), tmp_path / "model"))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change) -> None:
    """Rewrite the safetensors file after `change(dict)`."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(expected: type[PtqError], match: str, call, *args, **options) -> str:
    with pytest.raises(expected, match=match) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert type(caught.value) is expected and (expected is UnsupportedModel or "\n" not in message), message
    return message


# --- a model that cannot be read: found before anything is written


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_to_nothing(folder):
    (folder / "model.safetensors").write_bytes(b"\x10")


def corrupt_header(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:12] = b"!!!!"
    path.write_bytes(data)


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def traversal(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))


def lost_shard(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))


UNREADABLE = {
    "no safetensors": (lambda f: (f / "model.safetensors").unlink(), "needs model.safetensors .* found none"),
    "truncated": (cut, "model.safetensors: truncated: .* fetch the file again"),
    "a byte": (cut_to_nothing, "not a safetensors file or truncated"),
    "corrupt header": (corrupt_header, "corrupt safetensors header"),
    "only .bin": (only_pickles, "pytorch_model.bin: pickled weights are refused"),
    "shard outside the folder": (traversal, "'../model.safetensors' is not a plain"),
    "shard missing": (lost_shard, "shard gone.safetensors is missing"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "other hidden size": (lambda f: edit_json(f / "config.json", ffn_dim=100), r"fc1.* is \[96.*the config says \[100"),
    "tensor missing": (
        lambda f: edit_tensors(f / "model.safetensors", lambda t: t.pop("model.decoder.layers.1.fc2.weight")),
        "tensor model.decoder.layers.1.fc2.weight is missing",
    ),
    "fewer blocks than the files": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=1),
        r"16 tensors have no place .* first model.decoder.layers.1.fc1.bias; mend config.json",
    ),
    "no biases": (
        lambda f: edit_json(f / "config.json", enable_bias=False),
        "12 tensors have no place .* first model.decoder.layers.0.fc1.bias",
    ),
    "a word for a number": (
        lambda f: edit_json(f / "config.json", hidden_size="wide"),
        "config.json: Validation error .*'hidden_size'",
    ),
    "no heads": (
        lambda f: edit_json(f / "config.json", num_attention_heads=0),
        "config.json: makes no model: ZeroDivisionError",
    ),
    "heads that do not divide": (
        lambda f: edit_json(f / "config.json", num_attention_heads=5),
        "config.json: makes no model: ValueError: .* must be divisible",
    ),
    "quantized elsewhere": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        r"already quantized \(gptq\)",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_model_that_cannot_be_read(case, copy, recipe_for, run, tmp_path):
    damage, match = UNREADABLE[case]
    damage(copy)
    refused(BadInput, match, run, recipe_for(copy), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# tensors of old checkpoints that the model makes itself, and what the report calls them
STORED_BUFFERS = {
    "llama": (["model.layers.0.self_attn.rotary_emb.inv_freq"], "model.layers.*.self_attn.rotary_emb.inv_freq"),
    "gpt2": (
        ["transformer.h.0.attn.bias", "transformer.h.1.attn.bias", "transformer.h.0.attn.masked_bias"],
        "transformer.h.*.attn.bias, transformer.h.*.attn.masked_bias",
    ),
    "gpt_neox": (
        ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.1.attention.masked_bias"],
        "gpt_neox.layers.*.attention.bias, gpt_neox.layers.*.attention.masked_bias",
    ),
}


@pytest.mark.parametrize("family", STORED_BUFFERS)
def test_buffers_that_the_model_makes_itself_are_left_out_and_reported(family, model_folder, recipe_for, run, tmp_path):
    names, said = STORED_BUFFERS[family]
    folder = Path(shutil.copytree(model_folder(family), tmp_path / "model"))
    edit_tensors(folder / "model.safetensors", lambda t: t.update({name: torch.ones(4) for name in names}))
    report = run(recipe_for(folder, weights={"bits": 8, "solver": "rtn"}), tmp_path / "out")
    expected = f"{len(names)} tensors of the source are made by the model itself and were left out: {said}"
    assert report["warnings"] == [expected]


def test_a_stored_copy_of_tied_weights_is_no_leftover(model_folder, recipe_for, run, tmp_path):
    folder = Path(shutil.copytree(model_folder("qwen2"), tmp_path / "model"))
    copied = {"lm_head.weight": load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()}
    edit_tensors(folder / "model.safetensors", lambda t: t.update(copied))
    report = run(recipe_for(folder, weights={"bits": 8, "solver": "rtn"}), tmp_path / "out")
    assert report["warnings"] == []
    assert ptq.load(tmp_path / "out").lm_head.weight.shape == copied["lm_head.weight"].shape


def test_a_folder_without_a_tokenizer(copy, recipe_for, run, tmp_path):
    """transformers makes an empty one of it, which finds no tokens in any text."""
    for file in copy.glob("*token*"):
        file.unlink()
    refused(BadInput, "no usable tokenizer: it knows no tokens", ptq.load_tokenizer, copy)
    refused(BadInput, "no usable tokenizer: it knows no tokens", run, recipe_for(copy), tmp_path / "out")


def test_a_tokenizer_of_another_model(copy, recipe_for, run, tmp_path):
    def cut_rows(tensors):
        name = "model.decoder.embed_tokens.weight"
        tensors[name] = tensors[name][:100].clone()

    edit_tensors(copy / "model.safetensors", cut_rows)
    edit_json(copy / "config.json", vocab_size=100)
    refused(BadInput, "token id [12].. is outside the vocabulary of 100", run, recipe_for(copy), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_devices_that_compute_nothing():
    refused(BadInput, "--device meta: computes nothing", pick_device, "meta")
    refused(BadInput, "--device abacus", pick_device, "abacus")
    assert pick_device("cpu") == "cpu"


def test_a_model_that_we_compressed_is_not_compressed_again(w4a8, recipe_for, run, tmp_path):
    refused(BadInput, r"already quantized \(ptq\)", run, recipe_for(w4a8("opt").out), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_no_such_model(recipe_for, run, tmp_path):
    refused(BadInput, "not a model folder", run, recipe_for(tmp_path / "gone"), tmp_path / "out")


@pytest.mark.parametrize(
    "chosen, match",
    [
        ({"seqlen": 5000}, "--seqlen 5000 is beyond the model's 64 positions"),
        ({"seqlen": 64, "nsamples": 4000, "mode": "first"}, "4000 windows of seqlen 64 need"),
        ({"text": "/no/such/text"}, "/no/such/text: no such file or text name"),
    ],
)
def test_a_calibration_that_cannot_be_had(chosen, match, model_folder, recipe_for, run, tmp_path, text_file):
    calibration = {"text": str(text_file), "seqlen": 24, **chosen}
    refused(BadInput, match, run, recipe_for(model_folder("opt"), calibration=calibration), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_more_clusters_than_channels(model_folder, recipe_for, run, tmp_path):
    recipe = recipe_for(model_folder("opt"), clusters={"R1": 65})
    message = refused(BadInput, "65", run, recipe, tmp_path / "out")
    assert "64" in message and "clusters.R1" in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value, copy, recipe_for, run, tmp_path):
    def damage(tensors):
        tensors["model.decoder.layers.1.fc1.weight"][3, 4] = value

    edit_tensors(copy / "model.safetensors", damage)
    match = "layers.1.fc1.weight has 1 NaN or infinite of 6144 weights"
    refused(BadInput, match, run, recipe_for(copy), tmp_path / "out")
    assert not (tmp_path / "out").exists()  # block 0 was done: OUT.partial keeps it


def test_activations_that_are_no_numbers_name_block_and_site(copy, recipe_for, run, tmp_path):
    def damage(tensors):  # finite weights whose products are not
        tensors["model.decoder.layers.1.fc1.weight"].fill_(3e38)
        tensors["model.decoder.layers.1.final_layer_norm.weight"].fill_(3e38)

    edit_tensors(copy / "model.safetensors", damage)
    refused(NumericalFailure, "model.decoder.layers.1, site R[45]:", run, recipe_for(copy), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- models that no spec describes


def test_an_unknown_family_gets_its_tree_and_a_stub(recipe_for, run, tmp_path, tokenizer):
    config = FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    message = refused(UnsupportedModel, "'falcon' has no spec", run, recipe_for(tmp_path / "m"), tmp_path / "out")
    assert "  transformer.h.0.self_attention.query_key_value: " in message and "transformer.h.1." not in message
    assert "Spec(\n    model_type='falcon',\n    blocks='transformer.h'," in message
    assert UnsupportedModel.exit_code == 3 and not (tmp_path / "out.partial").exists()


_TINY = dict(vocab_size=VOCAB, hidden_size=32)
REFUSED = {
    "post-norm OPT": (
        OPTConfig(**_TINY, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, do_layer_norm_before=False),
        "do_layer_norm_before=False: .*post-norm",
    ),
    "BLOOM": (
        BloomConfig(**_TINY, n_layer=1, n_head=2, apply_residual_connection_post_layernorm=True),
        "apply_residual_connection_post_layernorm=True",
    ),
    "not a causal model": (T5Config(**{"vocab_size": VOCAB, "d_model": 32}), "'t5' is no causal language model"),
    "unknown to transformers": (None, "config.json: .*model type"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configurations_no_method_here_applies_to(case, copy, recipe_for, run, tmp_path):
    config, match = REFUSED[case]
    if config is None:
        edit_json(copy / "config.json", model_type="nothing_like_it")
    else:
        config.save_pretrained(copy)
    refused(UnsupportedModel, match, run, recipe_for(copy), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# --- places that cannot be written


def test_a_file_where_the_parent_folder_should_be(model_folder, recipe_for, run, tmp_path):
    (tmp_path / "file").write_text("x")
    refused(
        BadInput,
        "cannot be made .* choose another --out",
        run,
        recipe_for(model_folder("opt")),
        tmp_path / "file" / "out",
    )


@pytest.mark.parametrize("call", [0, 2, 5])
def test_a_full_disk_stops_the_run_and_the_run_goes_on_when_there_is_room(
    call, model_folder, recipe_for, run, tmp_path, monkeypatch
):
    recipe, calls, save = recipe_for(model_folder("opt"), weights={"bits": 8, "solver": "rtn"}), [], ledger.save_file

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) > call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            run(recipe, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    run(recipe, tmp_path / "out", resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --- compressed folders that were damaged


@pytest.fixture
def packed(w4a8, tmp_path):
    """A copy of the W4A8 OPT that a test may damage."""
    return Path(shutil.copytree(w4a8("opt").out, tmp_path / "packed"))


SHARD, BLOCK = "model-00001-of-00003.safetensors", "model.decoder.layers.0."


def set_item(name, index, value):
    def change(tensors):
        tensors[BLOCK + name][index] = value

    return change


def duplicate_channel(tensors):
    perm = tensors[BLOCK + "self_attn_layer_norm.permutation"]
    perm[0] = perm[1]


def narrow(tensors):
    tensors[BLOCK + "fc1.weight_packed"] = tensors[BLOCK + "fc1.weight_packed"][:, :-1].contiguous()


DAMAGED = {
    "a tensor missing": (lambda t: t.pop(BLOCK + "fc1.weight_scale"), "missing keys .*fc1.weight_scale"),
    "packed weights of another shape": (narrow, "fc1.weight_packed"),
    "groups that do not sum": (set_item("fc1.weight_groups", 0, 63), "layers.0.fc1: cluster sizes .* sum to 64"),
    "negative group": (set_item("fc1.weight_groups", 0, -1), "layers.0.fc1: cluster sizes must be positive"),
    "sizes that do not sum": (set_item("final_layer_norm.quantizer.sizes", 0, 63), "final_layer_norm: cluster sizes"),
    "a channel twice": (duplicate_channel, "self_attn_layer_norm: not a permutation of 64 channels: 1 of them"),
    "a channel that is none": (set_item("self_attn_layer_norm.permutation", 0, 64), "not a permutation of 64"),
    "scale of zero": (set_item("fc1.weight_scale", (0, 0), 0), "fc1: weight_scale: 1 of .* not positive and finite"),
    "infinite scale": (set_item("fc2.input_quantizer.scale", 0, float("inf")), "fc2: input grid: scale: 1 of"),
    "negative scale": (set_item("final_layer_norm.quantizer.scale", 0, -1), "final_layer_norm: grid: scale: 1 of"),
    "no number as zero point": (
        set_item("self_attn.v_proj.output_quantizer.zero", 0, float("nan")),
        "output grid: zero",
    ),
    "bits of no grid": (set_item("final_layer_norm.quantizer.bits", 0, 99), "final_layer_norm: grid: 99 bits"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_packed_tensors_are_refused(case, packed):
    damage, match = DAMAGED[case]
    edit_tensors(packed / SHARD, damage)
    message = refused(BadInput, match, ptq.load, packed)
    assert str(packed) in message


# transformers refuses another shape itself, with a RuntimeError
@pytest.mark.parametrize("case", [case for case in DAMAGED if "shape" not in case])
def test_transformers_own_loading_refuses_them_too(case, packed):
    damage, match = DAMAGED[case]
    edit_tensors(packed / SHARD, damage)
    message = refused(BadInput, match, AutoModelForCausalLM.from_pretrained, packed)
    assert str(packed) in message


def test_a_missing_embedding_is_not_replaced_by_random_numbers(packed):
    edit_tensors(packed / "model-00003-of-00003.safetensors", lambda t: t.pop("model.decoder.embed_tokens.weight"))
    for load in (ptq.load, AutoModelForCausalLM.from_pretrained):
        refused(BadInput, "missing keys .*embed_tokens.weight", load, packed)


def test_loading_does_not_ask_whether_to_run_their_code(copy, monkeypatch):
    T5Config(vocab_size=VOCAB, d_model=32).save_pretrained(copy)  # no causal model of transformers' own
    edit_json(copy / "config.json", auto_map={"AutoModelForCausalLM": "theirs.Model"})
    (copy / "theirs.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    refused(BadInput, "cannot be loaded", ptq.load, copy)
    assert not (copy / "ran").exists()


def test_damaged_packed_files_are_refused(packed):
    data = (packed / SHARD).read_bytes()
    (packed / SHARD).write_bytes(data[:-50])
    refused(BadInput, f"{SHARD}: truncated", ptq.load, packed)
    (packed / SHARD).unlink()
    refused(BadInput, f"shard {SHARD} is missing", ptq.load, packed)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"format_version": 99}, "packed format version 99, this release reads 4; upgrade"),
        ({"modules": {"model.decoder.layers.0.nothing": {"kind": "linear"}}}, "cannot be loaded"),
        ({"modules": {"model.decoder.layers.0.fc1": {"kind": "linear"}}}, "cannot be loaded"),
        ({"modules": {}}, "missing keys or keys of another shape: .*fc1.weight"),
    ],
)
def test_a_damaged_packed_config_is_refused(change, match, packed):
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] |= change
    (packed / "config.json").write_text(json.dumps(config))
    refused(BadInput, match, ptq.load, packed)


# --- transformers without ptq


def test_transformers_alone_stops_instead_of_running_random_weights(w4a8, tmp_path):
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1]); print('loaded')"
    command = [sys.executable, "-c", code, str(w4a8("opt").out)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode != 0 and "ptq_opt" in done.stderr and "loaded" not in done.stdout
