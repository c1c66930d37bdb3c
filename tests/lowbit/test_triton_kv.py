"""Planar keys and values, the reference and the Triton kernels under Triton's interpreter, against a model's cache and attention."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from interpreter import interpret, needs_triton
from lowbit import kv_planar
from lowbit.attention import lowbit_attention
from lowbit.cache import KVGrid, PackedCacheLayer
from lowbit.cache_space import Rotation
from lowbit.packing import unpack
from lowbit.spared import Spared
from safetensors.torch import load_file, save_file

# name -> (bits, channels, rotary, rotary_dim), (batch, KV heads, query heads to each, tokens), parts, what else there is
CASES = {
    "8 bits, mask": ((8, 40, None, 0), (2, 2, 3, 17), 2, "mask"),
    "4 bits, turned, sinks, quantized softmax": ((4, 64, "half", 64), (2, 1, 2, 17), 1, "sinks softmax"),
    "4 bits, turned, sinks, mask": ((4, 32, "half", 32), (1, 1, 2, 10), 1, "sinks mask"),
    "3 bits, partly turned, softcap": ((3, 24, "half", 8), (1, 1, 1, 10), 1, "softcap"),
    "3 bits, one token": ((3, 16, None, 0), (1, 1, 1, 1), 1, ""),
    "2 bits, turned pairwise, half precision": ((2, 32, "interleaved", 16), (1, 1, 5, 17), 2, "half"),
}
CHILD = """
import sys, torch
from safetensors.torch import load_file, save_file
from lowbit.cache import KVGrid
from lowbit.kv_planar import PlanarKV
from lowbit.spared import Spared
from lowbit.triton.kv import attention_decode, kv_append
tensors, out = load_file(sys.argv[1]), {}
for case in sorted({key.split("/")[0] for key in tensors}):
    p = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith(case + "/")}
    bits, rotary, rotary_dim, parts, softmax, cap = p["options"].tolist()
    grid = KVGrid(*p["grids"].unbind(0), bits, (None, "half", "interleaved")[rotary], rotary_dim)
    kv = PlanarKV.empty(grid, len(p["query"]), torch.device("cpu"), 4)
    for some in (slice(0, 3), slice(3, None)):
        kv_append(kv, p["keys"][:, :, some], p["values"][:, :, some], *(p[n][:, some] for n in ("cos", "sin") if n in p))
    spared = Spared(*(p[n] for n in ("sink_keys", "sink_values", "rows", "at"))) if "at" in p else None
    y = attention_decode(
        p["query"], kv, p.get("cos"), p.get("sin"), mask=p.get("mask"), softcap=float(cap) or None, softmax_bits=softmax,
        spared=spared, parts=parts,
    )
    out |= {f"{case}/y": y}
    for name, planes in (("keys", kv.keys), ("values", kv.values)):
        out |= {f"{case}/{name}{i}": plane[:, :, : kv.length].contiguous() for i, plane in enumerate(planes)}
