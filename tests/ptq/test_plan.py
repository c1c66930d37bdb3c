"""`ptq plan`: what it predicts beside what the run then does."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lowbit.modules import Linear
from tiny_models import TEXT, VOCAB
from transformers import AutoModelForCausalLM, LlamaConfig

from ptq.architectures import geometry_of, spec_for
from ptq.cli import main, plan, prune, quantize, run
from ptq.cli.parser import build_parser, parse
from ptq.errors import BadInput
from ptq.pipeline import open_model
from ptq.plan import memory, roofline
from ptq.plan.decoding import step_of
from ptq.plan.groups import clusters_of, groups_of
from ptq.plan.headers import headers_of
from ptq.plan.storage import store
from ptq.recipe_build import build, dump_yaml, load_yaml
from ptq.report import bits_of, is_compressed
from ptq.sites import InputSite, input_sites

ROOT = Path(__file__).resolve().parents[2]
ROWS = ("name", "shape", "bits", "groups", "storage", "keep")


@pytest.fixture(autouse=True)
def _keep_environment(monkeypatch):
    """main() sets Hugging Face's switches in os.environ; monkeypatch puts back every variable that it has touched."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_SAFETENSORS_CONVERSION", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def planned(recipe):
    """(what will be stored, effective bits)."""
    checkpoint, model, spec, names = open_model(recipe, offline=True)
    stored = store(recipe, model, spec, geometry_of(checkpoint.config, spec), names, headers_of(checkpoint))
    return stored, bits_of(recipe, checkpoint.config, spec, stored.modules, stored.sites)


# --- disk and bits


@pytest.mark.parametrize(
    "family, setting, dtype",
    [
        ("llama", "groups", torch.float32),
        ("gpt2", "rows", torch.bfloat16),
        ("bloom", "W8A8 static", torch.float32),
        ("qwen3", "W8A8 a token", torch.float32),
        ("opt", "2:4", torch.float32),
        ("llama", "zeros in place", torch.bfloat16),
        ("llama", "along rows", torch.float32),
        ("llama", "rotated", torch.float32),
        ("qwen2", "head", torch.float32),
        ("mixtral", "rows", torch.float32),
        ("mixtral", "zeros in place", torch.float32),
    ],
)
def test_what_the_recipe_fixes_is_predicted_exactly(packed, family, setting, dtype):
    folder = packed(family, setting, dtype)
    report = json.loads((folder / "report.json").read_text())
    stored, bits = planned(load_yaml(folder / "recipe.yaml"))
    for mine, theirs in zip(stored.modules, report["modules"], strict=True):
        assert {key: mine[key] for key in ROWS} == {key: theirs[key] for key in ROWS}
        assert mine["effective_bits"] == pytest.approx(theirs["effective_bits"])
    assert bits == pytest.approx(report["bits"])
    # the header's numbers have as many digits as the order of the tensors gives them
    assert stored.bytes == pytest.approx(report["sizes"]["compressed_bytes"], abs=256)


@pytest.mark.parametrize(
    "family, setting", [("opt", "W4A8"), ("llama", "uneven"), ("opt", "half of it zero"), ("llama", "fine")]
)
def test_what_the_text_decides_is_predicted_within_a_few_percent(packed, family, setting):
    folder = packed(family, setting)
    report = json.loads((folder / "report.json").read_text())
    stored, bits = planned(load_yaml(folder / "recipe.yaml"))
    assert stored.bytes == pytest.approx(report["sizes"]["compressed_bytes"], rel=0.05)
    assert bits["weights_effective"] == pytest.approx(report["bits"]["weights_effective"], rel=0.1)
    assert bits["activations_effective"] == pytest.approx(report["bits"]["activations_effective"])


