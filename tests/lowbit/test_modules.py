"""The modules of a compressed block against oracles written from the formulas, one number at a time."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from lowbit import ActivationQuantizer, Linear, Norm, backend, build, operation, pack, reference, register_backend
from lowbit.hadamard import rotate
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


GRID = {
    "scale": torch.tensor([0.1, 2.0, 0.5]),
    "zero": torch.tensor([7.0, -3.0, 300.0]),  # zero points may lie outside the codes
    "bits": torch.tensor([4, 3, 16]),
    "sizes": torch.tensor([3, 2, 1]),
}


def quantized_by_hand(x: torch.Tensor, grid=GRID) -> torch.Tensor:
    """RPTQ's eq. 1 in Python's own arithmetic; its round is half to even as torch's."""
    group = [g for g, n in enumerate(grid["sizes"].tolist()) for _ in range(n)]
    rows = []
    for row in x.float().reshape(-1, x.shape[-1]).tolist():
        out = []
        for value, g in zip(row, group):
            s, z, b = (grid[k][g].item() for k in ("scale", "zero", "bits"))
            code = min(max(round(value / s) + z, 0), 2**b - 1)
            out.append(value if b == 16 else (code - z) * s)
        rows.append(out)
    return torch.tensor(rows).view(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 6), (5, 6), (2, 3, 6), (6,)])
def test_static_grids_follow_the_formula(shape, dtype):
    x = random(*shape, dtype=dtype) * 3
    y = ActivationQuantizer.static(**GRID)(x)
    assert y.dtype == dtype and y.shape == x.shape
    torch.testing.assert_close(y, quantized_by_hand(x).to(dtype), rtol=1e-6, atol=0 if dtype != torch.float32 else 1e-6)
    assert torch.equal(y[..., 5], x[..., 5])  # 16 bits: untouched


def test_static_grids_give_themselves_back():
    once = ActivationQuantizer.static(**GRID)(random(7, 6))
    torch.testing.assert_close(ActivationQuantizer.static(**GRID)(once), once, rtol=0, atol=0)


def test_static_grids_on_nan_and_infinity():
    x = torch.full((1, 6), float("nan"))
    y = ActivationQuantizer.static(**GRID)(x)
    assert y.isnan().all()  # a fault upstream stays visible
    high, low = (ActivationQuantizer.static(**GRID)(torch.full((1, 6), v)) for v in (math.inf, -math.inf))
    torch.testing.assert_close(high[0, :3], torch.full((3,), (15 - 7) * 0.1))
    torch.testing.assert_close(low[0, :3], torch.full((3,), (0 - 7) * 0.1))
    assert high[0, 5] == math.inf


