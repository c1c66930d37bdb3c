"""`ptq inspect` on pruned folders: it counts in the tensors, and finds what a report claims wrongly."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from lowbit.modules import Linear
from safetensors.torch import load_file, save_file
from tiny_models import build_model
from torch import nn
from transformers import AutoModelForCausalLM

import ptq
from ptq.architectures import FAMILIES
from ptq.blocks import linear_paths
from ptq.cli import main
from ptq.hf import FORMAT_VERSION

EXAMPLES = {"gpt2": "transformer.h.0.attn.c_proj", "llama": "model.layers.1.mlp.down_proj"}


def linears(model, family):
    blocks = FAMILIES[family].blocks
    found = {}
    for i, block in enumerate(model.get_submodule(blocks)):
        found |= {f"{blocks}.{i}.{path}": block.get_submodule(path) for path in linear_paths(FAMILIES[family], block)}
    return found


def two_of_four(W):
    """The mask of the two largest of every four columns."""
    rank = W.abs().unflatten(1, (-1, 4)).argsort(-1).argsort(-1)  # [R, C] -> [R, G, 4]
    return (rank >= 2).flatten(1)


def prune(family):
    """A tiny model with 2:4 weights in every linear of its blocks; (model, mask [R, C] by module)."""
    model, masks = build_model(family), {}
    with torch.no_grad():
        for name, linear in linears(model, family).items():
            W = linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
            masks[name] = two_of_four(W)
            W.mul_(masks[name])  # leaves -0.0, which is zero too
    return model, masks


def report_of(masks, **more):
    rows = [
        {"name": name, "shape": list(kept.shape), "bits": 16, "sparsity": 1 - kept.float().mean().item(), **more}
        for name, kept in masks.items()
    ]
    return {"modules": [{"keep": "2:4", **row} for row in rows]}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """family -> folder of a 2:4 model in its source's layout with a report, and the model."""
    made = {}

    def folder(family):
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            model, masks = prune(family)
            model.save_pretrained(path)
            (path / "report.json").write_text(json.dumps(report_of(masks, storage="dense")))
            made[family] = SimpleNamespace(path=path, model=model, masks=masks)
        return made[family]

    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory, pruned):
    """storage -> folder of the pruned llama with packed sparse weights, and a report."""
    made = {}

    def folder(storage):
        if storage not in made:
            path = tmp_path_factory.mktemp("packed")
            write_packed(path, pruned("llama"), storage)
            made[storage] = path
        return made[storage]

    return folder


