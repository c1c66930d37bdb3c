"""What an export writes is the source's model; what it cannot say it refuses, or leaves out when told to."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ptq
from ptq.cli import main
from ptq.errors import BadInput, UnsupportedModel
from ptq.export import export
from ptq.export.codes import weights_of
from ptq.export.source import block_of, open_source

TOKENS = torch.arange(3, 43).view(2, 20)
# Each of another build: layer norms and R2; fused rows by parts, transposed; fused by heads; renamed; parallel; experts.
FAMILIES = {
    "opt": "uneven",
    "gpt2": "uneven",
    "bloom": "rotated",
    "gpt_neox": "ordered",
    "phi": "uneven",
    "mixtral": "groups",
}


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def tensors_of(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for shard in sorted(set(index.values())):
        found |= load_file(folder / shard)
    assert found.keys() == index.keys()
    return found


def run(*argv):
    return main(["export", *map(str, argv)])


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_is_the_same_model(family, packed, tmp_path):
    folder = packed(family, FAMILIES[family])
    export(folder, tmp_path / "out", "dense")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    expected = logits(ptq.load(folder))
    # sums of 64 to 96 products in another order, through two blocks
    torch.testing.assert_close(logits(plain.eval()), expected, rtol=0, atol=2e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["2:4", "half of it zero", "along rows"])
def test_dense_has_every_stored_weight(name, packed, tmp_path):
    report = export(packed("llama", name), tmp_path / "out", "dense")
    assert {row["largest_difference"] for row in report["modules"]} == {0}
    found, model = tensors_of(tmp_path / "out"), ptq.load(packed("llama", name))
    for row in report["modules"]:
        expected = model.get_submodule(row["name"]).dequantized_weight()
        torch.testing.assert_close(found[row["name"] + ".weight"], expected, rtol=0, atol=0)


def test_dense_states_what_a_narrower_dtype_costs(packed, tmp_path):
    report = export(packed("llama", "groups"), tmp_path / "out", "dense:bfloat16")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    found, model = tensors_of(tmp_path / "out"), ptq.load(packed("llama", "groups"))
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    for row in report["modules"]:
        ours = model.get_submodule(row["name"]).dequantized_weight()
        largest = (ours - found[row["name"] + ".weight"].float()).abs().max().item()
        assert row["largest_difference"] == largest > 0


def test_codes_come_back_in_the_models_own_order(packed):
    """The same numbers as the packed layers give, column by column: the norm's gather undone on codes, scales and groups alike."""
    source, model = open_source(packed("llama", "ordered")), ptq.load(packed("llama", "ordered"))
    seen = 0
    for i in range(source.blocks):
        prefix = f"model.layers.{i}"
        for weight in weights_of(source.spec, prefix, block_of(source, i)):
            torch.testing.assert_close(weight.codes.weight(), weight.weight, rtol=0, atol=0)
            stored = model.get_submodule(weight.name).dequantized_weight()
            norm = {"q": "input_layernorm", "g": "post_attention_layernorm"}.get(weight.name.rsplit(".", 1)[1][0])
            if norm is not None:
                order = model.get_submodule(f"{prefix}.{norm}").permutation.long()
                assert not torch.equal(order, torch.arange(64))
                torch.testing.assert_close(weight.weight[:, order], stored, rtol=0, atol=0)
                seen += 1
    assert seen == 4