save_file(out, sys.argv[2])
"""


def problem(name: str) -> dict[str, torch.Tensor]:
    """Inputs of a case; the queries and keys are large enough that the probabilities differ."""
    (bits, D, rotary, R), (B, H, group, T), parts, more = CASES[name]
    make = torch.Generator().manual_seed(D + T)
    dtype = torch.float16 if "half" in more else torch.float32

    def random(*shape):
        return torch.randn(*shape, generator=make)

    scales = (torch.rand(2, H, D, generator=make) + 0.5) * 4 / 2**bits
    zeros = torch.stack([random(H, D).mul(40).round(), torch.randint(0, 2**bits, (H, D), generator=make).float()])
    p = {"grids": torch.stack([scales[0], zeros[0], scales[1], zeros[1]])}
    centre = (2 ** (bits - 1) - zeros[0])[:, None] * scales[0][:, None]  # [H, 1, D]: keys lie where their grids do
    keys, values, query = centre + random(B, H, T, D), random(B, H, T, D), 2 * random(B, H * group, D)
    if rotary:
        angle = random(B if T % 2 else 1, T, R // 2) * 3
        p |= {"cos": 1.1 * angle.cos(), "sin": 1.1 * angle.sin()}  # some models scale both
    p |= {"keys": keys.to(dtype), "values": values.to(dtype), "query": query.to(dtype)}
    if "mask" in more:
        p["mask"] = torch.rand(B, T, generator=make) > 0.3
        p["mask"][:, -1] = True
    if "sinks" in more:
        p |= {"sink_keys": random(B, H, 2, D), "sink_values": random(B, H, 2, D), "at": torch.tensor([0, 3])}
        p["rows"] = torch.tensor([[True, True], [True, False]])[:B]
    p["options"] = torch.tensor(
        [
            bits,
            (None, "half", "interleaved").index(rotary),
            R,
            parts,
            6 if "softmax" in more else 16,
            3 * ("softcap" in more),
        ]
    )
    return p


def grid_of(name: str, p: dict[str, torch.Tensor]) -> KVGrid:
    bits, _, rotary, R = CASES[name][0]
    return KVGrid(*p["grids"].unbind(0), bits, rotary, R)


def of_the_model(name: str) -> tuple[PackedCacheLayer, torch.Tensor]:
    """The model's packed layer, and its attention over what that layer decodes: [B, Hq, D]."""
    p, more = problem(name), CASES[name][3]
    layer = PackedCacheLayer(grid_of(name, p))
    if "cos" in p:
        layer.rotation = Rotation(p["cos"])
        layer.rotation.append(p["cos"], p["sin"])
    keys, values = layer.update(p["keys"].float(), p["values"].float())
    if "at" in p:
        keys, values = Spared(p["sink_keys"], p["sink_values"], p["rows"], p["at"]).restore(keys, values)
    module = SimpleNamespace(softmax_bits=int(p["options"][4]), training=False, is_causal=False)
    mask = p["mask"][:, None, None] if "mask" in p else None
    cap = 3.0 if "softcap" in more else None
    y, _ = lowbit_attention(module, p["query"].float()[:, :, None], keys, values, mask, softcap=cap)
    return layer, y[:, 0]  # [B, 1, Hq, D] -> [B, Hq, D]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Triton's interpreter must be asked for before triton is first imported."""
    folder = tmp_path_factory.mktemp("kv")
    tensors = {f"{name}/{key}": value.contiguous() for name in CASES for key, value in problem(name).items()}
    save_file({key: value.clone() for key, value in tensors.items()}, folder / "in")
    interpret(CHILD, folder, "in", "out")
    return load_file(folder / "out")


def same_codes(name: str, keys: tuple[torch.Tensor, ...], values: tuple[torch.Tensor, ...]) -> None:
    """The planes hold the codes of the model's layer, in the order of the layout."""
    (bits, D, rotary, R), layer = CASES[name][0], of_the_model(name)[0]
    for planes, packed, turned in ((keys, layer.keys, True), (values, layer.values, False)):
        order = kv_planar.stored_order(D, rotary if turned else None, R if turned else 0)
        assert torch.equal(kv_planar.from_planes(planes, bits), unpack(packed, bits, D)[..., order])


def near(name: str, found: torch.Tensor) -> None:
    wanted = of_the_model(name)[1]
    # float32: D terms a score and T a sum, each off by 2^-24 of scores up to 30. float16: a query, its keys and the probabilities are
    # rounded to 2^-11, which moves scores of that size by up to 0.01.
    allowed = 1e-2 if "half" in CASES[name][3] else 2e-5
    assert (found.float() - wanted).abs().max() <= allowed * wanted.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_model(name):
    p = problem(name)
    kv = kv_planar.PlanarKV.empty(grid_of(name, p), len(p["query"]), torch.device("cpu"), 4)
    angles = [p[n] for n in ("cos", "sin") if n in p]
    for some in (slice(0, 3), slice(3, None)):  # past the capacity
        kv_planar.append(kv, p["keys"][:, :, some], p["values"][:, :, some], *(t[:, some] for t in angles))
    same_codes(name, *(tuple(plane[:, :, : kv.length] for plane in planes) for planes in (kv.keys, kv.values)))
    spared = Spared(p["sink_keys"], p["sink_values"], p["rows"], p["at"]) if "at" in p else None
    options = {"softmax_bits": int(p["options"][4]), "softcap": float(p["options"][5]) or None, "spared": spared}
    near(name, kv_planar.attention_decode(p["query"].float(), kv, *angles, mask=p.get("mask"), **options))


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_append_stores_the_codes_of_the_model(name, interpreted):
    planes = range(len(kv_planar.WIDTHS[CASES[name][0][0]]))
    same_codes(name, *(tuple(interpreted[f"{name}/{which}{i}"] for i in planes) for which in ("keys", "values")))


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_decode_is_the_attention_of_the_model(name, interpreted):
    near(name, interpreted[f"{name}/y"])


