"""Factors that share a channel's size between activation and weight."""

import pytest
import torch

from rptq import balance_factors


def error(energy, weight_energy, s):
    """What rounding makes of a tile whose error is spread evenly, up to a constant (the docstring's product)."""
    return float((energy / s.square()).sum() * (weight_energy * s.square()).sum())


@pytest.mark.parametrize("seed", range(5))
def test_no_other_factors_do_better(seed):
    random = torch.Generator().manual_seed(seed)
    energy, weight_energy = (torch.randn(64, generator=random).mul(3).exp() for _ in range(2))
    s = balance_factors(energy, weight_energy)
    best = float((energy * weight_energy).sqrt().sum()) ** 2  # Cauchy-Schwarz
    assert error(energy, weight_energy, s) == pytest.approx(best, rel=1e-5)
    assert best < error(energy, weight_energy, torch.ones(64))
    assert float(s.log2().mean()) == pytest.approx(0, abs=1e-5)


def test_dead_channels_keep_their_scale_and_do_not_move_others():
    energy, weight_energy = torch.tensor([16.0, 0.0, 1.0, 5.0]), torch.tensor([1.0, 3.0, 16.0, 0.0])
    assert balance_factors(energy, weight_energy).tolist() == [2.0, 1.0, 0.5, 1.0]
    assert balance_factors(torch.zeros(3), torch.ones(3)).tolist() == [1.0] * 3


def test_what_is_no_energy_is_refused():
    with pytest.raises(ValueError, match="must both be"):
        balance_factors(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="1 energies are negative or not finite"):
        balance_factors(torch.tensor([1.0, float("nan")]), torch.ones(2))
