import pytest
import torch

from rptq import ChannelRange, update


def test_running_range_equals_the_range_of_all_tokens():
    x = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0))
    ranges = None
    for sample in x:
        ranges = update(ranges, sample)
    flat = x.reshape(-1, 3)
    assert torch.equal(ranges.min, flat.min(0).values) and torch.equal(ranges.max, flat.max(0).values)
    whole = update(None, x)
    assert torch.equal(ranges.min, whole.min) and torch.equal(ranges.max, whole.max)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_exactly(dtype):
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    ranges = update(None, x)
    assert ranges.min.dtype == torch.float32
    assert torch.equal(ranges.max, x.float().amax(0))


def test_no_tokens_change_nothing():
    # A zero row in the calibration set once pulled every range towards zero; no row must do nothing at all.
    before = update(None, torch.tensor([[1.0, 2.0]]))
    assert update(before, torch.empty(4, 0, 2)) is before
    assert update(None, torch.empty(0, 2)) is None


def test_one_channel_and_one_token():
    ranges = update(None, torch.tensor([-3.0]))
    assert ranges.min.tolist() == ranges.max.tolist() == [-3.0]


def test_bad_values_are_counted():
    x = torch.zeros(4, 3)
    x[0, 1], x[2, 1], x[3, 2] = float("nan"), float("inf"), -float("inf")
    with pytest.raises(ValueError, match=r"3 NaN or infinite values, in 2 of 3 channels \(1, 2\)"):
        update(None, x)
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        update(None, torch.tensor([[1e300, 0.0]], dtype=torch.float64))


def test_channel_counts_must_agree():
    ranges = update(None, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="4 channels.*3"):
        update(ranges, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="3 and 4"):
        ranges.merge(update(None, torch.zeros(2, 4)))


def test_inverted_range_is_refused():
    with pytest.raises(ValueError, match="channels 1"):
        ChannelRange(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]))


def test_permuted_is_the_range_of_the_permuted_activation():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    perm = torch.tensor([3, 0, 4, 1, 2])
    ranges, expected = update(None, x).permuted(perm), update(None, x[:, perm])
    assert torch.equal(ranges.min, expected.min) and torch.equal(ranges.max, expected.max)
