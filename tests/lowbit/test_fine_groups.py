"""Weight groups of twice the bits: stored as two halves, multiplied as a second tile, always the weight of the whole code."""

from __future__ import annotations

import json

import lowbit
import pytest
import torch
from lowbit import ActivationQuantizer, Linear, build, integer
from lowbit import planar_reference as reference
from lowbit.cpu import native
from lowbit.cpu import planar as cpu
from lowbit.planar import padded_codes
from torch import nn

R, C = 20, 296
SIZES = torch.tensor([64, 64, 128, 40])
FINE = torch.tensor([False, True, True, True])
NONE = torch.zeros(4, dtype=torch.bool)
GROUP = torch.arange(4).repeat_interleave(SIZES)
KINDS = {"whole": None, "bitmask": "share", "n:m": (2, 4)}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(bits, fine=FINE, kind="whole"):
    """(codes, scale, zero, kept) whose codes in fine groups have twice the bits; pruned codes lie on their zero point."""
    generator, top = seeded(bits), 2 ** torch.where(fine, 2 * bits, torch.tensor(bits))  # [G]
    zero = (torch.rand(R, 4, generator=generator) * top).floor()
    codes = (torch.rand(R, C, generator=generator) * top[GROUP]).floor()
    scale = torch.rand(R, 4, generator=generator).add_(0.1).half()
    kept = None
    if KINDS[kind] == "share":
        kept = torch.rand(R, C, generator=generator) < 0.4
    elif KINDS[kind] is not None:
        kept = torch.rand(R, C // 4, 4, generator=generator).argsort(2).lt(2).flatten(1)
    if kept is not None:
        codes = torch.where(kept, codes, zero[:, GROUP])
    return codes.to(torch.uint8), scale, zero, kept


def linear(bits, fine=FINE, kind="whole", **options):
    codes, scale, zero, kept = draw(bits, fine, kind)
    keep = KINDS[kind] if kind == "n:m" else None
    new = Linear(C, R, bias=False, **options)
    new.weight = torch.zeros(R, C)
    new.pack_(codes, scale, zero, SIZES, bits, fine=fine, kept=kept, keep=keep)
    step = scale.double() / torch.where(fine, 2.0**bits, 1.0)
    return new, ((codes.double() - zero[:, GROUP]) * step[:, GROUP]).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_weight_is_that_of_the_whole_code(bits, kind):
    module, expected = linear(bits, kind=kind)
    assert torch.equal(module.dequantized_weight(), expected)
    again = build(json.loads(json.dumps(module.spec())), nn.Linear(C, R, bias=False))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in module.state_dict().items()}
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.dequantized_weight(), expected)


def test_it_costs_its_codes_and_zero_points_again():
    module, plain = linear(4)[0], linear(4, fine=NONE)[0]
    assert plain.fine is None and module.fine == {"groups": 3, "channels": 232}
    assert module.stored_bytes() - plain.stored_bytes() == R * (232 // 2 + 2) + 3 * 4


def test_what_is_pruned_stays_zero_whatever_its_low_bits():
    codes, scale, zero, kept = draw(4, kind="bitmask")
    module = Linear(C, R, bias=False)
    module.weight = torch.zeros(R, C)
    module.pack_(torch.where(kept, codes, codes ^ 5), scale, zero, SIZES, 4, fine=FINE, kept=kept)
    assert torch.equal(module.dequantized_weight(), linear(4, kind="bitmask")[1])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_low_bits_lie_behind_the_tiles_that_they_refine(bits):
    codes, scale, zero, _ = draw(bits)
    module = linear(bits)[0]
    stored = module.weight_packed, module.weight_scale, module.weight_zero, SIZES
    fine = module.weight_rest, module.weight_rest_zero, module.weight_fine
    planar = lowbit.planar_weight(*stored, bits=bits, channels=C, fine=fine)
    assert planar.repeats.tolist() == [1, 2, 3, 4] and planar.tiles == 10
    v, middle = padded_codes(planar), 2 ** (bits - 1)
    high = torch.where(FINE[GROUP], codes >> bits, codes).int() - middle
    assert torch.equal(v[:, :C].int(), high) and v[:, C:320].eq(0).all()
    low = (codes[:, 64:] % 2**bits).int() - middle
    assert torch.equal(v[:, 320:552].int(), low) and v[:, 552:].eq(0).all()
    assert torch.equal(planar.scale[5:9], planar.scale[1:5] / 2**bits) and planar.scale[9:].eq(0).all()
    W = module.dequantized_weight().double()
    sums = torch.stack([part.sum(1) for part in W.split(64, 1)])  # [5, R]
    totals = planar.total[:5].double().index_add(0, planar.repeats, planar.total[5:9].double())
    torch.testing.assert_close(totals, sums, rtol=0, atol=1e-4)  # each half is rounded to float32


@pytest.mark.parametrize("mode", ["none", "token", "tile", "static"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@torch.no_grad()
def test_integer_kernels_compute_the_same(bits, mode):
    if not native.fast_avx2():
        pytest.skip("no compiled kernels that this machine would run")
    x = torch.randn(5, C, generator=seeded(9)) * torch.linspace(0.2, 4, C)
    scale, widths = torch.full((4,), 0.3), torch.tensor([4, 8, 4, 8])
    quantizer = {
        "none": None,
        "token": ActivationQuantizer("token", token_bits=8),
        "tile": ActivationQuantizer.tiles(widths, SIZES),
        "static": ActivationQuantizer.static(scale, torch.full((4,), 7.0), widths, SIZES),
    }[mode]
    module, _ = linear(bits, input_quantizer=quantizer)
    expected = module(x)
    assert integer.take([module])
    # the order of float32 sums; without a grid inputs are rounded to two int8 codes, 2^-15 of a tile's largest
    near = 2.0**-14 if mode == "none" else 1e-5
    assert 0 < float((module(x) - expected).abs().max() / expected.abs().max()) < near


@pytest.mark.parametrize("channels, repeats", [(296, [0, 3, 4]), (256, [3]), (64, [0]), (64, [0, 0])])
@pytest.mark.parametrize("mode", ["tiles", "token", "static"])
def test_native_quantizers_repeat_tiles_as_the_reference_does(mode, channels, repeats):
    if native.library() is None:
        pytest.skip("lowbit's C++ library is not built here")
    x, repeats = torch.randn(3, channels, generator=seeded(3)), torch.tensor(repeats)
    x[1, 0] = torch.nan
    sizes = torch.tensor([64] * (channels // 64) + [40] * (channels % 64 > 0))
    bits = (torch.arange(sizes.numel()) % 2 * 4 + 4).to(torch.uint8)
    args = {"tiles": (bits, sizes), "token": (8,), "static": (bits / 20, bits.float(), bits, sizes)}[mode]
    plain = getattr(reference, f"quantize_{mode}_planar")(x, *args)
    expected = reference.repeat_tiles(plain, channels, repeats)
    for path in ("portable", "fastest"):
        found = getattr(cpu, f"quantize_{mode}")(x, *args, repeats=repeats, path=path)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match=r"tiles \[9\] once more"):
        getattr(cpu, f"quantize_{mode}")(x, *args, repeats=torch.tensor([9]))