def test_clusters_of_chance_make_more_groups_than_channels_alone_need():
    recipe, geometry = (
        build(weights={"bits": 4}),
        geometry_of(LlamaConfig(hidden_size=512, num_attention_heads=8), SPEC),
    )
    R1, _, R4, _ = input_sites(SPEC)
    for C in (512, 4096):  # most channels a group: 16 and 32
        sizes = groups_of(R1, clusters_of(R1, C, recipe, geometry), recipe)
        assert sizes.sum() == C and C / max(16, C // 128) < sizes.numel() < C / max(16, C // 128) + 32
    tiled = build(weights={"bits": 4}, clusters={"tile": 64})
    found = clusters_of(R4, 512, tiled, geometry)
    assert found.count == 8 and groups_of(R4, found, tiled).tolist() == [64] * 8
    with pytest.raises(BadInput, match="R1: 32 clusters of 16 channels"):
        clusters_of(InputSite("R1", (), None), 16, recipe, geometry)


SPEC = spec_for(LlamaConfig())


# --- no weights


def test_no_weight_is_read(model_folder, tmp_path):
    source, copy = model_folder("llama"), tmp_path / "copy"
    shutil.copytree(source, copy)
    path = copy / "model.safetensors"
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    path.write_bytes(data[:start] + b"\xff" * (len(data) - start))  # NaN, which a run refuses
    recipes = [build(model=str(folder), method="rtn", weights={"bits": 4}) for folder in (source, copy)]
    (one, _), (other, _) = map(planned, recipes)
    assert one.bytes == other.bytes and one.modules == other.modules
    assert all(t.is_meta for block in one.blocks for t in block.state_dict().values())


# --- memory


def wide_model(folder: Path, tokenizer) -> Path:
    """A model whose run holds much more than its process does before."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=6,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT * 100)
    return folder


# One process imports, and each command runs in a copy of it, as in a process of its own. The kernel tells the copy's peak: ru_maxrss would
# begin with what pytest holds.
CHILD = """
import json, os, sys
import ptq.pipeline, ptq.plan, transformers
from ptq.cli import main
for argv in json.loads(sys.argv[1]):
    if not os.fork():
        code = main(argv)
        print(code, next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1], flush=True)
        os._exit(0)
    os.wait()
