"""WeightGrid: the formula by hand, and the edges of its scales."""

import pytest
import torch

from sparsegpt import WeightGrid, dequantize, encode, fit_grid


def weight(R: int, C: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(R, C, generator=torch.Generator().manual_seed(seed))


def test_grid_by_hand():
    W = torch.tensor([[-1.0, 0.0, 2.0, 0.5, 0.75], [1.0, 2.0, 3.0, -4.0, -2.0]])
    grid = fit_grid(W, torch.tensor([3, 2]), 2)
    # Row 0: [-1, 2] and [0, 0.75]; row 1: [0, 3] and [-4, 0]; three steps each.
    assert grid.scale.dtype == torch.float16
    assert torch.equal(grid.scale, torch.tensor([[1, 0.25], [1, 4 / 3]]).half())
    assert grid.zero.tolist() == [[1, 0], [0, 3]]
    assert encode(W, grid).tolist() == [[0, 1, 3, 2, 3], [1, 2, 3, 0, 1]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sizes", [[24], [1, 7, 16], [1] * 24])
def test_every_weight_is_within_half_a_step(bits, sizes):
    W, sizes = weight(5, 24), torch.tensor(sizes)
    grid = fit_grid(W, sizes, bits)
    step = grid.scale.float().repeat_interleave(sizes, dim=1)  # [R, C]
    codes = encode(W, grid)
    assert codes.dtype == torch.uint8 and codes.max().item() < 2**bits
    assert (grid.zero >= 0).all() and (grid.zero < 2**bits).all() and torch.equal(grid.zero, grid.zero.round())
    # Half a step, plus what the ends lose: half a step to zero's rounding, 2^-11 of the range to the float16 scale.
    assert ((dequantize(codes, grid) - W).abs() <= step * (1 + 2**bits * 2.0**-11)).all()
    inside = (codes > 0) & (codes < 2**bits - 1)
    assert ((dequantize(codes, grid) - W).abs() <= step * 0.5001)[inside].all()


def test_dequantized_weights_encode_to_themselves():
    W = weight(4, 20)
    grid = fit_grid(W, torch.tensor([9, 11]), 4)
    codes = encode(W, grid)
    assert torch.equal(encode(dequantize(codes, grid), grid), codes)


def test_ties_go_to_even():
    w = torch.tensor([[-1.5, -0.5, 0.5, 1.5, 2.5]])
    grid = WeightGrid(torch.ones(1, 1), torch.full((1, 1), 4.0), torch.tensor([5]), 4)
    assert encode(w, grid).tolist() == [[2, 4, 4, 6, 6]]


def test_a_fine_group_by_hand():
    W = torch.tensor([[-1.0, 0.0, 2.0, 7.0, -8.0, 0.6], [0.0, 2.0, 3.0, 0.0, 3.75, 0.0]])
    grid = fit_grid(W, torch.tensor([3, 3]), 2, fine=torch.tensor([[False, True]]).expand(2, 2))
    # 15 steps instead of 3: row 0 from -8 to 7, row 1 from 0 to 3.75. The scale is four of them.
    assert torch.equal(grid.scale, torch.tensor([[1, 4], [1, 1]]).half())
    assert grid.zero.tolist() == [[1, 8], [0, 0]] and grid.top.tolist() == [[3, 15]] * 2
    assert grid.step.tolist() == [[1, 1], [1, 0.25]]
    assert encode(W, grid).tolist() == [[0, 1, 3, 15, 0, 9], [0, 2, 3, 0, 15, 0]]
    assert dequantize(encode(W, grid), grid)[:, 3:].tolist() == [[7, -8, 1], [0, 3.75, 0]]


@pytest.mark.parametrize("bits", [2, 4])
def test_fine_groups_have_the_grid_of_twice_the_bits(bits):
    W, sizes = weight(5, 24), torch.tensor([8, 16])
    some = {"scale_dtype": torch.float32, "importance": torch.linspace(0.1, 5, 24)}
    fine = torch.tensor([[False, True]]).repeat(5, 1)
    fine[3] = torch.tensor([True, False])
    grid = fit_grid(W, sizes, bits, fine=fine, **some)
    plain, more = fit_grid(W, sizes, bits, **some), fit_grid(W, sizes, 2 * bits, **some)
    refined = fine.repeat_interleave(sizes, 1)  # [R, G] -> [R, C]
    expected = torch.where(refined, encode(W, more), encode(W, plain))
    assert torch.equal(encode(W, grid), expected)
    values = torch.where(refined, dequantize(expected, more), dequantize(expected, plain))
    assert torch.equal(dequantize(expected, grid), values)


@pytest.mark.parametrize("bits, fine", [(8, [[True, False]] * 2), (4, [True, False])])
def test_fine_groups_that_cannot_be(bits, fine):
    with pytest.raises(ValueError, match="one flag a row and group, .*, at most 4 bits"):
        fit_grid(weight(2, 4), torch.tensor([2, 2]), bits, fine=torch.tensor(fine))


@pytest.mark.parametrize("factor", [1e-7, 1e9, 3e38, 1e-44])
def test_scales_beyond_float16_stay_float32(factor):
    W = weight(3, 8).clamp(-1, 1) * factor
    grid = fit_grid(W, torch.tensor([4, 4]), 8)
    assert grid.scale.dtype == torch.float32 and (grid.scale > 0).all() and torch.isfinite(grid.scale).all()
    # One step of an 8-bit grid; 1e-44 lies below the smallest normal float32 and rounds to zero.
    largest = max(factor / 255, torch.finfo(torch.float32).tiny) * 2
    assert (dequantize(encode(W, grid), grid) - W).abs().max() <= largest * 1.001


def test_a_tiny_group_beside_normal_ones_keeps_float16():
    W = weight(3, 8)
    W[:, 4:] *= 1e-6
    grid = fit_grid(W, torch.tensor([4, 4]), 4)
    assert grid.scale.dtype == torch.float16 and (grid.scale > 0).all()
    # Half a step of the floor, 2^-20, in the tiny group; the other is rounded as ever.
    assert (dequantize(encode(W, grid), grid) - W)[:, 4:].abs().max() <= 2**-21


def test_zero_group_is_exact_and_keeps_float16():
    W = weight(3, 10)
    W[1, 4:] = 0
    grid = fit_grid(W, torch.tensor([4, 6]), 3)
    assert grid.scale.dtype == torch.float16 and grid.scale[1, 1] == 1
    assert encode(W, grid)[1, 4:].eq(0).all() and dequantize(encode(W, grid), grid)[1, 4:].eq(0).all()


def test_zero_weights_stay_zero():
    W = weight(6, 16)
    W[:, ::2] = 0
    grid = fit_grid(W, torch.tensor([16]), 3)
    assert dequantize(encode(W, grid), grid)[:, ::2].eq(0).all()


@pytest.mark.parametrize(
    "W, sizes, bits, message",
    [
        (torch.ones(3), [3], 4, "W must"),
        (torch.ones(1, 3, dtype=torch.int64), [3], 4, "W must"),
        (torch.tensor([[1.0, float("nan")]]), [2], 4, "NaN"),
        (torch.tensor([[1.0, float("inf")]]), [2], 4, "Inf"),
        (torch.tensor([[-1e39, 1.0]], dtype=torch.float64), [2], 4, "beyond float32"),
        (torch.ones(1, 3), [3], 9, "bits must"),
        (torch.ones(1, 3), [3], 1, "bits must"),
        (torch.ones(1, 3), [2], 4, "sum 3"),
        (torch.ones(1, 3), [3, 0], 4, "positive"),
        (torch.ones(1, 3), [4, -1], 4, "positive"),
        (torch.ones(1, 3), [3.0], 4, "int64"),
    ],
)
def test_bad_arguments_raise(W, sizes, bits, message):
    with pytest.raises(ValueError, match=message):
        fit_grid(W, torch.tensor(sizes), bits)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_an_important_channel_narrows_the_range_and_no_group_loses(bits):
    W = torch.randn(9, 24, generator=torch.Generator().manual_seed(0)) ** 3
    sizes, importance = torch.tensor([8, 16]), torch.linspace(0.1, 5, 24)

    def errors(grid):
        by_weight = (dequantize(encode(W, grid), grid) - W).square() * importance
        return torch.stack([part.sum(1) for part in by_weight.split(sizes.tolist(), 1)], 1)

    plain = fit_grid(W, sizes, bits, scale_dtype=torch.float32)
    narrowed = fit_grid(W, sizes, bits, importance=importance, scale_dtype=torch.float32)
    assert (errors(narrowed) <= errors(plain) * (1 + 1e-5)).all()  # float32 sums
    assert errors(narrowed).sum() < errors(plain).sum()
    assert (narrowed.scale <= plain.scale).all()