def test_heads_that_do_not_fill_bytes_are_refused():
    grid = KVGrid(*torch.ones(4, 1, 12).unbind(0), 4, None, 0)
    with pytest.raises(ValueError, match="12 channels.*multiples of 8"):
        kv_planar.PlanarKV.empty(grid, 1, torch.device("cpu"))


def emulated(asm: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """What the PTX leaves in its first operands, for the few instructions used: uint32 words in and out."""

    def halves(words):
        return words.view(np.float16)

    def permuted(a, b, picks):
        octets = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], 1)
        return octets[:, [int(picks) >> 4 * i & 7 for i in range(4)]].copy().view(np.uint32)[:, 0]

    run = {
        "mov.b32": lambda a: a,
        "and.b32": lambda a, b: a & b,
        "shr.u32": lambda a, b: a >> b,
        "shl.b32": lambda a, b: a << b,
        "prmt.b32": lambda a, b, c: permuted(a, b, c[0]),
        "lop3.b32": lambda a, b, c, t: {0xCA: a & b | ~a & c, 0xEA: a & b | c}[int(t[0])],
        "sub.f16x2": lambda a, b: (halves(a) - halves(b)).view(np.uint32),
        "mul.f16x2": lambda a, b: (halves(a) * halves(b)).view(np.uint32),
        "neg.f16x2": lambda a: (-halves(a)).view(np.uint32),
        "fma.rn.f16x2": lambda a, b, c: (
            (halves(a).astype(float) * halves(b) + halves(c)).astype(np.float16).view(np.uint32)
        ),
    }
    held = {f"${outputs + i}": words for i, words in enumerate(inputs)}
    for line in asm.strip("{} ").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name and name != ".reg":
            target, *sources = (word.strip() for word in operands.split(","))
            read = [held[s] if s in held else np.full_like(inputs[0], int(s, 0)) for s in sources]
            held[target] = run[name](*read)
    return [held[f"${i}"] for i in range(outputs)]


@needs_triton
def test_assembly_unpacks_the_codes():
    """The interpreter runs no assembly, so its strings are emulated: four bytes a word, each with all 256 values."""
    from lowbit.triton import kv

    octets = np.random.default_rng(0).permutation(np.arange(1024) % 256).astype(np.uint8)
    other = np.random.default_rng(1).permutation(octets)
    words, more = octets.view(np.uint32), other.view(np.uint32)

    def numbers(asm, inputs, outputs):
        found = emulated(asm.value, inputs, outputs)
        return [np.stack(pair, 1).view(np.float16).reshape(-1) for pair in zip(found[::2], found[1::2])]

    assert (numbers(kv.BYTES, [words], 2)[0] == octets).all()
    low, high = numbers(kv.NIBBLES, [words], 4)
    assert (low == octets % 16).all() and (high == octets // 16).all()

    def mask(flag):
        return np.full_like(words, 0xFFFFFFFF if flag else 0)

    for field in range(2):
        first, second = numbers(kv.TWO_BITS, [words, mask(field)], 4)
        assert (first == octets >> 2 * field & 3).all() and (second == octets >> 2 * field + 4 & 3).all()
    for bit in range(4):
        field = bit // 2
        masks = mask(field), mask(bit >> 1), mask(bit & 1)
        first, second = numbers(kv.THREE_BITS, [words, masks[0], more, *masks[1:]], 4)
        assert (first == (octets >> 2 * field & 3) + 4 * (other >> bit & 1)).all()
        assert (second == (octets >> 2 * field + 4 & 3) + 4 * (other >> bit + 4 & 1)).all()


@needs_triton
def test_assembly_turns_pairs():
    from lowbit.triton import kv

    make = np.random.default_rng(0)
    inputs = [make.standard_normal(64).astype(np.float16) for _ in range(8)]
    a, b, a_scale, a_shift, b_scale, b_shift, c, s = (t.astype(float) for t in inputs)
    found = emulated(kv.TURNED.value, [t.view(np.uint32) for t in inputs], 2)
    a, b = a * a_scale + a_shift, b * b_scale + b_shift
    # Two float16 roundings, 2^-11 each, of what is at most the sum of the sizes.
    size = (np.abs(a) + np.abs(b)) * 2.0**-10 * (np.abs(c) + np.abs(s)) + 2.0**-10
    for value, wanted in zip(found, (a * c - b * s, b * c + a * s)):
        assert (np.abs(value.view(np.float16) - wanted) <= size).all()