def write_packed(path, source, storage):
    tensors = {name: t.detach() for name, t in source.model.state_dict().items()}
    specs, masks = {}, {}
    for name, theirs in linears(source.model, "llama").items():
        linear, kept = Linear.full_precision(theirs), source.masks[name]
        if storage == "4-bit bitmask":
            codes = torch.randint(0, 16, kept.shape, generator=torch.Generator().manual_seed(0)).byte()
            grid = torch.full((len(kept), 1), 0.01).half(), torch.full((len(kept), 1), 8.0)
            linear.pack_(codes, *grid, torch.tensor([kept.shape[1]]), 4, kept=kept)
        else:
            linear.pack_sparse_(kept, (2, 4) if storage == "n:m" else None)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{local}": t for local, t in linear.state_dict().items()}
        specs[name], masks[name] = linear.spec(), linear.kept()
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    config = json.loads((source.path / "config.json").read_text())
    quantization = {
        "quant_method": "ptq",
        "format_version": FORMAT_VERSION,
        "softmax_bits": 16,
        "kv_bits": 16,
        "modules": specs,
    }
    config |= {"model_type": "ptq_llama", "quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    (path / "report.json").write_text(json.dumps(report_of(masks, storage="packed")))


def inspected(folder, capsys):
    """(exit code, stdout as JSON or None, stderr)."""
    code = main(["inspect", str(folder), "--json", "-"])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else None, said.err


def edited(folder, target, change):
    """A copy of `folder` in `target` with change(tensors) applied to the shard."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def set_report(folder, **row):
    report = json.loads((folder / "report.json").read_text())
    report["modules"][0] |= row
    (folder / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "gpt_neox", "bloom", "phi"])
def test_zeros_of_a_source_layout_are_counted(family, pruned, capsys):
    source = pruned(family)
    code, found, err = inspected(source.path, capsys)
    assert code == 0, err
    assert [m["name"] for m in found["modules"]] == list(source.masks) and found["quant_method"] is None
    for module in found["modules"]:
        R, C = module["shape"]
        assert module["weights"] == R * C == 2 * module["zeros"] and module["sparsity"] == 0.5
        assert module["stored_bytes"] == module["dense_bytes"] == 4 * R * C


def test_the_text_says_what_was_counted(pruned, packed, capsys):
    assert main(["inspect", str(pruned("opt").path)]) == 0
    out = capsys.readouterr().out
    head, first, *_ = out.splitlines()
    assert head.split()[-5:] == ["zeros", "keep", "bytes", "dense", "bytes"]
    assert first.split()[-4:] == ["0.500", "2:4", "16384", "16384"]
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 96)
    assert "12 of 12 linears pruned" in out
    assert f"12 pruned linears counted: {weights // 2:,} of {weights:,} weights are zero (50.00%)" in out
    assert "every group checked: 2:4" in out and "take 0.23 MB on disk, 0.23 MB dense" in out
    assert main(["inspect", str(packed("n:m"))]) == 0
    out = capsys.readouterr().out
    assert "14 of 14 linears compressed" in out and "take 0.13 MB on disk, 0.25 MB dense" in out


def test_a_hub_file_without_the_base_model_s_prefix(pruned, tmp_path, capsys):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    folder = edited(pruned("gpt2").path, tmp_path / "d", strip)
    code, found, err = inspected(folder, capsys)
    assert code == 0 and found["modules"][0]["sparsity"] == 0.5, err


def test_zeros_of_each_expert_are_counted(tmp_path, capsys):
    model, masks = build_model("mixtral"), {}
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            for e, (gate_up, down) in enumerate(zip(layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj)):
                for role, W in zip(("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2), down)):
                    masks[f"model.layers.{i}.mlp.experts.{e}.{role}"] = two_of_four(W)
                    W.mul_(masks[f"model.layers.{i}.mlp.experts.{e}.{role}"])
    model.save_pretrained(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(report_of(masks, storage="dense")))
    code, found, err = inspected(tmp_path, capsys)
    assert code == 0, err
    assert len(found["modules"]) == 2 * 4 * 3 and {m["sparsity"] for m in found["modules"]} == {0.5}
    set_report(tmp_path, keep="1:4")
    code, _, err = inspected(tmp_path, capsys)
    assert code == 2 and "model.layers.0.mlp.experts.0.gate_proj: row 0, group 0 keeps 2" in err


@pytest.mark.parametrize("family", EXAMPLES)
def test_one_more_weight_in_one_group_is_found(family, pruned, tmp_path, capsys):
    name = EXAMPLES[family]
    kept = pruned(family).masks[name]
    row, column = [int(i) for i in (~kept).nonzero()[-1]]

    def change(tensors):
        stored = tensors[f"{name}.weight"]
        W = stored.T if family == "gpt2" else stored  # a Conv1D's weight is [in, out]
        W[row, column] = 1.0

    folder = edited(pruned(family).path, tmp_path / "d", change)
    code, found, err = inspected(folder, capsys)
    assert code == 2 and found is None and err.count("\n") == 1
    assert f"{name}: row {row}, group {column // 4} keeps 3, the report says 2:4 (0 more such groups)" in err


def test_another_number_of_zeros_than_the_report_s_is_found(pruned, tmp_path, capsys):
    name = "model.layers.1.mlp.down_proj"

    def change(tensors):
        W = tensors[f"{name}.weight"]
        W.view(-1)[int(W.view(-1).nonzero()[0])] = 0.0  # no group is crowded, one weight is gone

    code, _, err = inspected(edited(pruned("llama").path, tmp_path / "d", change), capsys)
    assert code == 2 and f"{name}: 3073 of 6144 weights are zero, the report says 3072" in err


@pytest.mark.parametrize(
    "row, message",
    [
        ({"name": "model.layers.0.gone"}, "model.layers.0.gone"),
        ({"name": "model.layers.0.input_layernorm"}, "model.layers.0.input_layernorm"),
        ({"keep": "1:4"}, "keeps 2, the report says 1:4"),
        ({"keep": "half"}, "half"),
        ({"shape": [2, 3]}, "the weight is [64, 64], the report says [2, 3]"),
        ({"sparsity": 0.25}, "2048 of 4096 weights are zero, the report says 1024"),
    ],
)
def test_a_report_of_another_model_is_refused(row, message, pruned, tmp_path, capsys):
    folder = shutil.copytree(pruned("llama").path, tmp_path / "d")
    set_report(folder, **row)
    code, _, err = inspected(folder, capsys)
    assert code == 2 and err.count("\n") == 1 and message in err


def test_a_report_made_before_these_keys_claims_nothing(pruned, tmp_path, capsys):
    folder = shutil.copytree(pruned("llama").path, tmp_path / "d")
    report = json.loads((folder / "report.json").read_text())
    report["modules"] = [{k: row[k] for k in ("name", "shape", "bits")} for row in report["modules"]]
    (folder / "report.json").write_text(json.dumps(report))
    code, found, _ = inspected(folder, capsys)
    assert code == 0 and found["modules"] == []


# --- packed


@pytest.mark.parametrize("storage", ["bitmask", "n:m", "4-bit bitmask"])
def test_packed_folders_are_counted_and_take_what_their_tensors_take(storage, packed, capsys):
    code, found, err = inspected(packed(storage), capsys)
    assert code == 0, err
    tensors = load_file(packed(storage) / "model.safetensors")
    for module in found["modules"]:
        own = [t for name, t in tensors.items() if name.startswith(f"{module['name']}.weight")]
        R, C = module["shape"]
        assert module["stored_bytes"] == sum(t.numel() * t.element_size() for t in own) < module["dense_bytes"]
        assert module["dense_bytes"] == 4 * R * C
        assert module["sparsity"] >= 0.5 and (storage == "4-bit bitmask" or module["zeros"] * 2 == R * C)


def test_packed_folders_without_a_report_are_counted(packed, tmp_path, capsys):
    folder = shutil.copytree(packed("n:m"), tmp_path / "d")
    (folder / "report.json").unlink()
    code, found, _ = inspected(folder, capsys)
    assert code == 0 and {m["keep"] for m in found["modules"]} == {"2:4"}
    assert {m["sparsity"] for m in found["modules"]} == {0.5}


@pytest.mark.parametrize(
    "storage, tensor", [("bitmask", "weight_mask"), ("n:m", "weight_indices"), ("4-bit bitmask", "weight_mask")]
)
def test_damaged_masks_and_indices_are_found(storage, tensor, packed, tmp_path, capsys):
    name = "model.layers.0.self_attn.q_proj"

    def change(tensors):
        tensors[f"{name}.{tensor}"][3, 1] = 0

    code, _, err = inspected(edited(packed(storage), tmp_path / "d", change), capsys)
    assert code == 2 and err.count("\n") == 1 and f"{name}: " in err and "corrupt" in err


def test_packed_weights_of_another_shape_or_gone_are_found(packed, tmp_path, capsys):
    name = "model.layers.0.self_attn.q_proj.weight_values"

    def shorten(tensors):
        tensors[name] = tensors[name][:-1].clone()

    code, _, err = inspected(edited(packed("bitmask"), tmp_path / "short", shorten), capsys)
    assert code == 2 and "weight_values is [2047], config.json says [2048]" in err
    code, _, err = inspected(edited(packed("bitmask"), tmp_path / "gone", lambda t: t.pop(name)), capsys)
    assert code == 2 and f"{name} is missing" in err


@pytest.mark.parametrize("storage", ["bitmask", "n:m"])
def test_packed_sparse_folders_run_as_the_pruned_model(storage, packed, pruned):
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(pruned("llama").path)(tokens).logits
        assert torch.equal(ptq.load(packed(storage))(tokens).logits, expected)
