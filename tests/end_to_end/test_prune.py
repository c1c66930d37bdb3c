"""`ptq prune` on every family: the zeros that were asked for, everything else as it was, and numbers that mean what they say."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from folders import contents
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES as DENSE
from tiny_models import MOE, build_model
from transformers import AutoModelForCausalLM

import ptq
from ptq import pipeline, walk, weights
from ptq.architectures import FAMILIES
from ptq.cli import main
from ptq.errors import BadInput, NumericalFailure
from ptq.ledger import Ledger
from ptq.presets import PRUNING_METHODS

ALL = [*DENSE, *MOE]
PATTERNS = {"half": {"sparsity": 0.5}, "2:4": {"keep": "2:4"}}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Pruned:
    """A finished run: what left each block in it, and H by block and site as the solver got it."""

    source: Path
    out: Path
    report: dict
    left: list[torch.Tensor]
    H: list[dict[str, torch.Tensor]]


@pytest.fixture(scope="session")
def prune(recipe_for, run):
    """(source folder, out, options of recipe.build) -> Pruned."""
    complete, solve = Ledger.complete, weights.compress_site

    def made(source, out, method="sparsegpt", **options):
        # symmetric unless asked: a target that has moved is no longer in the checkpoint for a test to compare with
        options["weights"] = {"asymmetric": 0.0} | options.get("weights", {})
        left, H = [], [{}, {}]

        def keep(self, states, record):
            left.append(torch.cat(states))
            complete(self, states, record)

        def look(block, site, recipe, seen, orders, prefix, **options):
            H[int(prefix.rpartition(".")[2])][site.name] = None if seen is None else seen.clone()
            return solve(block, site, recipe, seen, orders, prefix, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ledger, "complete", keep)
            patch.setattr(weights, "compress_site", look)
            report = run(recipe_for(source, method=method, **options), out)
        return Pruned(Path(source), Path(out), report, left, H)

    return made


@pytest.fixture(scope="session")
def pruned(model_folder, prune, tmp_path_factory):
    """(family, pattern, storage, bits) -> its run, made once."""

    @functools.cache
    def made(family, pattern="2:4", storage="dense", bits=16):
        out = tmp_path_factory.mktemp("pruned") / family
        pruning = {**PATTERNS[pattern], "storage": storage}
        return prune(model_folder(family), out, pruning=pruning, weights={"bits": bits})

    return made


def stored(folder) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def linear_tensors(family, tensors) -> list[str]:
    """The decoder linears' weights: what has two axes in a block, but for a mixture's gates, which stay as they are."""
    inside = [name for name, t in tensors.items() if name.startswith(FAMILIES[family].blocks) and t.ndim >= 2]
    return [name for name in inside if not name.endswith((".gate.weight", "_gate.weight"))]


def tensor_of(family, module) -> str:
    """Where `save_pretrained` puts the weight of a module that the report names."""
    if family == "mixtral":
        module = module.replace(".mlp.experts.", ".block_sparse_moe.experts.")
        for role, letter in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            module = module.replace(f".{role}", f".{letter}")
    return f"{module}.weight"


def as_rows(family, W) -> torch.Tensor:
    """[R, C], rows of outputs: GPT-2 stores [C, R]."""
    return W.T if family == "gpt2" else W


def groups(W, m=4) -> torch.Tensor:
    """Nonzero weights of every m consecutive input channels, [R, C/m]."""
    return (W != 0).unflatten(1, (-1, m)).sum(-1)  # [R, C] -> [R, C/m, m] -> [R, C/m]


def dead_channels(result, name) -> int:
    """Input channels that were zero on every token; only a ReLU makes them."""
    if not re.fullmatch(r"model.decoder.layers.\d.fc2.weight", name):
        return 0
    i = int(name.split(".")[3])
    return int((result.H[i]["R5"].diagonal() == 0).sum())


def error_of(W, changed, H) -> float:
    """tr(E H E^T) / tr(W H W^T), E = W - changed, H damped by 1 percent of its mean diagonal over channels that live."""
    W, E, H = W.double(), (W - changed).double(), H.double().clone()
    dead = H.diagonal() == 0
    H += torch.eye(len(H)) * 0.01 * H.diagonal()[~dead].mean() + torch.diag(dead.double())
    return float(torch.einsum("rc,cd,rd", E, H, E) / torch.einsum("rc,cd,rd", W, H, W))


def logits_of(model, tokens):
    return model(tokens, use_cache=False).logits


def difference(x, y) -> float:
    return float((x - y).norm() / y.norm())


# --- dense results


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", ALL)
def test_a_dense_result_is_the_source_with_zeros(family, pattern, pruned):
    result = pruned(family, pattern)
    before, after = stored(result.source), stored(result.out)
    assert after.keys() == before.keys()
    assert all((t.shape, t.dtype) == (after[name].shape, after[name].dtype) for name, t in before.items())
    config = json.loads((result.out / "config.json").read_text())
    assert config == json.loads((result.source / "config.json").read_text()) and "quantization_config" not in config
    linears = linear_tensors(family, before)
    assert sorted(linears) == sorted(tensor_of(family, row["name"]) for row in result.report["modules"])
    for name in before.keys() - set(linears):
        assert torch.equal(after[name], before[name]), name
    for name in linears:
        W = as_rows(family, after[name])
        assert not (after[name].signbit() & (after[name] == 0)).any(), name
        if pattern == "half":
            dead = dead_channels(result, name)  # their columns are zero beside the budget
            assert int((W == 0).sum()) == W.shape[0] * dead + W.shape[0] * (W.shape[1] - dead) // 2, name
        else:
            assert (groups(W) == 2).all(), name


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", ALL)
def test_the_report_counts_what_is_stored(family, pattern, pruned):
    result = pruned(family, pattern)
    tensors, zeros, total = stored(result.out), 0, 0
    for row in result.report["modules"]:
        W = as_rows(family, tensors[tensor_of(family, row["name"])])
        assert row["shape"] == list(W.shape)
        assert row["sparsity"] == pytest.approx((W == 0).float().mean().item(), abs=1e-6)
        assert (row["keep"], row["storage"], row["bits"]) == ("2:4" if pattern == "2:4" else None, "dense", 16)
        assert row["effective_bits"] == 32 and row["failure"] is None and row["attempts"] >= 1
        zeros, total = zeros + int((W == 0).sum()), total + W.numel()
    assert result.report["sparsity"] == pytest.approx(zeros / total) and result.report["sparsity"] >= 0.5
    assert result.report["coverage"]["compressed_parameters"] == total


@pytest.mark.parametrize("family", ALL)
def test_transformers_loads_a_dense_result_and_computes_what_the_run_did(family, pruned, tokens):
    result = pruned(family)
    model, info = AutoModelForCausalLM.from_pretrained(result.out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    left = []
    for block in model.get_submodule(FAMILIES[family].blocks):
        block.register_forward_hook(lambda _, args, out: left.append(out[0] if isinstance(out, tuple) else out))
    logits = logits_of(model, tokens)
    for theirs, ours in zip(left, result.left, strict=True):
        # their norms, and GPT-2's Conv1D, round in another order than ours
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    whole = logits_of(AutoModelForCausalLM.from_pretrained(result.source), tokens)
    # half of a random model's weights cost 20 to 60 percent; zeros along the wrong axis cost about 140
    assert 1e-3 < difference(logits, whole) < 0.9


FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(torch.tensor(json.loads(sys.argv[2])), use_cache=False).logits
assert not {"ptq", "lowbit", "sparsegpt"} & set(sys.modules)
print(json.dumps(logits.flatten().tolist()))
"""


