import pytest
import torch

from rptq import ChannelRange, channel_grid, fake_quantize, fit_grid, quantization_cost, tensor_grid, update

SIZES = torch.tensor([1, 3, 8])


def random_activation(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(200, 12, generator=generator) * torch.logspace(-1, 2, 12) + torch.linspace(-5, 5, 12)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grid_follows_the_formula(bits):
    ranges = update(None, random_activation())
    grid = fit_grid(ranges, SIZES, bits)
    start = 0
    for g, size in enumerate(SIZES.tolist()):
        m, M = float(ranges.min[start : start + size].min()), float(ranges.max[start : start + size].max())
        s = (M - m) / (2**bits - 1)
        assert float(grid.scale[g]) == pytest.approx(s, rel=1e-6)  # a few float32 roundings
        assert float(grid.zero[g]) == round(-m / s)
        start += size
    assert grid.scale.dtype == grid.zero.dtype == torch.float32


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("fit", [lambda r, b: fit_grid(r, SIZES, b), tensor_grid, channel_grid])
def test_error_in_range_is_at_most_half_a_step(bits, fit):
    x = random_activation()
    grid = fit(update(None, x), bits)
    step = grid.scale.repeat_interleave(grid.sizes)
    # |zero| is below 1e4, so float32 rounds x / scale by less than 1e-3 of a step.
    assert ((fake_quantize(x, grid) - x).abs() <= 0.501 * step).all()


def test_zero_point_may_leave_the_codes():
    # With the zero point held in 0 .. 15 the range would have to reach down to 0: a step six times as wide.
    ranges = ChannelRange(torch.tensor([5.0]), torch.tensor([6.0]))
    grid = tensor_grid(ranges, 4)
    assert grid.zero.tolist() == [-75.0]
    x = torch.linspace(5, 6, 1001)[:, None]
    assert (fake_quantize(x, grid) - x).abs().max() <= 0.501 / 15  # float32 rounding as above


def test_narrow_cluster_far_from_zero_is_widened():
    ranges = ChannelRange(torch.tensor([1000.0, -1000.0]), torch.tensor([1000.01, -999.99]))
    grid = channel_grid(ranges, 4)
    assert grid.zero.tolist() == [-1e4, 1e4]
    x = torch.stack((ranges.min, ranges.max))
    assert ((fake_quantize(x, grid) - x).abs() <= 0.501 * grid.scale).all()


@pytest.mark.parametrize("value", [0.0, 3.7, -3.7, 1e-30, -1e-30, 1e30, 1e-42])
def test_a_constant_channel_comes_back(value):
    x = torch.full((4, 2), value)
    for grid in (tensor_grid(update(None, x), 4), channel_grid(update(None, x), 1)):
        assert torch.isfinite(grid.scale).all() and (grid.scale > 0).all()
        # Exact, except that below the smallest normal float32 a value is as good as that number.
        assert ((fake_quantize(x, grid) - x).abs() <= (1.2e-38 if abs(value) < 1e-38 else 0)).all()


def test_values_outside_the_range_are_clamped():
    grid = tensor_grid(ChannelRange(torch.tensor([-1.0]), torch.tensor([2.0])), 2)
    assert fake_quantize(torch.tensor([[-9.0], [9.0]]), grid).flatten().tolist() == [-1.0, 2.0]


def test_fake_quantize_is_idempotent_and_keeps_dtype_and_shape():
    x = random_activation().bfloat16().view(10, 20, 12)
    grid = fit_grid(update(None, x), SIZES, 4)
    once = fake_quantize(x, grid)
    assert once.dtype == torch.bfloat16 and once.shape == x.shape
    assert torch.equal(fake_quantize(once, grid), once)
    assert torch.equal(once, fake_quantize(x.float(), grid).bfloat16())


def test_cost_follows_the_formula():
    ranges = ChannelRange(torch.tensor([-1.0, 0.0, 2.0, 7.0]), torch.tensor([1.0, 2.0, 4.0, 7.0]))
    sizes = torch.tensor([2, 1, 1])
    expected = (2 * 3.0**2 + 1 * 2.0**2) / 15**2 / 12
    assert quantization_cost(ranges, sizes, 4) == pytest.approx(expected, rel=1e-6)  # float32 steps
    weight = torch.tensor([1.0, 4.0, 10.0, 100.0])
    expected = (5 * 3.0**2 + 10 * 2.0**2) / 15**2 / 12
    assert quantization_cost(ranges, sizes, 4, weight=weight) == pytest.approx(expected, rel=1e-6)


def test_cost_predicts_the_measured_error():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(20000, 12, generator=generator) * torch.linspace(1, 9, 12)
    ranges = update(None, x)
    error = (fake_quantize(x, fit_grid(ranges, SIZES, 4)) - x).square().sum(1).mean()
    # Uniform values round uniformly; channels narrower than their cluster do so only nearly.
    assert float(error) == pytest.approx(quantization_cost(ranges, SIZES, 4), rel=0.05)


def test_refusals():
    ranges = ChannelRange(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="sum to 3"):
        fit_grid(ranges, torch.tensor([2, 2]), 4)
    with pytest.raises(ValueError, match="positive"):
        fit_grid(ranges, torch.tensor([3, 0]), 4)
    with pytest.raises(ValueError, match="got 0"):
        tensor_grid(ranges, 0)
    with pytest.raises(ValueError, match="4 channels, its grid 3"):
        fake_quantize(torch.zeros(2, 4), tensor_grid(ranges, 4))
    with pytest.raises(ValueError, match="too wide"):
        tensor_grid(ChannelRange(torch.tensor([-3e38]), torch.tensor([3e38])), 4)
