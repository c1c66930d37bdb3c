"""Foreign engines read the exports: transformers with compressed-tensors, GPTQModel, llama.cpp. Each is skipped where it is not installed.

pip install compressed-tensors llama-cpp-python gguf
pip install gptqmodel        # in an environment of its own: it wants other versions of torch
pytest -m peers
"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from lowbit import pack
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tiny_models import TEXT
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import ptq
from ptq.cli import main
from ptq.export import export
from ptq.export.codes import weights_of
from ptq.export.source import block_of, open_source

pytestmark = pytest.mark.peers
TOKENS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def weights(folder):
    source = open_source(folder)
    for i in range(source.blocks):
        yield from weights_of(source.spec, f"{source.spec.blocks}.{i}", block_of(source, i))


def close(theirs, ours):
    # the same products in float32, summed in another order, through two blocks
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * ours.abs().max().item())


@pytest.fixture
def compressed_tensors():
    return pytest.importorskip("compressed_tensors")


@pytest.mark.parametrize("family, name", [
    ("llama", "groups"), ("llama", "rows"), ("llama", "2 bits"), ("llama", "3 bits"), ("llama", "8 bits"), ("llama", "2:4"),
    ("llama", "ordered"), ("llama", "rotated"), ("opt", "groups"), ("qwen3", "groups"), ("gpt_neox", "groups"), ("bloom", "rows"),
])  # fmt: skip
def test_transformers_runs_pack_quantized(family, name, packed, tmp_path, compressed_tensors):
    """Against the packed model where every code is kept, else against what the file itself says."""
    from transformers.utils.quantization_config import CompressedTensorsConfig

    if name == "3 bits" and Version(compressed_tensors.__version__) < Version("0.18"):
        pytest.skip("compressed-tensors before 0.18 puts ten 3-bit codes in a word")
    report = export(packed(family, name), tmp_path / "out", "compressed-tensors")
    if all(row["stored"] == "codes" for row in report["modules"]):
        expected = logits(ptq.load(packed(family, name)))
    else:
        assert max(row["largest_difference"] for row in report["modules"]) > 0
        expected = None
    # Versions 0.18 to 0.20 cannot lay out packed zero points for transformers before they are read; this way needs no layout.
    how = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=how).eval()
    for weight in weights(packed(family, name)):
        row = next(row for row in report["modules"] if row["name"] == weight.name)
        difference = (model.get_submodule(weight.name).weight - weight.weight).abs().max().item()
        assert difference == pytest.approx(row["largest_difference"], abs=1e-7)
    if expected is not None:
        close(logits(model), expected)


def test_transformers_runs_symmetric_groups(packed, tmp_path, compressed_tensors):
    report = export(packed("llama", "groups"), tmp_path / "out", "compressed-tensors:symmetric")
    assert {row["stored"] for row in report["modules"]} == {"rounded"}
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    logits(model)  # the first forward unpacks the weights
    for weight, row in zip(weights(packed("llama", "groups")), report["modules"], strict=True):
        difference = (model.get_submodule(weight.name).weight - weight.weight).abs().max().item()
        assert difference == pytest.approx(row["largest_difference"], abs=1e-7)


@pytest.mark.parametrize("name", ["W8A8 a token", "W8A8 static"])
def test_transformers_runs_int_quantized(name, packed, tmp_path, compressed_tensors):
    export(packed("llama", name), tmp_path / "out", "compressed-tensors")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ours, theirs = ptq.load(packed("llama", name)), logits(model)
    expected = logits(ours)
    # a code on the edge between two may fall to the other side, and what follows with it: a few tokens, not most
    share = ((theirs - expected).abs().amax(-1) > 1e-3).float().mean().item()
    assert share < 0.3
    x = torch.randn(2, 24, 96, generator=torch.Generator().manual_seed(1))
    path = "model.layers.0.mlp.down_proj"
    with torch.no_grad():
        close(model.get_submodule(path)(x), ours.get_submodule(path)(x))


def symmetric(folder, out):
    """A copy of a packed folder whose zero points are all the middle code, as another solver might have left them."""
    out.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            for name, zero in tensors.items():
                if name.endswith("weight_zero"):
                    groups = tensors[name.replace("weight_zero", "weight_groups")].numel()
                    tensors[name] = pack(torch.full((zero.shape[0], groups), 8, dtype=torch.uint8), 4)
            save_file(tensors, out / file.name, metadata={"format": "pt"})
        elif file.is_file():
            (out / file.name).write_bytes(file.read_bytes())
    return out


@pytest.fixture(scope="module")
def gptqmodel():
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # it would compile every layer's unpacking
    return pytest.importorskip("gptqmodel")


def check_gptq(gptqmodel, folder, out):
    model = gptqmodel.GPTQModel.load(str(out), backend=gptqmodel.BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    for weight in weights(folder):
        read = model.model.get_submodule(weight.name).dequantize_weight().T  # [C, R] -> [R, C]
        torch.testing.assert_close(read, weight.weight.half(), rtol=0, atol=0)
    ours = logits(ptq.load(folder, dtype=torch.float16))
    # float16 sums in another order
    torch.testing.assert_close(logits(model.model), ours, rtol=0, atol=4e-3 * ours.abs().max().item())


@pytest.mark.parametrize("name", ["groups", "rows", "2 bits", "3 bits", "8 bits", "ordered", "2:4"])
def test_gptqmodel_runs_v2(name, packed, tmp_path, gptqmodel):
    export(packed("llama", name), tmp_path / "out", "gptq")
    check_gptq(gptqmodel, packed("llama", name), tmp_path / "out")


def test_gptqmodel_runs_symmetric_v1(packed, tmp_path, gptqmodel):
    folder = symmetric(packed("llama", "groups"), tmp_path / "packed")
    assert export(folder, tmp_path / "out", "gptq")["variant"] == "v1"
    check_gptq(gptqmodel, folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["groups", "3 bits"])
def test_gptqmodel_reads_v1_with_zero_points(name, packed, tmp_path, gptqmodel):
    """It refuses to, by the config's word; without that word it reads them right."""
    export(packed("llama", name), tmp_path / "out", "gptq:v1")
    with pytest.raises(ValueError, match="sym=False"):
        check_gptq(gptqmodel, packed("llama", name), tmp_path / "out")
    for file in ("config.json", "quantize_config.json"):
        config = json.loads((tmp_path / "out" / file).read_text())
        config.get("quantization_config", config)["sym"] = True
        (tmp_path / "out" / file).write_text(json.dumps(config))
    check_gptq(gptqmodel, packed("llama", name), tmp_path / "out")