def test_a_dense_result_loads_where_this_package_is_not(pruned, tokens, tmp_path):
    out, some = pruned("gpt2").out, tokens[:1, :8]
    options = {"capture_output": True, "text": True, "cwd": tmp_path}
    options["env"] = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", FRESH, str(out), json.dumps(some.tolist())], **options)
    assert done.returncode == 0, done.stderr
    expected = logits_of(AutoModelForCausalLM.from_pretrained(out), some).flatten()
    assert torch.equal(torch.tensor(json.loads(done.stdout)), expected)


def test_gpt2_s_zeros_lie_along_its_inputs(pruned):
    tensors = stored(pruned("gpt2").out)
    for name in linear_tensors("gpt2", tensors):
        assert (groups(tensors[name].T) == 2).all()  # a Conv1D holds [in, out]
        assert (groups(tensors[name]) != 2).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_stays_half_precision(dtype, model_folder, prune, tmp_path):
    for family in ("llama", "gpt2"):
        source = model_folder(family, dtype)
        prune(source, tmp_path / family, pruning={"keep": "2:4"})
        before, after = stored(source), stored(tmp_path / family)
        assert {t.dtype for t in after.values()} == {dtype} and after.keys() == before.keys()
        linears = linear_tensors(family, before)
        assert all((groups(as_rows(family, after[name])) <= 2).all() for name in linears)
        assert all(torch.equal(after[name], before[name]) for name in before.keys() - set(linears))


