"""Which clusters have 8 bits: a share of each site's, or the costliest of a block."""

from __future__ import annotations

import pytest
import torch
from lowbit.modules import ActivationQuantizer, Linear
from torch import nn

from ptq.sites import InputSite
from ptq.wide import costliest, rounding_costs, widest


@pytest.mark.parametrize(
    "sizes, share, expected", [([64] * 9, 0.125, 1), ([64] * 24, 0.125, 3), ([10, 64], 0.125, 1), ([64] * 4, 0.0, 0)]
)
def test_the_widest_tiles_of_a_site(sizes, share, expected):
    bits = widest(torch.tensor(sizes), 4, share)
    assert bits.tolist() == [4] * (len(sizes) - expected) + [8] * expected
    assert widest(torch.tensor(sizes), 16, share).eq(16).all()


def test_the_costliest_tiles_of_a_block():
    costs = {"R1": torch.tensor([0.1, 0.5, 0.2]), "R5": torch.tensor([0.5, 0.3, 0.6, 0.0])}
    bits = {"R1": torch.full((3,), 4), "R5": torch.full((4,), 3)}
    assert {n: w.tolist() for n, w in costliest(costs, bits, 2 / 7).items()} == {"R1": [4, 8, 4], "R5": [3, 3, 8, 3]}
    assert {n: w.tolist() for n, w in costliest(costs, bits, 0).items()} == {"R1": [4] * 3, "R5": [3] * 4}
    assert torch.cat(list(costliest(costs, bits, 0.01).values())).eq(8).sum() == 1


def test_a_cost_is_what_rounding_the_cluster_does_to_the_output():
    generator = torch.Generator().manual_seed(0)
    C, sizes = 24, torch.tensor([8, 4, 12])
    x = torch.randn(50, C, generator=generator) * torch.linspace(0.1, 3, C)
    block = nn.ModuleDict({"a": Linear(C, 16, bias=False), "b": Linear(C, 8, bias=False)})
    # Orthogonal columns: then the errors of channels do not meet in the output, as the formula assumes.
    W = torch.linalg.qr(torch.randn(24, C, generator=generator)).Q * torch.linspace(2, 1, C)
    block["a"].weight, block["b"].weight = W[:16], W[16:]
    quantizer = ActivationQuantizer.tiles(torch.tensor([4, 3, 4]), sizes)
    costs = rounding_costs(block, InputSite("R1", ("a", "b"), None), x, quantizer)
    for g, channels in enumerate(torch.arange(C).split(sizes.tolist())):
        rounded = x.clone()
        rounded[:, channels] = quantizer(x)[:, channels]
        expected = ((rounded - x) @ W.t()).square().sum() / (x @ W.t()).square().sum()
        assert float(costs[g]) == pytest.approx(float(expected), rel=1e-4)  # float32 products


def test_a_site_without_signal_costs_nothing():
    block = nn.ModuleDict({"a": Linear(4, 2, bias=False)})
    quantizer = ActivationQuantizer.tiles(torch.tensor([4]), torch.tensor([4]))
    assert rounding_costs(block, InputSite("R1", ("a",), None), torch.zeros(3, 4), quantizer).tolist() == [0.0]