def test_an_empty_activation_stays_empty():
    assert ActivationQuantizer.static(**GRID)(torch.zeros(0, 6)).shape == (0, 6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_token_grids_cover_each_token_s_own_range(bits, dtype):
    x = random(4, 9, dtype=dtype) * torch.tensor([[0.01], [1], [50], [3]]).to(dtype)
    y = ActivationQuantizer("token", token_bits=bits)(x)
    assert y.dtype == dtype
    for row, out in zip(x.float(), y.float()):
        s = (max(row.max().item(), 0) - min(row.min().item(), 0)) / (2**bits - 1)
        z = round(-min(row.min().item(), 0) / s)
        expected = [(min(max(round(v / s) + z, 0), 2**bits - 1) - z) * s for v in row.tolist()]
        # a half-way value may round either way when s differs in its last bit, so compare to the step
        assert (out - torch.tensor(expected)).abs().max() <= s * 1.01
        assert (out - row).abs().max() <= s * (0.51 + 0.5) and len(set(out.tolist())) <= 2**bits


def test_token_grids_of_zeros_and_of_one_sign():
    quantizer = ActivationQuantizer("token", token_bits=4)
    assert torch.equal(quantizer(torch.zeros(2, 5)), torch.zeros(2, 5))
    x = torch.tensor([[3.0, 1.5, 0.0, 2.25]])
    torch.testing.assert_close(quantizer(x)[0, 0], x[0, 0])  # the largest has its own code, zero too
    assert quantizer(x)[0, 2] == 0


def test_tile_grids_are_each_token_s_own_in_each_tile():
    random_x = random(3, 4, 7) * torch.logspace(-2, 2, 7)
    bits, sizes = torch.tensor([4, 8, 16]), torch.tensor([3, 2, 2])
    y = ActivationQuantizer.tiles(bits, sizes)(random_x)
    for row, out in zip(random_x.view(12, 7), y.view(12, 7)):
        for b, part, got in zip((4, 8), row.split(sizes.tolist()), out.split(sizes.tolist())):
            low, high = min(part.min().item(), 0), max(part.max().item(), 0)
            s = torch.tensor((high - low) / (2**b - 1)).bfloat16().item()
            z = round(-low / s)
            expected = torch.tensor([(min(max(round(v / s) + z, 0), 2**b - 1) - z) * s for v in part.tolist()])
            # A half-way value may round either way when float32 divides.
            assert (got - expected).abs().max() <= 1.01 * s and (got - part).abs().max() <= 1.1 * s
        assert torch.equal(out[5:], row[5:])


def test_tile_grids_of_zeros_and_of_one_sign():
    quantizer = ActivationQuantizer.tiles(torch.tensor([4, 4]), torch.tensor([2, 3]))
    assert torch.equal(quantizer(torch.zeros(2, 5)), torch.zeros(2, 5))
    x = torch.tensor([[0.0, 15.0, -30.0, -2.0, 0.0]])
    assert quantizer(x).tolist() == [[0.0, 15.0, -30.0, -2.0, 0.0]]  # steps of 1 and 2, which bfloat16 holds
    assert quantizer(x.bfloat16()).dtype == torch.bfloat16 and quantizer(x[:0]).shape == (0, 5)


def test_a_rotated_linear_and_norm_compute_the_same():
    W, x = random(6, 8, seed=1), random(5, 8, seed=2)
    linear = Linear(8, 6, bias=False, rotation=4)
    linear.weight = rotate(W, 4)
    torch.testing.assert_close(linear(x), x @ W.T)
    norm = Norm(8, kind="rmsnorm", eps=1e-6, rotation=4)
    norm.weight = torch.linspace(0.5, 2, 8)
    plain = Norm(8, kind="rmsnorm", eps=1e-6)
    plain.weight = norm.weight
    torch.testing.assert_close(norm(x) @ linear.weight.T, plain(x) @ W.T)


def packed_linear(R=5, C=11, bits=3, sizes=(4, 7), **options):
    """A packed Linear beside its codes, scales and zeros."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (R, C), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (R, len(sizes)), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(R, len(sizes), generator=generator) + 0.1).half()
    linear = Linear(C, R, **options)
    if linear.bias is not None:
        linear.bias = random(R, seed=3)
    linear.pack_(codes, scale, zero.float(), torch.tensor(sizes), bits)
    return linear, codes, scale, zero


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape, sizes", [((5, 11), (4, 7)), ((1, 1), (1,)), ((3, 8), (1, 6, 1)), ((2, 5), (5,))])
def test_packed_weights_follow_the_formula(bits, shape, sizes):
    linear, codes, scale, zero = packed_linear(*shape, bits, sizes)
    group = [g for g, n in enumerate(sizes) for _ in range(n)]
    expected = [
        [(int(codes[r, c]) - int(zero[r, g])) * scale[r, g].item() for c, g in enumerate(group)]
        for r in range(shape[0])
    ]
    torch.testing.assert_close(linear.dequantized_weight(), torch.tensor(expected), rtol=1e-6, atol=0)
    assert linear.stored_bytes() == sum(
        t.numel() * t.element_size() for t in (linear.weight_packed, linear.weight_zero, scale, linear.weight_groups)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_linear_quantizes_multiplies_and_quantizes(dtype):
    grid_in = {
        "scale": torch.tensor([0.2]),
        "zero": torch.tensor([3.0]),
        "bits": torch.tensor([3]),
        "sizes": torch.tensor([11]),
    }
    grid_out = {
        "scale": torch.tensor([1.5]),
        "zero": torch.tensor([4.0]),
        "bits": torch.tensor([3]),
        "sizes": torch.tensor([5]),
    }
    linear, *_ = packed_linear()
    linear.input_quantizer = ActivationQuantizer.static(**grid_in)
    x = random(2, 1, 11, dtype=dtype)
    y = quantized_by_hand(x, grid_in).to(dtype) @ linear.dequantized_weight().to(dtype).T + linear.bias.to(dtype)
    got = linear(x)
    assert got.dtype == dtype
    # one rounding more or less of the sum, in the precision of the dtype
    torch.testing.assert_close(got, y, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    linear.output_quantizer = ActivationQuantizer.static(**grid_out)
    torch.testing.assert_close(linear(x), quantized_by_hand(got, grid_out).to(dtype))


@pytest.mark.parametrize("R", [64, 70, 1])
def test_group4_weights(R):
    linear, weight = Linear(6, R, bias=False), random(R, 6)
    linear.weight = weight.clone()
    linear.pack_group4_()
    assert linear.weight_packed.shape == (6, -(-R // 2)) and linear.groups == -(-R // 64)
    for start in range(0, R, 64):  # groups of 64 rows, a grid a column
        part = weight[start : start + 64]
        step = (part.amax(0) - part.amin(0)) / 15
        error = (linear.dequantized_weight()[start : start + 64] - part).abs()
        assert (
            error <= step * 0.51 + part.abs().amax(0) * 2**-10
        ).all()  # half a step, and the float16 minimum and scale
    x = random(3, 6, seed=1)
    torch.testing.assert_close(linear(x), x @ linear.dequantized_weight().T)


def test_group4_activations_are_near_and_keep_their_dtype():
    x = random(2, 3, 128, dtype=torch.bfloat16)
    y = ActivationQuantizer("group4")(x)
    step = (x.float().unflatten(-1, (2, 64)).amax(-1) - x.float().unflatten(-1, (2, 64)).amin(-1)) / 15
    error = (y.float() - x.float()).abs().unflatten(-1, (2, 64)).amax(-1)
    assert y.dtype == torch.bfloat16 and (error <= step * 0.51 + 0.02).all() and (error > 0).any()  # bfloat16 rounding


def quantizers():
    return {
        None: None,
        "static": ActivationQuantizer.static(**GRID),
        "token": ActivationQuantizer("token", token_bits=5),
        "group4": ActivationQuantizer("group4"),
    }


@pytest.mark.parametrize("kind", [None, "static", "token", "group4"])
@pytest.mark.parametrize("codec", ["kept", "grid", "group4"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_is_rebuilt_from_its_spec_and_tensors(kind, codec, bias):
    linear = Linear(6, 9, bias=bias, input_quantizer=quantizers()[kind])
    linear.weight = random(9, 6)
    if codec == "grid":
        codes = torch.randint(0, 8, (9, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        linear.pack_(codes, torch.rand(9, 2) + 0.1, torch.ones(9, 2), torch.tensor([2, 4]), 3)
    elif codec == "group4":
        linear.pack_group4_()
    spec = json.loads(json.dumps(linear.spec()))  # it lives in config.json
    with torch.device("meta"):
        empty = build(spec, nn.Linear(6, 9, bias=bias))
    again = empty.to_empty(device="cpu")
    again.load_state_dict(linear.state_dict())
    assert {n: t.dtype for n, t in again.named_buffers()} == {n: t.dtype for n, t in linear.named_buffers()}
    x = random(4, 6, seed=2)
    assert again.spec() == linear.spec() and torch.equal(again(x), linear(x))


def pruned_linear(bits, keep, share=0.5, R=7, C=21, dtype=torch.float32):
    """(a Linear in sparse storage, the weight it must mean [R, C], its mask [R, C])."""
    linear = Linear(C, R, dtype=dtype, input_quantizer=quantizers()["token"])
    linear.bias = random(R, seed=3, dtype=dtype)
    score = torch.rand(R, C, generator=torch.Generator().manual_seed(4))
    kept = score < share
    if keep is not None:  # groups of 3, so that 21 channels have no tail
        rank = score.unflatten(1, (-1, 3)).argsort(-1).argsort(-1)  # [R, C] -> [R, G, 3]
        kept &= (rank < keep[0]).flatten(1)
    linear.weight = random(R, C, seed=5, dtype=dtype)
    if bits == 16:
        expected = torch.where(kept, linear.weight, 0)
        linear.pack_sparse_(kept, keep)
        return linear, expected, kept
    whole, codes, scale, zero = packed_linear(R, C, bits, sizes=(4, 17))
    expected = torch.where(kept, whole.dequantized_weight(), 0)
    linear.pack_(codes, scale, zero.float(), torch.tensor([4, 17]), bits, kept=kept, keep=keep)
    return linear, expected, kept


SPARSE = [(16, None), (16, (1, 3)), (2, None), (3, (2, 3)), (4, None), (4, (1, 3)), (8, (2, 3))]


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bits, keep", SPARSE, ids=str)
def test_a_pruned_linear_means_the_masked_weight_and_runs_it(bits, keep, share):
    linear, expected, kept = pruned_linear(bits, keep, share)
    W = linear.dequantized_weight()
    assert torch.equal(W, expected) and not torch.signbit(W[W == 0]).any()  # exactly, and never -0.0
    assert torch.equal(linear.kept(), expected != 0) and not (linear.kept() & ~kept).any()
    whole = Linear(21, 7, input_quantizer=linear.input_quantizer)
    whole.weight, whole.bias = expected, linear.bias
    x = random(2, 3, 21, seed=6)
    assert torch.equal(linear(x), whole(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("bits, keep", SPARSE, ids=str)
def test_a_pruned_linear_is_rebuilt_from_its_spec_and_bytes(bits, keep, share, dtype):
    linear, expected, _ = pruned_linear(bits, keep, share, dtype=dtype)
    spec = json.loads(json.dumps(linear.spec()))
    with torch.device("meta"):
        empty = build(spec, nn.Linear(21, 7, dtype=dtype))
    again = empty.to_empty(device="cpu")
    again.load_state_dict(tensors_of(bytes_of(linear.state_dict())))
    assert {n: t.dtype for n, t in again.named_buffers()} == {n: t.dtype for n, t in linear.named_buffers()}
    assert again.spec() == linear.spec() and torch.equal(again.dequantized_weight(), expected)


def test_pruned_bytes_are_those_of_the_tensors():
    R, C, K = 7, 21, int(pruned_linear(16, None)[1].count_nonzero())
    grids = R * 2 * 2 + R + 2 * 4  # float16 scales, zero points of two groups in a byte, int32 sizes
    assert pruned_linear(16, None, dtype=torch.float16)[0].stored_bytes() == 2 * K + R * 3
    assert pruned_linear(16, (1, 3))[0].stored_bytes() == 4 * R * C // 3 + R * 2  # 7 slots, 2 bits each
    assert pruned_linear(4, (1, 3))[0].stored_bytes() == R * 4 + R * 2 + grids
    linear = pruned_linear(4, None)[0]
    assert linear.stored_bytes() == -(-linear.sparse["kept"] * 4 // 8) + R * 3 + grids


def test_every_layout_says_which_weights_are_not_zero():
    W = random(64, 6)
    W[3, 2] = -0.0
    linear = Linear(6, 64)
    linear.weight = W
    assert torch.equal(linear.kept(), W != 0)
    whole, codes, _, zero = packed_linear(bits=2)
    group = torch.tensor([0] * 4 + [1] * 7)
    assert torch.equal(whole.kept(), codes != zero[:, group]) and not whole.kept().all()
    linear.pack_group4_()
    assert torch.equal(linear.kept(), linear.dequantized_weight() != 0)


def test_a_pruned_linear_of_another_mask_or_layout_is_refused():
    linear = Linear(6, 4)
    linear.weight = random(4, 6)
    with pytest.raises(ValueError, match="2:4 has 2 slots"):
        linear.pack_sparse_(torch.ones(4, 6, dtype=torch.bool), (2, 4))
    with pytest.raises(ValueError, match="pass bool"):
        linear.pack_sparse_(torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="unknown sparse storage 'csr'"):
        build({**linear.spec(), "sparse": {"kind": "csr"}}, nn.Linear(6, 4))


@pytest.mark.parametrize("bits", [16, 4])
def test_a_damaged_mask_never_runs(bits):
    linear, *_ = pruned_linear(bits, None)
    linear.weight_mask[0, 0] ^= 1
    with pytest.raises(ValueError, match="the mask keeps"):
        linear(random(1, 21))


NORMS = {
    "layernorm": lambda: nn.LayerNorm(6, eps=1e-3),
    "layernorm without weights": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "layernorm without bias": lambda: nn.LayerNorm(6, bias=False),
    "rmsnorm": lambda: LlamaRMSNorm(6, eps=1e-3),
    "rmsnorm_plus_one": lambda: Gemma2RMSNorm(6, eps=1e-3),
}


def spread(module: nn.Module) -> nn.Module:
    for i, p in enumerate(module.parameters()):
        p.data = random(*p.shape, seed=i + 5)
    return module


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_the_model_s_norm_then_a_gather_then_a_grid(name):
    theirs = spread(NORMS[name]())
    ours = Norm.full_precision(theirs, name.split()[0])
    x = random(2, 3, 6) * 4 + 1
    expected = theirs(x).detach()
    torch.testing.assert_close(ours(x), expected, rtol=1e-6, atol=1e-6)
    ours.permutation = torch.tensor([3, 1, 5, 0, 2, 4], dtype=torch.int32)
    torch.testing.assert_close(ours(x), expected[..., [3, 1, 5, 0, 2, 4]], rtol=1e-6, atol=1e-6)
    ours.quantizer = ActivationQuantizer.static(**GRID)
    torch.testing.assert_close(ours(x), quantized_by_hand(expected[..., [3, 1, 5, 0, 2, 4]]), rtol=1e-5, atol=1e-5)
    again = build(json.loads(json.dumps(ours.spec())), NORMS[name]())
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x), ours(x)) and again.eps == ours.eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_norms_in_half_precision(name, dtype):
    theirs = spread(NORMS[name]()).to(dtype)
    x = random(5, 6, dtype=dtype)
    assert torch.equal(Norm.full_precision(theirs, name.split()[0])(x), theirs(x))


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 9), lambda: nn.Linear(6, 9, bias=False), lambda: Conv1D(9, 6)])
def test_full_precision_linears_are_the_same_function(make):
    theirs, x = spread(make()), random(1, 4, 6)
    torch.testing.assert_close(Linear.full_precision(theirs)(x), theirs(x).detach(), rtol=1e-6, atol=1e-6)


def test_a_backend_takes_over_and_what_it_lacks_falls_back(monkeypatch):
    monkeypatch.setattr(backend, "_BACKENDS", {})
    linear, *_ = packed_linear()
    x, calls = random(2, 11), []

    def counted(x, weight, bias):
        calls.append(x.shape)
        return reference.linear(x, weight, bias)

    before = linear(x)
    register_backend("cpu", SimpleNamespace(linear=counted))
    assert torch.equal(linear(x), before) and calls == [(2, 11)]
    assert operation("dequantize_weight", "cpu") is reference.dequantize_weight
    assert operation("linear", "cuda") is reference.linear
    with pytest.raises(AttributeError):
        operation("no_such_operation", "cpu")


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not fit in 3 bits"):
        pack(torch.tensor([[8]], dtype=torch.uint8), 3)


def test_tiles_of_one_width_are_rounded_like_tiles_of_any():
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(0)).mul(torch.linspace(0.1, 9, 96))
    bits = torch.tensor([4, 8, 3], dtype=torch.uint8)
    together = ActivationQuantizer.tiles(bits, torch.tensor([32, 32, 32]))(x)
    # a last tile of one more channel takes the general way, and changes nothing in the others
    ragged = ActivationQuantizer.tiles(torch.cat([bits, bits[:1]]), torch.tensor([32, 32, 32, 1]))
    assert torch.equal(ragged(torch.cat([x, x[..., :1]], -1))[..., :96], together)
    for tile, width, rounded in zip(x.split(32, -1), bits.tolist(), together.split(32, -1)):
        assert torch.equal(
            reference.quantize_activation_tiles(tile, torch.tensor([width]), torch.tensor([32])), rounded
        )