@pytest.fixture
def llama_cpp():
    pytest.importorskip("gguf")
    return pytest.importorskip("llama_cpp")


def llama_logits(llama_cpp, file, tokens):
    model = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, n_threads=1, verbose=False)
    model.eval(tokens)
    return torch.from_numpy(np.array(model.scores[: len(tokens)])), model


def divergence(ours, theirs):
    """Mean KL in nats a token, logits [T, V] each."""
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_llama_cpp_runs_every_family(family, packed, tmp_path, tokenizer, llama_cpp):
    """In float32, where only llama.cpp's float16 cache rounds: every name, row order and constant is right."""
    folder, text = packed(family, "ordered"), "The channels of an activation"
    assert main(["export", str(folder), "--format", "gguf:f32", "--out", str(tmp_path / "out")]) == 0
    ids = tokenizer(text)["input_ids"]
    # Mistral's window of 8 tokens is not llama.cpp's, as the export says
    tokens = (ids + TOKENS[0].tolist())[: 8 if family == "mistral" else 30]
    with torch.no_grad():
        ours = ptq.load(folder)(torch.tensor([tokens])).logits[0]
    theirs, model = llama_logits(llama_cpp, tmp_path / "out/model.gguf", tokens)
    assert divergence(ours, theirs) < 1e-5
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
    assert model.tokenize(text.encode(), add_bos=True) == ids
    assert model(text, max_tokens=4, temperature=0)["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("name", ["groups", "3 bits", "8 bits", "head"])
def test_llama_cpp_runs_codes(name, packed, tmp_path, llama_cpp):
    """Its kernels round the inputs of such linears to 8 bits in blocks of 32, so perplexity is near, not equal."""
    folder = packed("llama", name)
    export(folder, tmp_path / "out", "gguf")
    tokens = TOKENS[0].tolist()
    with torch.no_grad():
        ours = ptq.load(folder)(TOKENS[:1]).logits[0]
    theirs, _ = llama_logits(llama_cpp, tmp_path / "out/model.gguf", tokens)
    nll = [torch.nn.functional.cross_entropy(x[:-1], TOKENS[0, 1:]).item() for x in (ours, theirs)]
    assert divergence(ours, theirs) < 0.01 and abs(nll[0] - nll[1]) < 0.05


def sentencepiece_like(prefix):
    """BPE with byte fallback over text whose spaces are U+2581, as LLaMA 2's tokenizer.json has it; `prefix` puts one in front."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = ([normalizers.Prepend("▁")] if prefix else []) + [normalizers.Replace(" ", "▁")]
    raw.normalizer = normalizers.Sequence(steps)
    first = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=first, show_progress=False, max_token_length=8)
    raw.train_from_iterator([TEXT], trainer)
    data = json.loads(raw.to_str())
    names = first + [f"<0x{i:02X}>" for i in range(256)]
    pieces = [token for token in sorted(data["model"]["vocab"], key=data["model"]["vocab"].get) if token not in names]
    data["model"]["vocab"] = {token: i for i, token in enumerate(names + pieces)}
    raw = Tokenizer.from_str(json.dumps(data))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in first])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_tokenizes_alike(prefix, tmp_path, llama_cpp):
    tokenizer = sentencepiece_like(prefix)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 5,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", "gguf")
    model = llama_cpp.Llama(str(tmp_path / "out/model.gguf"), n_ctx=64, verbose=False)
    for text in ("The channels of an activation differ", " wildly,  in\n\nrange: é漢 123", "</s>and one"):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=False, special=True) == expected


ROTARY = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("kind", ROTARY)
def test_llama_cpp_scales_rotary_embeddings(kind, tmp_path, tokenizer, llama_cpp):
    """And moves biases with the rows of queries and keys."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_bias=True,
        rope_parameters=ROTARY[kind],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", "gguf")
    theirs, _ = llama_logits(llama_cpp, tmp_path / "out/model.gguf", TOKENS[0].tolist())
    assert divergence(logits(model)[0], theirs) < 1e-4  # 0.8 and more if the frequencies are not scaled
