"""Linears on integer kernels compute what the reference operations compute, and only those that can are taken."""

from __future__ import annotations

import pytest
import torch
from lowbit import ActivationQuantizer, Linear, Norm, integer
from lowbit.cpu import native
from lowbit.planar import TILE
from lowbit.sinks import announce

pytestmark = pytest.mark.skipif(not native.fast_avx2(), reason="no compiled kernels that this machine would run")
C, R = 160, 24  # a last tile of 32 channels, a last unit of one tile
SIZES = torch.tensor([64, 96])
GROUPS = torch.tensor([64, 64, 32])


def linear(bits=4, *, groups=GROUPS, quantizer=None, rotation=1, bias=True, seed=0):
    random = torch.Generator().manual_seed(seed)
    new = Linear(C, R, bias=bias, rotation=rotation, input_quantizer=quantizer)
    new.weight = torch.zeros(R, C)
    codes = torch.randint(2**bits, (R, C), generator=random, dtype=torch.uint8)
    scale = torch.rand(R, groups.numel(), generator=random).add_(0.1).half()
    new.pack_(codes, scale, torch.randint(2**bits, scale.shape, generator=random), groups, bits)
    if bias:
        new.bias = torch.randn(R, generator=random)
    return new


def inputs(*shape, seed=1):
    return torch.randn(*shape, C, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.2, 4, C)


def quantizers():
    x = inputs(50, seed=2)
    bits = torch.tensor([4, 8])
    low, high = (torch.stack([f(part) for part in x.split(SIZES.tolist(), 1)]) for f in (torch.min, torch.max))
    scale = (high - low) / (2.0**bits - 1)
    return {
        "none": None,
        "token": ActivationQuantizer("token", token_bits=8),
        "tile": ActivationQuantizer.tiles(bits, SIZES),
        "static": ActivationQuantizer.static(scale, torch.round(-low / scale), bits, SIZES),
    }