@pytest.mark.parametrize("wanted", ["gptq", "gguf"])
def test_rounded_activations_are_refused_or_left_out_aloud(wanted, packed, tmp_path, capsys):
    folder = packed("llama", "W4A8")
    assert run(folder, "--format", wanted, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "keys and values" in said and "key and value cache (8 bits)" in said
    assert "--weights-only" in said and list(tmp_path.iterdir()) == []
    assert run(folder, "--format", wanted, "--out", tmp_path / "out", "--weights-only") == 0
    assert "left out, as asked: inputs of linears (a static grid a cluster) in 8 places" in capsys.readouterr().out
    left_out = json.loads((tmp_path / "out/export.json").read_text())["left_out"]
    assert {line.partition(" (")[0] for line in left_out} == {
        "inputs of linears",
        "queries, keys and values",
        "attention probabilities",
        "the key and value cache",
    }


BAD = {
    "unknown format": (["--format", "ggml"], "groups", "did you mean 'gguf'?"),
    "unknown variant": (["--format", "gguf:q4_2"], "groups", "gguf has no variant 'q4_2'"),
    "a variant where there is none": (["--format", "dense:v2"], "groups", "dense has no variant 'v2'"),
    "plain already": (["--format", "dense"], "zeros in place", "plain safetensors already"),
    "nothing quantized": (["--format", "gptq"], "zeros in place", "holds no quantized weights"),
    "no codes": (["--format", "gptq"], "half of it zero", "holds no quantized weights"),
    "an input grid that cannot be told": (["--format", "gptq"], "W8A8 a token", "a token's own 8-bit grid"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, packed, tmp_path, capsys):
    options, name, words = BAD[case]
    assert run(packed("llama", name), *options, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_kept(packed, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert run(packed("llama", "groups"), "--format", "dense", "--out", tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "new.partial").mkdir()
    assert run(packed("llama", "groups"), "--format", "dense", "--out", tmp_path / "new") == 2
    assert "left behind" in capsys.readouterr().err


@pytest.mark.parametrize("family, wanted", [("gpt2", "gptq"), ("mixtral", "compressed-tensors"), ("opt", "gguf")])
def test_families_a_format_has_no_words_for(family, wanted, packed, tmp_path, capsys):
    assert run(packed(family, FAMILIES[family]), "--format", wanted, "--out", tmp_path / "out") == 3
    said = capsys.readouterr().err
    assert f"{family} cannot be exported to {wanted}" in said and said.count("\n") == 1


def test_without_its_package_gguf_says_what_to_install(packed, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(BadInput, match="pip install gguf"):
        export(packed("llama", "groups"), tmp_path / "out", "gguf")
    assert list(tmp_path.iterdir()) == []


def corrupt(folder, out, change, modules=lambda modules: None):
    """A copy of a packed folder, its first shard changed."""
    out.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (out / file.name).write_bytes(file.read_bytes())
    shard = sorted(out.glob("model-*.safetensors"))[0]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    modules(config["quantization_config"]["modules"])
    (out / "config.json").write_text(json.dumps(config))
    return out


Q = "model.layers.0.self_attn.q_proj"
DAMAGE = {
    "a tensor of another type": (lambda t: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"].int()}), "int32"),
    "a tensor of another shape": (
        lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"][:, :1].clone()}),
        "[64, 1]",
    ),
    "groups that do not add up": (lambda t: t[f"{Q}.weight_groups"].add_(1), "sum to 64"),
    "a tensor too many": (lambda t: t.update({"model.layers.0.extra": torch.ones(1)}), "extra"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_writes_nothing(case, packed, tmp_path):
    change, words = DAMAGE[case]
    folder = corrupt(packed("llama", "groups"), tmp_path / "bad", change)
    with pytest.raises(BadInput) as err:
        export(folder, tmp_path / "out", "compressed-tensors")
    assert words in str(err.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_config_cannot_name_modules_of_its_own(packed, tmp_path):
    extra = lambda modules: modules.update({"lm_head": modules[Q]})  # noqa: E731
    folder = corrupt(packed("llama", "groups"), tmp_path / "bad", lambda tensors: None, extra)
    with pytest.raises(BadInput, match="lm_head"):
        export(folder, tmp_path / "out", "dense")


def test_fine_groups_lose_only_their_low_bits(packed, tmp_path):
    """Groups of twice the bits go to the nearest code of their own coarse grid; the others keep theirs."""
    folder = packed("llama", "fine")
    report, model = export(folder, tmp_path / "out", "gptq"), ptq.load(folder)
    assert {row["group_size"] for row in report["modules"]} == {16}
    fine = {name: m for name, m in model.named_modules() if getattr(m, "fine", None) is not None}
    rows = {row["name"]: row for row in report["modules"]}
    assert fine and len(fine) < len(rows)
    for name, row in rows.items():
        assert row["stored"] == ("rounded" if name in fine else "codes") and (row["why"] is not None) == (name in fine)
        largest = 0.0
        if name in fine:
            steps = fine[name].weight_scale[:, fine[name].weight_fine.long()].float()
            largest = steps.max().item()  # half a step, or less than one at the ends of the coarse grid
        assert row["largest_difference"] <= largest and (row["largest_difference"] > 0) == (name in fine)


def test_a_packed_head_is_written_as_numbers(packed, tmp_path):
    folder = packed("llama", "head")
    expected = logits(ptq.load(folder))
    head = ptq.load(folder).lm_head.dequantized_weight()
    for wanted in ("dense", "compressed-tensors", "gptq"):
        report = export(folder, tmp_path / wanted, wanted)
        assert report["modules"][-1]["name"] == "lm_head" and report["modules"][-1]["stored"] == "float32"
        assert torch.equal(tensors_of(tmp_path / wanted)["lm_head.weight"], head)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=2e-4 * expected.abs().max().item())


def test_a_foreign_quantization_is_refused(packed, tmp_path):
    export(packed("llama", "groups"), tmp_path / "ct", "compressed-tensors")
    with pytest.raises(BadInput, match="quantized by 'compressed-tensors'"):
        export(tmp_path / "ct", tmp_path / "out", "dense")


def test_an_unknown_family_is_unsupported(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_family"}))
    with pytest.raises(UnsupportedModel):
        export(tmp_path, tmp_path / "out", "gguf")


def test_export_writes_the_same_bytes_again(packed, tmp_path):
    for name in ("first", "second"):
        export(packed("llama", "ordered"), tmp_path / name, "gguf")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("first", "second"))
    assert first == second