"""
VERBS = {"quantize": ["--preset", "W4A8", "--act-grid", "tensor", "--method", "gptq"], "prune": ["--sparsity", "0.5"]}


@pytest.fixture(scope="module")
def peaks(tmp_path_factory, tokenizer):
    """By verb: (the plan, measured peak in bytes, bytes of the weight files)."""
    folder = tmp_path_factory.mktemp("peaks")
    model = wide_model(folder / "model", tokenizer)
    common = ["--calib", str(model / "text.txt"), "--nsamples", "16", "--seqlen", "256", "--device", "cpu"]
    commands = []
    for verb, options in VERBS.items():
        commands += [["plan", str(model), *options, *common, "--json", str(folder / f"{verb}.json")]]
        commands += [[verb, str(model), *options, *common, "--out", str(folder / verb), "-q", "--json", os.devnull]]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    options = {"env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(commands)], **options)
    said = [line.split() for line in done.stdout.splitlines() if line.startswith("0 ")]
    assert len(said) == len(commands), done.stdout + done.stderr
    found = {}
    for verb, (_, kilobytes) in zip(VERBS, said[1::2]):
        written = sum(path.stat().st_size for path in (folder / verb).glob("model-*.safetensors"))
        found[verb] = json.loads((folder / f"{verb}.json").read_text()), 1024 * int(kilobytes), written
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
@pytest.mark.parametrize("verb", VERBS)
def test_peak_and_disk_are_within_15_percent_of_the_run(peaks, verb):
    found, measured, written = peaks[verb]
    assert found["disk_bytes"] == pytest.approx(written, rel=0.15)
    assert found["peak_bytes"] == pytest.approx(measured, rel=0.15)
    # Above what the process holds anyway: looser, because the heap's holes depend on the order of all that came before.
    own = found["process_bytes"]
    assert measured - own > 0.2 * own, "the run must need enough to tell"
    assert found["peak_bytes"] - own == pytest.approx(measured - own, rel=0.4)


def test_peak_adds_holes_to_small_tensors_only():
    small, large = memory.Phase("small", [(3, 1 << 20)]), memory.Phase("large", [(1, 1 << 30)], mapped=5)
    assert memory.peak([small], blocks=2) == (round(memory.HEAP * 3 * (1 << 20)), "small")
    assert memory.peak([small], blocks=30)[0] > memory.peak([small], blocks=2)[0]
    # the heap stays as large as it was
    assert memory.peak([small, large], blocks=2) == (round(memory.HEAP * 3 * (1 << 20)) + (1 << 30) + 5, "large")


def test_memory_grows_with_what_a_run_holds(model_folder):
    def above(**changes):
        recipe = build(
            model=str(model_folder("llama")), **{"method": "sparsegpt", "pruning": {"sparsity": 0.5}, **changes}
        )
        checkpoint, model, spec, _ = open_model(recipe, offline=True)
        stored, _ = planned(recipe)
        tokens = memory.tokens_of(recipe, 4, 64)
        how = {"attention": "sdpa", "itemsize": 4}
        geometry = geometry_of(checkpoint.config, spec)
        return memory.peak(memory.block_phases(stored.blocks[0], spec, geometry, recipe, tokens, **how), blocks=2)[0]

    symmetric = {"weights": {"asymmetric": 0.0}}
    few, many = ({"calibration": {"nsamples": n, "seqlen": 64}} for n in (64, 256))
    assert 3.5 < above(**many) / above(**few) < 4  # hidden states outweigh a tiny block
    assert above(**many, **symmetric) < 0.6 * above(**many)


# --- speed


def test_roofline_is_bytes_over_bandwidth_or_products_over_arithmetic():
    machine = roofline.Machine(bandwidth=10e9, arithmetic=50e9)
    light = roofline.Step(batch=1, weights=8e9, keys_values=2e9, activations=0, multiplications=1e9)
    found = roofline.speed(light, machine)
    assert found.bound == "memory" and found.tokens_per_second == pytest.approx(1.0)
    assert found.shares == {"weights": 0.8, "keys and values": 0.2, "activations": 0.0}
    assert roofline.pays(found).startswith("weights are 80%")
    heavy = roofline.speed(roofline.Step(64, 8e9, 2e9, 0, 1000e9), machine)
    assert heavy.bound == "arithmetic" and heavy.tokens_per_second == pytest.approx(64 / 20)
    assert roofline.pays(heavy).startswith("arithmetic")


def test_bandwidth_is_that_of_a_machine():
    found = roofline.measure(torch.device("cpu"))
    assert 1e8 < found.bandwidth < 1e13 and 1e8 < found.arithmetic < 1e14


def step(folder, family="llama", **how):
    recipe = build(model=str(folder), method="rtn", weights={"bits": 4, "groups": 32})
    checkpoint, model, spec, names = open_model(recipe, offline=True)
    geometry = geometry_of(checkpoint.config, spec)
    stored, _ = planned(recipe)
    head = torch.empty(VOCAB, checkpoint.config.hidden_size, device="meta")
    how = {"batch": 1, "context": 8, "itemsize": 4, "kv_bits": None, "input_bits": {}, **how}
    return step_of(stored.blocks, head, spec, geometry, checkpoint.config, **how), stored


def test_a_step_reads_weights_once_and_each_sequence_s_cache(model_folder):
    one, stored = step(model_folder("llama"))
    linears = [m for block in stored.blocks for m in block.modules() if isinstance(m, Linear)]
    norms = 2 * 2 * 64 * 4  # blocks, norms of each, channels, bytes
    quantized = sum(linear.stored_bytes() for linear in linears)
    assert one.weights == quantized + norms + VOCAB * 64 * 4
    assert one.keys_values == 2 * 2 * 2 * 16 * 8 * 4  # keys and values, blocks, heads, channels, tokens, bytes
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    assert one.multiplications == weights + VOCAB * 64 + 2 * 2 * 4 * 16 * 8
    many, _ = step(model_folder("llama"), batch=16, context=32, kv_bits=4)
    assert many.weights == one.weights and many.keys_values == one.keys_values * 16 * 4 / 8
    rounded, _ = step(model_folder("llama"), input_bits={"R5": 8})
    assert one.activations - rounded.activations == 2 * 96 * 3


def test_a_sliding_layer_reads_its_window_and_experts_are_read_where_tokens_come(model_folder):
    layers = {n: step(model_folder("gemma3_text"), context=n)[0].keys_values for n in (8, 32)}
    assert layers[32] / layers[8] == (8 + 32) / (8 + 8)  # one layer slides over 8 tokens
    (few, stored), (all_of_them, _) = (step(model_folder("mixtral"), batch=n) for n in (1, 512))
    experts = [m for block in stored.blocks for m in block.mlp.experts.modules() if isinstance(m, Linear)]
    # two of four for one token
    assert all_of_them.weights - few.weights == pytest.approx(sum(m.stored_bytes() for m in experts) / 2)


# --- the command


@pytest.mark.parametrize(
    "verb, module, options",
    [
        ("quantize", quantize, ["--preset", "W4A8", "--set", "clusters.R1=8"]),
        ("quantize", quantize, ["--method", "rptq+", "--wbits", "4", "--abits", "4", "--nsamples", "3"]),
        ("prune", prune, ["--sparsity", "0.5", "--refine", "pcg:4", "--seed", "3"]),
        ("prune", prune, ["--nm", "2:4", "--wbits", "4", "--method", "wanda", "--set", "weights.asymmetric=0"]),
    ],
)
def test_the_recipe_is_that_of_the_verb(tmp_path, verb, module, options):
    wanted = module.recipe_from_args(parse([verb, "m", "--out", "o", *options]))
    assert plan.recipe_from_args(parse(["plan", "m", *options])) == wanted
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(wanted))
    assert run.recipe_from_args(parse(["run", str(path), "--out", "o"])) == wanted
    assert plan.recipe_from_args(parse(["plan", "m", "--recipe", str(path)])) == wanted


def test_every_option_of_quantize_and_prune_is_known_to_plan():
    verbs = build_parser()._subparsers._group_actions[0].choices
    dests = {name: {action.dest for action in verbs[name]._actions} for name in ("plan", "quantize", "prune")}
    assert (dests["quantize"] | dests["prune"]) - dests["plan"] == {"out", "resume", "verbose", "quiet"}
    both = dests["quantize"] & dests["prune"]
    assert set(plan.QUANTIZE_ONLY) == dests["quantize"] - both and set(plan.PRUNE_ONLY) == dests["prune"] - both


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--sparsity", "0.5", "--preset", "W4A8"], "--preset"),
        (["--wbits", "4", "--refine", "none"], "--refine"),
        (["--sparsity", "0.5", "--method", "rptq"], "does not prune"),
        (["--method", "sparsegpt"], "--sparsity"),
        (["--recipe", "r.yaml", "--wbits", "4"], "--wbits"),
        ([], "no bits chosen"),
        (["--wbits", "4", "--batch", "0"], "whole number"),
        (["--wbits", "4", "--calib", "no-such-text", "--seqlen", "16"], "no-such-text"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(model_folder, capsys, options, reason):
    folder = str(model_folder("llama"))
    capsys.readouterr()  # what making the folder said
    try:
        code = main(["plan", folder, *options])
    except SystemExit as stopped:  # argparse
        code = stopped.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("ptq: error: ") and err.count("\n") == 1 and reason in err


def test_not_a_model_is_2_and_an_unknown_family_3(model_folder, tmp_path, capsys):
    assert main(["plan", str(tmp_path), "--wbits", "4"]) == 2
    assert "config.json" in capsys.readouterr().err
    assert main(["plan", str(model_folder("mixtral")), "--preset", "W4A8"]) == 3
    assert "experts" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    shutil.copy(model_folder("llama") / "model.safetensors", tmp_path)
    assert main(["plan", str(tmp_path), "--wbits", "4"]) == 3


def test_the_command_says_what_where_and_how_fast(model_folder, text_file, tmp_path, capsys):
    argv = [
        "plan",
        str(model_folder("llama")),
        "--wbits",
        "4",
        "--kv-bits",
        "4",
        "--groups",
        "32",
        "--calib",
        str(text_file),
    ]
    argv += ["--set", "clusters.R1=8", "--nsamples", "1", "--seqlen", "16", "--batch", "4", "--context", "64"]
    argv += ["--set", "clusters.R4=8", "--set", "clusters.R5=8"]
    assert main([*argv, "--json", str(tmp_path / "plan.json")]) == 0
    out, found = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert {"peak_bytes", "disk_bytes", "effective_bits", "compressed_modules", "skipped_modules"} <= found.keys()
    assert len(found["compressed_modules"]) == 2 * 7 and found["decode"]["batch"] == 4
    reasons = {one["name"]: one["reason"] for one in found["skipped_modules"]}
    assert "norm" in reasons["model.layers.1.input_layernorm"] and "outside" in reasons["lm_head"]
    assert {"model.embed_tokens", "model.norm"} <= reasons.keys()
    assert "model.layers.*.mlp.down_proj" in out and "keys and values 5." not in out.splitlines()[0]
    assert "by budget: clusters" in out and "roofline model at batch 4, context 64" in out


def test_a_router_stays_and_a_share_of_the_blocks_is_told(model_folder, text_file, capsys):
    argv = ["plan", str(model_folder("mixtral")), "--sparsity", "0.5", "--first", "0.5", "--calib", str(text_file)]
    assert main([*argv, "--nsamples", "1", "--seqlen", "16", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name.split(".")[2] for name in (m["name"] for m in found["compressed_modules"])} == {"0"}
    reasons = {one["name"]: one["reason"] for one in found["skipped_modules"]}
    assert reasons["model.layers.0.mlp.gate"].startswith("router")
    assert "neither bits nor zeros" in reasons["model.layers.1.self_attn.q_proj"]
    assert all(is_compressed(module) for module in found["compressed_modules"])