def gap(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


# The codes of activations are equal: what differs is the order of float32 sums.
CLOSE = 1e-5
# Without a grid an activation is a sum of two int8 codes, at most 2^-15 of its tile's largest number off.
CLOSE_TO_FULL = 2.0**-14


@pytest.mark.parametrize("mode", ["none", "token", "tile", "static"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@torch.no_grad()
def test_a_linear_computes_the_same(mode, bits):
    module, x = linear(bits, quantizer=quantizers()[mode]), inputs(2, 5)
    expected = module(x)
    assert integer.take([module])
    found, near = module(x), CLOSE_TO_FULL if mode == "none" else CLOSE
    assert 0 < gap(found, expected) < near and found.shape == (2, 5, R)
    assert gap(module(x[1, 2]), expected[1, 2]) < near  # one token has kernels of its own
    assert torch.equal(module(x[:, :0]), expected[:, :0])


@torch.no_grad()
def test_many_tokens_of_a_weight_only_linear_are_not_worth_two_codes_each():
    module, x = linear(), inputs(integer.FEW_TOKENS + 1)
    expected = module(x)
    assert integer.take([module])
    assert torch.equal(module(x), expected) and not torch.equal(module(x[:-1]), expected[:-1])


@torch.no_grad()
def test_rotation_comes_before_the_grid():
    module, x = linear(quantizer=quantizers()["tile"], rotation=32, bias=False), inputs(7)
    expected = module(x)
    assert integer.take([module]) and gap(module(x), expected) < CLOSE


@torch.no_grad()
def test_spared_rows_keep_full_precision():
    quantizer = ActivationQuantizer.tiles(torch.tensor([4, 4]), SIZES, sinks=1)
    module, x = linear(quantizer=quantizer), inputs(2, 3)
    x[:, 0] *= 300
    announce(torch.tensor([[True, False, False], [False, True, False]]))
    try:
        expected = module(x)
        assert integer.take([module])
        found = module(x)
        announce(torch.zeros(2, 3, dtype=torch.bool))
        rounded = module(x)
    finally:
        announce(None)
    full = torch.nn.functional.linear(x, module.dequantized_weight(), module.bias)
    assert gap(found, expected) < CLOSE_TO_FULL and gap(found[0, 0], full[0, 0]) < CLOSE_TO_FULL
    assert gap(rounded[0, 0], full[0, 0]) > 1e-3


@pytest.mark.parametrize("mode", ["none", "tile", "static"])
@torch.no_grad()
def test_a_norm_hands_its_quantizer_over(mode):
    norm = Norm(C, kind="rmsnorm", eps=1e-5, permuted=True, quantizer=quantizers()[mode])
    norm.weight, norm.permutation = torch.ones(C), torch.randperm(C, generator=torch.Generator().manual_seed(3)).int()
    linears, x = [linear(seed=1), linear(seed=2)], inputs(2, 4)
    expected = [module(norm(x)) for module in linears]
    keys = [list(module.state_dict()) for module in (norm, *linears)]
    assert integer.take(linears, norm)
    for module, known in zip(linears, expected):
        assert gap(module(norm(x)), known) < (CLOSE_TO_FULL if mode == "none" else CLOSE)
    assert [list(module.state_dict()) for module in (norm, *linears)] == keys


@torch.no_grad()
def test_other_dtypes_and_gradients_take_the_reference():
    norm = Norm(C, kind="rmsnorm", eps=1e-5, quantizer=quantizers()["tile"])
    norm.weight, module, x = torch.ones(C), linear(), inputs(4)
    half = module(norm(x.bfloat16()))
    assert integer.take([module], norm)
    assert torch.equal(module(norm(x.bfloat16())), half)
    weight_only = linear()
    expected = weight_only(x)
    assert integer.take([weight_only]) and not torch.equal(weight_only(x), expected)
    with torch.enable_grad():
        y = weight_only(x.requires_grad_())
        y.sum().backward()
    assert torch.equal(y, expected) and x.grad is not None


def grids_inside_a_tile():
    quantizer = ActivationQuantizer.tiles(torch.tensor([4, 4]), torch.tensor([32, 128]))
    return linear(quantizer=quantizer), linear(groups=torch.tensor([32, 128]))


@torch.no_grad()
def test_what_kernels_cannot_run_is_left_alone():
    whole = Linear(C, R, bias=False)
    whole.weight = torch.ones(R, C)
    pruned = Linear(C, R, bias=False)
    pruned.weight = torch.zeros(R, C)
    codes = torch.full((R, C), 3, dtype=torch.uint8)
    pruned.pack_(codes, torch.ones(R, 1), torch.zeros(R, 1), torch.tensor([C]), 4, kept=torch.rand(R, C) > 0.5)
    flexgen = Linear(C, R, bias=False)
    flexgen.weight = torch.randn(R, C)
    flexgen.pack_group4_()
    fine = linear()
    for module in (whole, pruned, flexgen, *grids_inside_a_tile()):
        before = module(inputs(3))
        assert not integer.take([fine, module]) and module.planar is None and fine.planar is None
        assert torch.equal(module(inputs(3)), before)


@pytest.mark.parametrize("terms, left", [(1, 2.0**-7), (2, 2.0**-15), (3, 2.0**-22)])
def test_exact_codes_leave_little_over(terms, left):
    x = inputs(6) * 1e3
    x[2] = 0
    a, step = integer.exact_codes(x, terms)
    values = (a.unflatten(2, (-1, TILE)).double() * step[..., None]).sum(0).flatten(1)[:, :C]
    largest = x.abs().amax()
    assert float((values - x).abs().max()) <= left * float(largest) and values[2].eq(0).all()


@torch.no_grad()
def test_nan_and_infinity_reach_the_output():
    module, x = linear(quantizer=quantizers()["tile"]), inputs(4)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    assert integer.take([module])
    y = module(x)
    assert y[[0, 3]].isfinite().all() and y[[1, 2]].isnan().all()
    weight_only = linear()
    assert integer.take([weight_only]) and weight_only(x)[[1, 2]].isnan().all()