def test_experts_that_are_stored_fused_stay_fused(prune, pruned, tokenizer, tmp_path):
    model = build_model("mixtral")
    model.config.save_pretrained(tmp_path / "m")
    save_file(model.state_dict(), tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(tmp_path / "m")
    result = prune(tmp_path / "m", tmp_path / "o", pruning={"keep": "2:4"})
    before, after, apart = stored(result.source), stored(result.out), stored(pruned("mixtral").out)
    assert after.keys() == before.keys()
    assert all((t.shape, t.dtype) == (after[name].shape, after[name].dtype) for name, t in before.items())
    for row in result.report["modules"]:
        if ".experts." in row["name"]:
            stem, e, role = row["name"].rsplit(".", 2)
            fused = after[f"{stem}.down_proj" if role == "down_proj" else f"{stem}.gate_up_proj"][int(e)]
            half = {"gate_proj": slice(0, 48), "up_proj": slice(48, 96), "down_proj": slice(None)}[role]
            assert torch.equal(fused[half], apart[tensor_of("mixtral", row["name"])]), row["name"]


# --- packed results


def pattern_of(family) -> str:
    """Every family once, the patterns in turn."""
    return list(PATTERNS)[ALL.index(family) % 2]


def loaded_run(result, tokens):
    """(model, what leaves each of its blocks, logits)."""
    model, left = ptq.load(result.out), []
    for block in model.get_submodule(FAMILIES[result.report["base_model"]["model_type"]].blocks):
        block.register_forward_hook(lambda _, args, out: left.append(out[0] if isinstance(out, tuple) else out))
    return model, left, logits_of(model, tokens)


@pytest.mark.parametrize("family", ALL)
def test_a_packed_result_holds_the_dense_one_s_weights(family, pruned, tokens):
    dense, packed = (pruned(family, pattern_of(family), storage) for storage in ("dense", "packed"))
    tensors = stored(dense.out)
    assert not {f"{row['name']}.weight" for row in packed.report["modules"]} & stored(packed.out).keys()
    model, left, logits = loaded_run(packed, tokens)
    for row, theirs in zip(packed.report["modules"], dense.report["modules"], strict=True):
        linear, W = model.get_submodule(row["name"]), tensors[tensor_of(family, row["name"])]
        assert torch.equal(linear.dequantized_weight(), as_rows(family, W)), row["name"]
        assert row["storage"] == "packed" and row["sparsity"] == theirs["sparsity"]
        assert row["relative_error"] == theirs["relative_error"]
        # half of the float32 values, and a mask of 1 bit a weight, or an index of 2 bits a kept value
        assert row["effective_bits"] == pytest.approx(32 * (1 - row["sparsity"]) + 1, abs=0.1)
    for theirs, ours in zip(left, packed.left, strict=True):
        assert torch.equal(theirs, ours)
    plain = logits_of(AutoModelForCausalLM.from_pretrained(dense.out), tokens)
    assert difference(logits, plain) < 1e-5  # the same weights; norms round in another order


@pytest.mark.parametrize("family", ALL)
def test_a_joint_result_runs_as_the_run_did_and_has_the_error_that_it_reports(family, pruned, tokens):
    result = pruned(family, pattern_of(family), "packed", 4)
    before = stored(result.source)
    model, left, _ = loaded_run(result, tokens)
    for theirs, ours in zip(left, result.left, strict=True):
        assert torch.equal(theirs, ours)
    changed, original = [], []
    for row in result.report["modules"]:
        W = model.get_submodule(row["name"]).dequantized_weight()
        assert (row["bits"], row["storage"]) == (4, "packed")
        assert row["sparsity"] == pytest.approx((W == 0).float().mean().item(), abs=1e-6) and row["sparsity"] >= 0.5
        assert all(len(r.unique()) <= 16 for r in W)
        if pattern_of(family) == "2:4":
            assert (groups(W) <= 2).all()
        if row["relative_error"] == result.report["modules"][0]["relative_error"]:  # the linears of block 0's R1
            changed.append(W)
            original.append(as_rows(family, before[tensor_of(family, row["name"])]))
    expected = error_of(torch.cat(original), torch.cat(changed), result.H[0]["R1"])
    # the solver works in float32 on a factor of H, here everything is float64
    assert result.report["modules"][0]["relative_error"] == pytest.approx(expected, rel=1e-2)


def test_reordering_quantization_and_pruning_at_once(model_folder, prune, tokens, tmp_path):
    pruning = {"sparsity": 0.3, "storage": "packed"}
    result = prune(model_folder("llama"), tmp_path / "o", "rptq", preset="W4A8", pruning=pruning)
    assert any(site["permuted"] for site in result.report["sites"]) and result.report["sparsity"] >= 0.3
    _, left, logits = loaded_run(result, tokens)
    for theirs, ours in zip(left, result.left, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
    whole = logits_of(AutoModelForCausalLM.from_pretrained(result.source), tokens)
    assert difference(logits, whole) < 0.9  # a lost permutation costs about 140 percent


# --- true sequential


@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2", "bloom", "gemma2", "mixtral"])
def test_every_site_is_solved_on_what_the_pruned_sites_before_it_make(family, pruned, tokens):
    result, spec = pruned(family), FAMILIES[family]
    inputs = {}
    for kind, folder in (("pruned", result.out), ("whole", result.source)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for i, block in enumerate(model.get_submodule(spec.blocks)):
            block.get_submodule(spec.output).register_forward_pre_hook(
                lambda _, args, key=(kind, i): inputs.update({key: args[0].flatten(0, -2)})  # [B, T, C] -> [T, C]
            )
        model(tokens, use_cache=False)
    for i in range(2):
        expected, other = (inputs[kind, i].T @ inputs[kind, i] for kind in ("pruned", "whole"))
        found = result.H[i]["R3"]
        assert difference(found, expected) < 1e-4  # sums in another order
        assert difference(found, other) > 0.01  # the query, key and value of the source give another H


def test_many_micro_batches_give_the_same_bytes_stopped_or_anew(recipe_for, run, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "MICRO_BATCH_TOKENS", 48)  # windows of 24: two at a time
    for family in ("opt", "qwen2_moe"):
        recipe = recipe_for(model_folder(family), method="sparsegpt", pruning={"sparsity": 0.5})
        for name, held in (("stopped", 1 << 30), ("anew", 0)):
            monkeypatch.setattr(walk, "PAUSED_BYTES", held)
            run(recipe, tmp_path / family / name)
        assert contents(tmp_path / family / "stopped") == contents(tmp_path / family / "anew")


# --- options


@pytest.mark.parametrize("method", PRUNING_METHODS)
def test_every_method_prunes_and_reports_its_error(method, model_folder, prune, tmp_path):
    result = prune(model_folder("qwen3"), tmp_path / "o", method, pruning={"sparsity": 0.6})
    before, after = stored(result.source), stored(result.out)
    for name in linear_tensors("qwen3", before):
        W = after[name]
        by_row = W.shape[0] * round(0.6 * W.shape[1])
        assert int((W == 0).sum()) == (by_row if method == "wanda" else round(0.6 * W.numel()))
        assert torch.equal(W[W != 0], before[name][W != 0]) == (method in ("wanda", "magnitude"))  # kept as they are
    rows = [row for row in result.report["modules"] if row["name"].startswith("model.layers.0.self_attn.")]
    changed, original = (torch.cat([t[f"{row['name']}.weight"] for row in rows[:3]]) for t in (after, before))
    expected = error_of(original, changed, result.H[0]["R1"])
    assert {row["relative_error"] for row in rows[:3]} == {rows[0]["relative_error"]}
    assert rows[0]["relative_error"] == pytest.approx(expected, rel=1e-2)


def test_refined_and_solved_methods_beat_the_scores(model_folder, prune, tmp_path):
    error, steps = {}, [("magnitude", 0), ("wanda", 0), ("sparsegpt", 0), ("sparsegpt", 10), ("admm", 15), ("alps", 10)]
    for method, refine in steps:
        out = tmp_path / f"{method}-{refine}"
        result = prune(model_folder("llama"), out, method, pruning={"sparsity": 0.5, "refine": refine})
        # block 0's R1 has the same input and H for all of them
        error[out.name] = result.report["modules"][0]["relative_error"]
    assert error["wanda-0"] < error["magnitude-0"]
    assert error["sparsegpt-0"] < error["wanda-0"] and error["sparsegpt-10"] < error["sparsegpt-0"]
    assert max(error["admm-15"], error["alps-10"]) < error["sparsegpt-0"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_zeros_that_were_there_stay_when_asked(family, pruned, prune, tmp_path):
    half = pruned(family, "half").out
    zeros = {name: t == 0 for name, t in stored(half).items()}
    options = {"70": {"sparsity": 0.7, "preserve": True}, "nm": {"keep": "2:4", "preserve": True}}
    options["not"] = {"keep": "2:4"}
    found = {name: stored(prune(half, tmp_path / name, pruning=p).out) for name, p in options.items()}
    revived = 0
    for name in linear_tensors(family, zeros):
        was = zeros[name]
        assert int((found["70"][name] == 0).sum()) == round(0.7 * was.numel())
        assert not found["70"][name][was].any() and not found["nm"][name][was].any()
        W, left = as_rows(family, found["nm"][name]), groups(as_rows(family, (~was).float()))
        assert torch.equal(groups(W), left.clamp(max=2))
        revived += int((found["not"][name][was] != 0).sum())
    # without --preserve some come back: a group of three zeros keeps two weights, whatever they were
    assert revived > 0


def test_first_leaves_the_later_blocks_alone(model_folder, prune, tmp_path):
    for family, allocation in (("llama", "uniform"), ("gpt2", "owl"), ("opt", "error")):
        result = prune(
            model_folder(family), tmp_path / family, pruning={"sparsity": 0.5, "first": 0.5, "allocation": allocation}
        )
        before, after = stored(result.source), stored(result.out)
        later = [name for name in before if name.startswith(f"{FAMILIES[family].blocks}.1.")]
        assert later and all(torch.equal(after[name], before[name]) for name in later)
        first = [after[n] for n in linear_tensors(family, after) if n.startswith(f"{FAMILIES[family].blocks}.0.")]
        # each linear rounds the count of its own share; OPT has dead channels beside it
        assert sum(int((W == 0).sum()) for W in first) >= sum(W.numel() for W in first) // 2 - len(first)
        rows = [row for row in result.report["modules"] if ".1." in row["name"]]
        assert rows and all(row["sparsity"] is None and row["relative_error"] is None for row in rows)
        assert result.report["sparsity"] == pytest.approx(0.25, abs=0.01)  # OPT has a few dead channels
        assert main(["inspect", str(result.out)]) == 0


@pytest.mark.parametrize("family, allocation", [("llama", "owl"), ("llama", "error"), ("mixtral", "error")])
def test_an_allocation_spreads_the_same_number_of_zeros(family, allocation, model_folder, prune, tmp_path):
    result = prune(model_folder(family), tmp_path / "o", pruning={"sparsity": 0.6, "allocation": allocation})
    rows = result.report["modules"]
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    # each linear rounds its own count
    assert result.report["sparsity"] == pytest.approx(0.6, abs=0.5 * len(rows) / weights)
    shares = {round(row["sparsity"], 2) for row in rows}
    assert len(shares) == 2 if allocation == "owl" else len(shares) > 2  # blocks differ, or sites do


# --- asymmetric targets


@pytest.mark.parametrize("family", ["opt", "llama", "gptj", "gemma2", "mixtral", "qwen2_moe"])
def test_asymmetric_targets_are_made_beside_the_full_precision_model(
    family, model_folder, prune, run, recipe_for, tmp_path
):
    """What goes beside is full precision: its states are those of a run that prunes nothing."""
    options = {"pruning": {"sparsity": 0.5}, "weights": {"asymmetric": 0.5}}
    result = prune(model_folder(family), tmp_path / "pruned", **options)
    untouched = prune(model_folder(family), tmp_path / "same", method="gptq", weights={"bits": 16})
    for left, full in zip(result.left, untouched.left, strict=True):
        both = left.unflatten(0, (2, -1))  # [2 B, T, C] -> [2, B, T, C]
        torch.testing.assert_close(both[1], full)
        assert not torch.allclose(both[0], full)


def test_asymmetric_targets_with_reordered_channels_are_in_their_order(model_folder, prune, tmp_path):
    options = {"preset": "W4A8", "true_sequential": True}
    symmetric = prune(model_folder("llama"), tmp_path / "symmetric", method="rptq", **options)
    result = prune(
        model_folder("llama"), tmp_path / "asymmetric", method="rptq", **options, weights={"asymmetric": 0.5}
    )
    untouched = prune(model_folder("llama"), tmp_path / "same", method="gptq", weights={"bits": 16})
    for left, before, full in zip(result.left, symmetric.left, untouched.left, strict=True):
        both = left.unflatten(0, (2, -1))  # [2 B, T, C] -> [2, B, T, C]
        torch.testing.assert_close(both[1], full, rtol=1e-4, atol=1e-4)  # sums of channels in another order
        # a target of channels that are not its own would be far off; on random weights the gain itself is small
        assert difference(both[0], full) < 1.1 * difference(before, full)


@pytest.mark.parametrize(
    "family, method, options, said",
    [
        ("opt", "sparsegpt", {"true_sequential": False}, "weights.asymmetric: needs each linear's own input"),
        ("opt", "wanda", {}, "weights.asymmetric: no solver moves the weights"),
    ],
)
def test_asymmetric_targets_that_cannot_be_are_refused(family, method, options, said, model_folder, prune, tmp_path):
    options |= {"pruning": {"sparsity": 0.5}, "weights": {"asymmetric": 0.5}}
    with pytest.raises(BadInput, match=said):
        prune(model_folder(family), tmp_path / "o", method=method, **options)
    assert not (tmp_path / "o").exists()


# --- repeated, killed and resumed


@pytest.mark.parametrize("family", ["phi", "qwen3_moe"])
def test_the_same_recipe_writes_the_same_bytes(family, pruned, prune, model_folder, tmp_path):
    again = prune(model_folder(family), tmp_path / "o", pruning={"keep": "2:4", "storage": "dense"})
    assert contents(again.out) == contents(pruned(family).out)


@pytest.mark.parametrize(
    "allocation, storage, asymmetric", [("uniform", "dense", 0.0), ("error", "packed", 0.0), ("uniform", "dense", 0.5)]
)
def test_resumed_from_states_that_a_kill_leaves_the_bytes_are_the_same(
    allocation, storage, asymmetric, small, recipe_for, run, states_of_a_kill
):
    pruning = {"sparsity": 0.5, "allocation": allocation, "storage": storage}
    recipe = recipe_for(small, method="sparsegpt", pruning=pruning, weights={"asymmetric": asymmetric})
    out, states = states_of_a_kill(recipe)
    whole = contents(out)
    resumable = [s for s in states if (s / "out.partial" / "ledger.json").is_file()]
    assert len(resumable) >= 10
    for state in resumable[::5]:
        run(recipe, state / "out", resume=True)
        assert [p.name for p in state.iterdir()] == ["out"] and contents(state / "out") == whole, state.name


def verb(source, out, text, *options) -> list[str]:
    """The command line of a run as `recipe_for` makes it."""
    calibration = f"--calib {text} --nsamples 6 --seqlen 24 --set calibration.mode=first --device cpu --quiet"
    return ["prune", str(source), "--out", str(out), *calibration.split(), *options]


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("ptq: error: ") and err.count("\n") == 1, err
    return err


def test_an_interrupted_command_says_how_to_go_on(small, recipe_for, run, text_file, tmp_path, capsys, monkeypatch):
    recipe, out = recipe_for(small, method="alps", pruning={"keep": "2:4"}), tmp_path / "out"
    run(recipe, tmp_path / "whole")
    clusters = f"clusters={json.dumps(vars(recipe.clusters))}"  # unused, but written into recipe.yaml
    line = verb(small, out, text_file, "--nm", "2:4", "--method", "alps", "--set", clusters)
    complete = Ledger.complete

    def then_stop(self, *args):
        complete(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "complete", then_stop)
        assert main(line) == 130
    assert not out.exists() and (tmp_path / "out.partial" / "model-00001-of-00003.safetensors").is_file()
    _, command = one_line(capsys).split("interrupted; resume with: ptq ")
    assert main(shlex.split(command)) == 0
    assert contents(out) == contents(tmp_path / "whole")


# --- what goes wrong


def damaged(folder, target, change) -> Path:
    """A copy of `folder` after change(tensors)."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


BLOCK = "model.decoder.layers.1"


def silence(tensors):
    """The second block's MLP gets zeros as its input, so its H is zero."""
    tensors[f"{BLOCK}.final_layer_norm.weight"].zero_()
    tensors[f"{BLOCK}.final_layer_norm.bias"].zero_()


@pytest.mark.parametrize("allocation", ["uniform", "error"])
def test_an_h_that_cannot_be_factored_names_the_module(allocation, model_folder, text_file, tmp_path, capsys):
    source = damaged(model_folder("opt"), tmp_path / "m", silence)
    line = verb(source, tmp_path / "o", text_file, "--sparsity", "0.5", "--allocation", allocation)
    assert main(line) == 4
    name = {"uniform": "fc1", "error": "R4"}[allocation]
    assert f"{BLOCK}.{name}: H is zero for all C=64 channels" in one_line(capsys)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("allocation", ["uniform", "error"])
def test_under_skip_the_module_stays_whole_and_is_reported(allocation, model_folder, text_file, tmp_path, capsys):
    source = damaged(model_folder("opt"), tmp_path / "m", silence)
    options = ["--sparsity", "0.5", "--on-failure", "skip", "--allocation", allocation]
    assert main(verb(source, tmp_path / "o", text_file, *options)) == 0
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    before, after = stored(source), stored(tmp_path / "o")
    whole = [row for row in report["modules"] if row["failure"]]
    assert [row["name"] for row in whole] == [f"{BLOCK}.fc1"]
    assert torch.equal(after[f"{BLOCK}.fc1.weight"], before[f"{BLOCK}.fc1.weight"])
    row = whole[0]
    assert (row["sparsity"], row["relative_error"], row["damp"], row["bits"]) == (None, None, None, 16)
    assert row["failure"].startswith("H is zero for all C=64 channels")
    assert {"name": f"{BLOCK}.fc1", "reason": row["failure"]} in report["coverage"]["skipped"]
    expected = f"1 modules were left whole because their H could not be factored, first {BLOCK}.fc1"
    assert expected in report["warnings"]
    assert all((after[f"{r['name']}.weight"] == 0).any() for r in report["modules"] if not r["failure"])
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "o")]) == 0
    assert f"{BLOCK}.fc1: H is zero" in capsys.readouterr().out


def test_activations_that_overflow_end_the_run(model_folder, text_file, tmp_path, capsys):
    def damage(tensors):  # finite weights whose products are not
        tensors[f"{BLOCK}.final_layer_norm.weight"].fill_(1e20)

    source = damaged(model_folder("opt"), tmp_path / "m", damage)
    assert main(verb(source, tmp_path / "o", text_file, "--sparsity", "0.5")) == 4
    assert f"{BLOCK}.fc1: H [64, 64] holds NaN or Inf" in one_line(capsys)

    def burst(tensors):  # nothing overflows before the block's output
        tensors[f"{BLOCK}.fc2.bias"].fill_(float(torch.finfo(torch.float32).max))
        tensors[f"{BLOCK}.self_attn.out_proj.bias"].fill_(float(torch.finfo(torch.float32).max))

    source = damaged(model_folder("opt"), tmp_path / "m2", burst)
    assert main(verb(source, tmp_path / "o2", text_file, "--nm", "2:4", "--on-failure", "skip")) == 4
    assert f"{BLOCK}: " in one_line(capsys)
    assert not (tmp_path / "o").exists() and not (tmp_path / "o2").exists()


def test_a_numerical_failure_is_resumable_to_the_same_failure(model_folder, recipe_for, run, tmp_path):
    source = damaged(model_folder("opt"), tmp_path / "m", silence)
    recipe = recipe_for(source, method="sparsegpt", pruning={"sparsity": 0.5})
    for resume in (False, True):
        with pytest.raises(NumericalFailure, match=f"{BLOCK}.fc1: H is zero"):
            run(recipe, tmp_path / "o", resume=resume)
    assert (tmp_path / "o.partial" / "model-00001-of-00003.safetensors").is_file()


def test_too_few_tokens_are_a_warning_with_the_number(model_folder, text_file, tmp_path, capsys):
    line = verb(model_folder("llama"), tmp_path / "o", text_file, "--sparsity", "0.5", "--json", "-")
    line[line.index("--nsamples") + 1] = "3"
    assert main(line) == 0
    report = json.loads(capsys.readouterr().out)
    expected = "2 modules saw fewer calibration tokens than they have input channels, "
    expected += "first model.layers.0.mlp.down_proj: 72 of 96; use more calibration tokens"
    assert expected in report["warnings"]
    assert {row["tokens"] for row in report["modules"]} == {72}


# --- inspect


@pytest.mark.parametrize("family", ALL)
def test_inspect_verifies_dense_and_joint_results(family, pruned, capsys):
    for result in (pruned(family), pruned(family, pattern_of(family), "packed", 4)):
        assert main(["inspect", str(result.out), "--json", "-"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert {m["name"] for m in found["modules"]} == {row["name"] for row in result.report["modules"]}
        assert all(m["zeros"] == round(m["sparsity"] * m["weights"]) for m in found["modules"])


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_inspect_finds_a_group_that_keeps_one_too_many(family, pruned, tmp_path, capsys):
    folder = Path(shutil.copytree(pruned(family).out, tmp_path / "o"))
    row = pruned(family).report["modules"][-1]
    name, shard = tensor_of(family, row["name"]), folder / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    W = as_rows(family, tensors[name])
    r, c = (W == 0).nonzero()[-1].tolist()
    W[r, c] = 1.0
    save_file(tensors, shard, metadata={"format": "pt"})
    assert main(["inspect", str(folder)]) == 2
    assert f"{row['name']}: row {r}, group {c // 4} keeps 3, the report says 2:4" in one_line(capsys)
