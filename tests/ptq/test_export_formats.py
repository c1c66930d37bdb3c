"""Foreign layouts, byte by byte: fixtures written by hand from each format's definition, and readers of their own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ptq.errors import BadInput
from ptq.export import export
from ptq.export.codes import Codes, rounded_evenly
from ptq.export.compressed_tensors import int_quantized, pack_quantized
from ptq.export.gguf_blocks import q4_0, q4_1, q8_0
from ptq.export.gptq import layout
from ptq.export.source import open_source
from ptq.export.words import from_words, to_words

# 2 rows of 8 channels in 2 groups of 4.
TINY = Codes(
    codes=torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [15, 0, 14, 1, 13, 2, 12, 3]], dtype=torch.uint8),
    scale=torch.tensor([[0.5, 0.25], [1.0, 2.0]], dtype=torch.float16),
    zero=torch.tensor([[8, 3], [7, 1]], dtype=torch.uint8),
    group=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
    bits=4,
)


def signed(*words):
    return [word - (1 << 32) if word >> 31 else word for word in words]


def bits_of(words, width, count):
    """Codes of one row of int32 words, as one long number: element i at bit i * width."""
    number = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(number >> (i * width)) & (2**width - 1) for i in range(count)]


def tensors_of(folder):
    found = {}
    for shard in folder.glob("*.safetensors"):
        found |= load_file(shard)
    return found


def source_weights(folder):
    from ptq.export.codes import weights_of
    from ptq.export.source import block_of

    source = open_source(folder)
    for i in range(source.blocks):
        yield from weights_of(source.spec, f"{source.spec.blocks}.{i}", block_of(source, i))


def test_words_by_hand():
    codes = torch.tensor([[7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]], dtype=torch.uint8)
    # least significant first: 111 000 100 010 110 001 101 011 111 000 10|0 010; the 11th code straddles the words
    assert to_words(codes, 3).tolist() == [signed(0b01_000_111_110_101_100_011_010_001_000_111, 0b010_0)]
    assert to_words(TINY.codes, 4).tolist() == [signed(0x87654321), signed(0x3C2D1E0F)]
    assert to_words(codes, 8).tolist() == [signed(0x02010007, 0x06050403, 0x02010007)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 10, 11, 32, 43])
def test_words_hold_every_code(bits, length):
    codes = torch.randint(2**bits, (3, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    words = to_words(codes, bits)
    assert words.shape == (3, -(-length * bits // 32)) and words.dtype == torch.int32
    assert [bits_of(row, bits, length) for row in words] == codes.tolist()
    assert torch.equal(from_words(words, bits, length), codes)


def test_pack_quantized_by_hand():
    tensors = pack_quantized(TINY, 4, symmetric=False)
    assert tensors["weight_packed"].tolist() == [signed(0x87654321), signed(0x3C2D1E0F)]
    assert tensors["weight_scale"].tolist() == [[0.5, 0.25], [1.0, 2.0]]
    assert tensors["weight_shape"].tolist() == [2, 8] and tensors["weight_shape"].dtype == torch.int64
    assert tensors["weight_zero_point"].tolist() == [[0x78, 0x13]]  # along the rows: row 1 above row 0


def test_pack_quantized_repeats_a_grid_for_shorter_groups():
    tensors = pack_quantized(TINY, 2, symmetric=False)
    assert tensors["weight_scale"].tolist() == [[0.5, 0.5, 0.25, 0.25], [1.0, 1.0, 2.0, 2.0]]
    assert tensors["weight_zero_point"].tolist() == [[0x78, 0x78, 0x13, 0x13]]


def test_middle_zero_points_are_not_stored():
    middle = Codes(TINY.codes, TINY.scale, torch.full_like(TINY.zero, 8), TINY.group, 4)
    assert "weight_zero_point" not in pack_quantized(middle, 4, symmetric=True)


def test_int_quantized_by_hand():
    codes = Codes(
        codes=torch.tensor([[0, 128, 255]], dtype=torch.uint8),
        scale=torch.tensor([[0.5]]),
        zero=torch.tensor([[127]], dtype=torch.uint8),
        group=torch.zeros(3, dtype=torch.int64),
        bits=8,
    )
    tensors = int_quantized(codes, None, symmetric=False)
    assert tensors["weight"].tolist() == [[-128, 0, 127]] and tensors["weight"].dtype == torch.int8
    assert tensors["weight_zero_point"].tolist() == [[-1]] and tensors["weight_scale"].tolist() == [[0.5]]


def test_symmetric_grids():
    W = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        codes = rounded_evenly(W, bits, 32)
        assert codes.symmetric
        # half a step: the widest weight is on the grid's last level but for the rounding of the scale to float16
        step = codes.scale.float().repeat_interleave(32, 1)
        assert ((codes.weight() - W).abs() <= step * (0.5 + 2.0**-11 * 2**bits)).all()


# GPTQ wants rows and channels in whole words: 8 rows of 8 channels.
GPTQ_CODES = (torch.arange(8)[:, None] + torch.arange(8)).to(torch.uint8)  # codes[r, c] = r + c
GPTQ = Codes(
    codes=GPTQ_CODES,
    scale=torch.arange(1, 17).view(8, 2).half(),
    zero=torch.tensor([[r + 1, 8] for r in range(8)], dtype=torch.uint8),
    group=torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]),
    bits=4,
)


def test_gptq_by_hand():
    tensors = layout(GPTQ, "v2", "")
    # word r holds channels 0-7 of row r, the first lowest
    words = signed(*(sum((r + c) << (4 * c) for c in range(8)) for r in range(8)))
    assert tensors["qweight"].tolist() == [words] and words[:2] == signed(0x76543210, 0x87654321)
    assert tensors["qzeros"].tolist() == [signed(0x87654321), signed(0x88888888)]
    assert tensors["scales"].tolist() == [[1, 3, 5, 7, 9, 11, 13, 15], [2, 4, 6, 8, 10, 12, 14, 16]]
    assert tensors["g_idx"].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert {name: t.dtype for name, t in tensors.items()} == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
        "g_idx": torch.int32,
    }


def test_gptq_v1_stores_zero_points_less_one():
    assert layout(GPTQ, "v1", "")["qzeros"].tolist() == [signed(0x76543210), signed(0x77777777)]


READ = [
    ("groups", 4, "v1"),
    ("3 bits", 3, "v1"),
    ("2 bits", 2, "v2"),
    ("8 bits", 8, "v2"),
    ("ordered", 4, "v2"),
    ("2:4", 4, "v2"),
]


@pytest.mark.parametrize("name, bits, variant", READ)
def test_gptq_read_by_its_definition(name, bits, variant, packed, tmp_path):
    """W[r, c] = (q[c, r] - zero[g, r]) scale[g, r] with g = g_idx[c], and every zero point of v1 one too small."""
    folder = packed("llama", name)
    report = export(folder, tmp_path / "out", f"gptq:{variant}")
    assert {(row["stored"], row["largest_difference"]) for row in report["modules"]} == {("codes", 0)}
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["bits"] == bits and config["checkpoint_format"] == {"v1": "gptq", "v2": "gptq_v2"}[variant]
    assert config["desc_act"] == (name == "ordered")
    found = tensors_of(tmp_path / "out")
    for weight in list(source_weights(folder))[:4]:
        q, z, s, g = (found[f"{weight.name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx"))
        R, C = weight.weight.shape
        if config["group_size"] > 0:
            assert s.shape == (C // config["group_size"], R)
            assert (g.bincount() == config["group_size"]).all()
        codes = torch.tensor([bits_of(q[:, r], bits, C) for r in range(R)])
        zero = torch.tensor([bits_of(row, bits, R) for row in z]) + (1 if variant == "v1" else 0)
        W = (codes - zero[g.long()].T) * s[g.long()].T.float()
        torch.testing.assert_close(W, weight.weight, rtol=0, atol=0)


def test_gptq_v1_moves_a_zero_point_0_or_refuses():
    from ptq.export.gptq import _without_zero

    zero = torch.zeros(1, 1, dtype=torch.uint8)
    codes = Codes(
        torch.tensor([[0, 3, 14]], dtype=torch.uint8), torch.ones(1, 1), zero, torch.zeros(3, dtype=torch.int64), 4
    )
    moved = _without_zero(codes, "here")
    assert moved.zero.tolist() == [[1]] and torch.equal(moved.weight(), codes.weight())
    full = Codes(codes.codes + 1, codes.scale, zero, codes.group, 4)
    with pytest.raises(BadInput, match="here.*gptq:v2"):
        _without_zero(full, "here")


def test_gguf_blocks_by_hand():
    levels = torch.arange(32) % 16  # element j is j mod 16, so both nibbles of byte j are j mod 16
    codes = Codes(
        codes=levels.to(torch.uint8)[None],
        scale=torch.tensor([[0.5]], dtype=torch.float16),
        zero=torch.tensor([[8]], dtype=torch.uint8),
        group=torch.zeros(32, dtype=torch.int64),
        bits=4,
    )
    half, minus_four = [0x00, 0x38], [0x00, 0xC4]  # float16, low byte first
    nibbles = [j | j << 4 for j in range(16)]
    assert q4_0(codes).tolist() == [half + nibbles]
    assert q4_1(codes).tolist() == [half + minus_four + nibbles]
    assert q8_0(codes).tolist() == [half + [(j - 8) % 256 for j in levels.tolist()]]


def test_gguf_blocks_refuse_what_they_cannot_hold():
    group = torch.arange(64) // 32
    codes = Codes(torch.full((1, 64), 15, dtype=torch.uint8), torch.ones(1, 2), torch.full((1, 2), 7).byte(), group, 4)
    assert q4_0(codes) is None and q4_1(codes) is not None and q8_0(codes) is not None  # 15 - 7 = 8
    scattered = Codes(codes.codes, codes.scale, codes.zero, torch.arange(64) % 2, 4)
    assert q4_0(scattered) is None and q4_1(scattered) is None and q8_0(scattered) is None
    wide = Codes(
        torch.full((1, 64), 255, dtype=torch.uint8), torch.ones(1, 2), torch.full((1, 2), 100).byte(), group, 8
    )
    assert q8_0(wide) is None and q4_1(wide) is None  # 155 is beyond int8


@pytest.mark.parametrize("name", ["groups", "3 bits", "8 bits", "ordered", "zeros in place"])
def test_gguf_reads_back_as_stated(name, packed, tmp_path):
    gguf = pytest.importorskip("gguf")
    folder = packed("llama", name)
    report = export(folder, tmp_path / "out", "gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    rows = {row["name"]: row for row in report["modules"]}
    short = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    short |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for weight in source_weights(folder):
        i, leaf = weight.name.split(".")[2], weight.name.rsplit(".", 1)[1]
        tensor = found[f"blk.{i}.{short[leaf]}.weight"]
        W = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        if leaf in ("q_proj", "k_proj"):  # neighbours i, i + 1 of a head were i/2 and i/2 + D/2
            W = W.view(-1, 8, 2, 64).transpose(1, 2).reshape(W.shape)  # [H, D/2, 2, C] -> [H, 2, D/2, C]
        largest = (W - weight.weight.float()).abs().max().item()
        assert largest == rows[weight.name]["largest_difference"]
    exact = {"3 bits": "q4_0", "zeros in place": "f32"}
    if name in exact:
        assert report["variant"] == exact[name] and {row["largest_difference"] for row in rows.values()} == {0}
    if name == "groups":  # only the minimum of a group was rounded, to 11 bits of at most 15 steps
        scale = max(row["largest_weight"] for row in rows.values())
        assert report["variant"] == "q4_1" and max(row["largest_difference"] for row in rows.values()) < scale * 2**-10


def test_gguf_tells_the_tokenizer(packed, tokenizer, tmp_path):
    gguf = pytest.importorskip("gguf")
    export(packed("llama", "groups"), tmp_path / "out", "gguf")
    fields = gguf.GGUFReader(tmp_path / "out/model.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents() == tokenizer.convert_ids_to_tokens(range(300))
    assert fields["tokenizer.ggml.token_type"].contents()[:4] == [3, 3, 3, 1]  # <pad> <s> </s> are control tokens
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2" and fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert (
        fields["general.architecture"].contents() == "llama" and fields["llama.attention.head_count_kv"].contents() == 2
    )


@pytest.mark.parametrize("name, form, args", [
    ("groups", "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    ("rows", "pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    ("3 bits", "pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}),
    ("8 bits", "pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    ("W8A8 a token", "int-quantized", {"num_bits": 8, "strategy": "channel"}),
])  # fmt: skip
def test_compressed_tensors_read_by_its_definition(name, form, args, packed, tmp_path):
    folder = packed("llama", name)
    report = export(folder, tmp_path / "out", "compressed-tensors")
    assert {(row["stored"], row["largest_difference"]) for row in report["modules"]} == {("codes", 0)}
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert config["format"] == form and config["ignore"] == ["lm_head"] and group["targets"] == ["Linear"]
    assert args.items() <= group["weights"].items() and group["weights"]["symmetric"] is False
    found, bits = tensors_of(tmp_path / "out"), args["num_bits"]
    for weight in list(source_weights(folder))[:4]:
        R, C = weight.weight.shape
        scale, zero = found[f"{weight.name}.weight_scale"], found[f"{weight.name}.weight_zero_point"]
        G = scale.shape[1]
        if form == "pack-quantized":
            codes = torch.tensor([bits_of(row, bits, C) for row in found[f"{weight.name}.weight_packed"]])
            zero = torch.tensor([bits_of(zero[:, g], bits, R) for g in range(G)]).T
        else:
            codes, zero = found[f"{weight.name}.weight"].long(), zero.long()
        W = (codes - zero.repeat_interleave(C // G, 1)) * scale.float().repeat_interleave(C // G, 1)
        torch.testing.assert_close(W, weight.weight, rtol=0, atol=0)


def test_compressed_tensors_says_how_inputs_are_rounded(packed, tmp_path):
    export(packed("llama", "W8A8 a token"), tmp_path / "token", "compressed-tensors")
    export(packed("llama", "W8A8 static"), tmp_path / "static", "compressed-tensors")
    token, static = (json.loads((tmp_path / f"{n}/config.json").read_text()) for n in ("token", "static"))
    inputs = [c["quantization_config"]["config_groups"]["group_0"]["input_activations"] for c in (token, static)]
    common = {"num_bits": 8, "type": "int", "symmetric": False}
    assert inputs == [
        common | {"strategy": "token", "dynamic": True},
        common | {"strategy": "tensor", "dynamic": False},
    ]
    found = tensors_of(tmp_path / "static")
    name = "model.layers.1.mlp.down_proj"
    import ptq

    ours = ptq.load(packed("llama", "W8A8 static")).get_submodule(name).input_quantizer
    assert torch.equal(found[f"{name}.input_scale"], ours.scale)
    assert torch.equal(found[f"{name}.input_zero_point"].float() + 128, ours.zero)


def test_uneven_groups_are_rounded_again_and_measured(packed, tmp_path):
    folder = packed("llama", "uneven")
    for wanted in ("compressed-tensors", "gptq"):
        report = export(folder, tmp_path / wanted, wanted)
        assert {row["stored"] for row in report["modules"]} == {"rounded"}
        for row in report["modules"]:
            # no more than a 15th of the widest group's range to either side
            assert 0 < row["largest_difference"] <= row["largest_weight"] / 7.5
            assert row["why"] and 0 < row["relative_difference"] < 0.2
