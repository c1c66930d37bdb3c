"""Clipped ranges against the definition of their error."""

import pytest
import torch

from rptq import ChannelRange, clip_ranges, fake_quantize, fit_grid, update

SIZES = torch.tensor([1, 3, 4])


def heavy_tailed(seed=0, tokens=400):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 8, generator=random) ** 3 * torch.logspace(-1, 1, 8)


def error_by_cluster(x, ranges, bits, weight):
    by_channel = (fake_quantize(x, fit_grid(ranges, SIZES, bits)) - x).square().sum(0) * weight
    return torch.stack([part.sum() for part in by_channel.split(SIZES.tolist())])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_cluster_s_error_rises_and_heavy_tails_gain(bits, weighted):
    x = heavy_tailed()
    ranges = update(None, x)
    weight = torch.linspace(0.1, 3, 8) if weighted else torch.ones(8)
    clipped = clip_ranges(ranges, x, SIZES, bits, weight=weight if weighted else None)
    before, after = (error_by_cluster(x, r, bits, weight) for r in (ranges, clipped))
    assert (after <= before * (1 + 1e-6)).all()  # float32 sums
    if bits <= 4:
        assert (after < 0.95 * before).all()
    assert (clipped.min >= ranges.min).all() and (clipped.max <= ranges.max).all()


def test_the_result_is_near_the_best_of_a_fine_search():
    x = heavy_tailed()[:, :1]
    one, ranges = torch.tensor([1]), update(None, heavy_tailed()[:, :1])

    def error(low, high):
        grid = fit_grid(ChannelRange(low, high), one, 3)
        return float((fake_quantize(x, grid) - x).square().sum())

    shares = torch.linspace(0.05, 1, 60)
    best = min(error(ranges.min * a, ranges.max * b) for a in shares for b in shares)
    clipped = clip_ranges(ranges, x, one, 3)
    assert error(clipped.min, clipped.max) < 1.1 * best


def test_each_cluster_may_have_bits_of_its_own():
    x = heavy_tailed()
    bits = torch.tensor([4, 2, 8])
    both = clip_ranges(update(None, x), x, SIZES, bits)
    for g, columns in enumerate((slice(0, 1), slice(1, 4), slice(4, 8))):
        part = x[:, columns]
        alone = clip_ranges(update(None, part), part, SIZES[g : g + 1], int(bits[g]))
        assert torch.equal(both.min[columns], alone.min) and torch.equal(both.max[columns], alone.max)


def test_what_is_uniform_or_constant_keeps_its_range():
    x = torch.cat([torch.linspace(-1, 1, 101)[:, None].expand(-1, 4), torch.full((101, 4), 7.0)], dim=1)
    ranges = update(None, x)
    clipped = clip_ranges(ranges, x, SIZES, 8)
    assert torch.equal(clipped.min, ranges.min) and torch.equal(clipped.max, ranges.max)


def test_an_offset_range_is_not_stretched_to_zero():
    x = 100 + heavy_tailed()
    ranges = update(None, x)
    clipped = clip_ranges(ranges, x, SIZES, 4)
    assert (clipped.min >= ranges.min).all() and (clipped.max > clipped.min).all()


def test_a_sample_that_does_not_fit_is_refused():
    x = heavy_tailed()
    with pytest.raises(ValueError, match="does not fit ranges of 8 channels"):
        clip_ranges(update(None, x), x[:, :5], SIZES, 4)
