"""H = sum x x^T, of which only one half is computed."""

from __future__ import annotations

import pytest
import torch
from lowbit.gram import PANELS, panels

from ptq.gram import Gram

CPU = torch.device("cpu")


def batches(channels):
    """Three micro-batches of different shapes, 23 tokens in all, with channels a thousand times wider than others."""
    generator = torch.Generator().manual_seed(channels)
    wide = torch.logspace(-1.5, 1.5, channels)
    return [torch.randn(*shape, channels, generator=generator) * wide for shape in ((2, 5), (1, 6), (7,))]


@pytest.mark.parametrize("channels", [1, 63, 64, 65, 520])
def test_it_is_the_sum_of_outer_products(channels):
    gram, expected = Gram(channels, CPU), torch.zeros(channels, channels, dtype=torch.float64)
    for x in batches(channels):
        gram.add(x)
        for token in x.reshape(-1, channels).double():
            expected += torch.outer(token, token)
    H, tokens = gram.take()
    assert H.dtype == torch.float32 and tokens == 2 * 5 + 6 + 7
    assert torch.equal(H, H.T)
    scale = expected.diagonal().sqrt()
    # 23 products of float32, added one after the other, round by at most 24 halves of 2^-23 of what Cauchy-Schwarz allows
    assert float(((H - expected) / torch.outer(scale, scale)).abs().max()) < 24 * 2**-24


@pytest.mark.parametrize("channels", [1, 63, 64, 65, 511, 512, 513, 520, 4096, 11008])
def test_the_panels_are_the_columns_each_once(channels):
    found = panels(channels)
    assert [i for p in found for i in range(p.start, p.stop)] == list(range(channels))
    assert len(found) <= PANELS and all(p.stop - p.start >= 64 for p in found[:-1])


def test_half_precision_is_summed_in_float32():
    x = torch.full((3000, 2), 0.1, dtype=torch.bfloat16)
    gram = Gram(2, CPU)
    gram.add(x)
    H, _ = gram.take()
    # 3000 sums of float32 round by 3000 x 2^-24 at the most; in bfloat16 the sum would stop growing long before
    torch.testing.assert_close(H, torch.full((2, 2), 3000 * float(x[0, 0]) ** 2), rtol=3000 * 2**-24, atol=0)


def test_no_token_gives_zeros():
    H, tokens = Gram(3, CPU).take()
    assert tokens == 0 and torch.equal(H, torch.zeros(3, 3))
    gram = Gram(3, CPU)
    gram.add(torch.zeros(0, 3))
    assert gram.take()[1] == 0


def test_what_went_in_stays_as_it_was():
    x = torch.randn(4, 70)
    before = x.clone()
    gram = Gram(70, CPU)
    gram.add(x)
    gram.take()
    assert torch.equal(x, before)
