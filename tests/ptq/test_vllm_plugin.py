"""Which packed models vLLM can run, decided from the config alone; what it then computes is in test_vllm_peers.py."""

from __future__ import annotations

import json
import subprocess
import sys

import lowbit
import pytest
from lowbit import ActivationQuantizer
from test_layout import ROOT

from ptq.hf import FORMAT_VERSION
from ptq.vllm_plugin import LEAVES, check_runs, parts_of

NAME = "model.layers.1.self_attn.q_proj"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def linear(**options):
    return lowbit.Linear(64, 8, bits=4, **options).spec()


def config(modules, **facts):
    return {"format_version": FORMAT_VERSION, "kv_bits": 16, "softmax_bits": 16, "modules": modules, **facts}


def static():
    return ActivationQuantizer("static", clusters=1)


def test_weights_alone_and_inputs_rounded_token_by_token_run():
    token = ActivationQuantizer("token", token_bits=8)
    specs = [linear(), linear(input_quantizer=token), linear(rotation=32), linear(fine={"groups": 1, "channels": 32})]
    plain = lowbit.Norm(64, kind="rmsnorm", eps=1e-5).spec()
    check_runs(
        config({f"model.layers.{i}.mlp.down_proj": spec for i, spec in enumerate(specs)} | {"model.norm": plain})
    )
    check_runs(config({f"model.layers.0.mlp.{leaf}": linear() for leaf in LEAVES}))


REFUSED = {
    "4 bits": (config({}, kv_bits=4), "keys and values have grids of 4 bits"),
    "softmax": (config({}, softmax_bits=8), "softmax outputs are rounded to 8 bits"),
    "static": (config({NAME: linear(input_quantizer=static())}), f"{NAME} has static grids for its input"),
    "output": (config({NAME: linear(output_quantizer=static())}), f"{NAME} rounds its output"),
    "sinks": (
        config({NAME: linear(input_quantizer=ActivationQuantizer("token", token_bits=8, sinks=1))}),
        f"{NAME} spares attention sinks",
    ),
    "order": (config({"n": lowbit.Norm(64, kind="rmsnorm", eps=1e-5, permuted=True).spec()}), "n permutes"),
    "norm": (config({"n": lowbit.Norm(64, kind="rmsnorm", eps=1e-5, quantizer=static()).spec()}), "n permutes"),
    "fused": (config({"h.0.attn.c_attn": linear()}), "h.0.attn.c_attn is no linear of a plain"),
    "experts": (config({"model.layers.0.mlp.experts.0.up_proj": linear()}), "experts.0.up_proj is no linear"),
    "head": (config({"lm_head": linear()}), "lm_head is no linear"),
    "version": (config({}, format_version=3), "packed format version 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_cannot_run_is_refused_in_one_line(name):
    wrong, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as refused:
        check_runs(wrong)
    assert "\n" not in str(refused.value)


def test_presets_of_the_paper_are_refused(w4a8_config):
    with pytest.raises(ValueError, match="keys and values have grids of 8 bits"):
        check_runs(w4a8_config)


@pytest.fixture(scope="module")
def w4a8_config(model_folder, text_file, tmp_path_factory):
    import ptq

    out = tmp_path_factory.mktemp("vllm") / "out"
    ptq.quantize(model_folder("llama"), out, preset="W4A8", calib=str(text_file), nsamples=2, seqlen=24)
    return json.loads((out / "config.json").read_text())["quantization_config"]


def test_a_fused_layer_is_its_parts_in_vllms_order():
    modules = {f"model.layers.0.self_attn.{leaf}": leaf for leaf in ("v_proj", "k_proj", "q_proj", "o_proj")}
    assert parts_of("model.layers.0.self_attn.qkv_proj", FUSED, modules) == ["q_proj", "k_proj", "v_proj"]
    assert parts_of("model.layers.0.self_attn.o_proj", FUSED, modules) == ["o_proj"]
    assert parts_of("model.layers.0.mlp.gate_up_proj", FUSED, modules) is None
    assert parts_of("up_proj", {}, {"up_proj": 1}) == [1]
    del modules["model.layers.0.self_attn.k_proj"]
    with pytest.raises(ValueError, match="only .*q_proj, .*v_proj of .*k_proj.* are packed"):
        parts_of("model.layers.0.self_attn.qkv_proj", FUSED, modules)


def test_vllm_finds_the_plugin_and_looking_for_it_imports_nothing_of_vllm():
    entry = '[project.entry-points."vllm.general_plugins"]\nptq = "ptq.vllm_plugin:register"\n'
    assert entry in (ROOT / "pyproject.toml").read_text(encoding="utf8")
    code = "import sys, ptq.vllm_plugin as p; assert callable(p.register); print('vllm' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False False\n", done.stderr
