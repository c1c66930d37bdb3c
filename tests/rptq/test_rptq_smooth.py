import pytest
import torch

from rptq import ChannelRange, smooth_factors, update


def test_factors_follow_the_formula_and_change_no_output():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64) * torch.logspace(-1, 2, 6)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    for alpha in (0.0, 0.5, 0.85, 1.0):
        s = smooth_factors(update(None, x), weight.abs().amax(0), alpha=alpha)
        expected = x.abs().amax(0) ** alpha / weight.abs().amax(0) ** (1 - alpha)
        torch.testing.assert_close(s.double(), expected, rtol=1e-5, atol=0)  # float32 powers
        torch.testing.assert_close((x / s) @ (weight * s).T, x @ weight.T)


def test_half_balances_activation_and_weight():
    ranges, weight_max = ChannelRange(torch.tensor([-8.0, -1.0]), torch.tensor([2.0, 3.0])), torch.tensor([0.5, 12.0])
    s = smooth_factors(ranges, weight_max)
    torch.testing.assert_close(torch.tensor([8.0, 3.0]) / s, weight_max * s)


def test_channels_of_zeros_are_left_alone():
    ranges = ChannelRange(torch.tensor([0.0, -1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))
    assert smooth_factors(ranges, torch.tensor([2.0, 0.0, 0.0])).tolist() == [1.0, 1.0, 1.0]


def test_factors_are_bounded():
    ranges = ChannelRange(torch.zeros(2), torch.tensor([1e30, 1e-30]))
    assert smooth_factors(ranges, torch.tensor([1e-30, 1e30])).tolist() == pytest.approx([1e5, 1e-5])


def test_refusals():
    ranges = ChannelRange(torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="2 channels"):
        smooth_factors(ranges, torch.ones(3))
    with pytest.raises(ValueError, match="alpha.*1.5"):
        smooth_factors(ranges, torch.ones(2), alpha=1.5)
    with pytest.raises(ValueError, match="1 weight maxima"):
        smooth_factors(ranges, torch.tensor([1.0, float("nan")]))
