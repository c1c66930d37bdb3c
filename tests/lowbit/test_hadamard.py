"""Block Hadamard transforms against the definition."""

import pytest
import torch
from lowbit.hadamard import additions, largest_block, rotate


def definition(block):
    """Sylvester's matrix by its formula: entry (i, j) is (-1)^popcount(i & j) / sqrt(n)."""
    return torch.tensor([[(-1) ** (i & j).bit_count() / block**0.5 for j in range(block)] for i in range(block)])


@pytest.mark.parametrize("block", [1, 2, 8, 64])
def test_every_block_is_turned_by_the_matrix(block):
    x = torch.randn(3, 2, 3 * block, generator=torch.Generator().manual_seed(block))
    turned = rotate(x, block)
    for i in range(3):
        columns = slice(i * block, (i + 1) * block)
        torch.testing.assert_close(turned[..., columns], x[..., columns] @ definition(block))


@pytest.mark.parametrize("block", [2, 16])
def test_it_is_its_own_inverse_and_keeps_products(block):
    random = torch.Generator().manual_seed(0)
    x, W = torch.randn(5, 48, generator=random), torch.randn(7, 48, generator=random)
    torch.testing.assert_close(rotate(rotate(x, block), block), x)
    torch.testing.assert_close(rotate(x, block) @ rotate(W, block).T, x @ W.T, rtol=1e-4, atol=1e-4)  # float32 sums


def test_an_outlier_is_spread_over_its_block():
    x = torch.zeros(1, 128)
    x[0, 5] = 80.0
    turned = rotate(x, 64)
    assert turned[0, :64].abs().eq(10.0).all() and turned[0, 64:].eq(0).all()


def test_dtype_is_kept_and_an_empty_batch_stays_empty():
    assert rotate(torch.ones(2, 8, dtype=torch.bfloat16), 4).dtype == torch.bfloat16
    assert rotate(torch.zeros(0, 8), 4).shape == (0, 8)


@pytest.mark.parametrize("block", [4, 12, 20, 28, 36, 44, 60, 108, 576, 768])
def test_matrices_of_other_orders_are_hadamard_too(block):
    H = rotate(torch.eye(block), block) * block**0.5
    torch.testing.assert_close(H.abs(), torch.ones(block, block))
    torch.testing.assert_close(H @ H.T, block * torch.eye(block), rtol=0, atol=1e-3)  # sums of 768 ones


# Hidden and inner widths of OPT, LLaMA and SmolLM2; 11008 = 2^8 * 43 would need an order that Paley does not give.
@pytest.mark.parametrize(
    "channels, block",
    [(576, 576), (768, 768), (1536, 1536), (5120, 5120), (7168, 7168), (14336, 14336), (11008, 256), (7, 1)],
)
def test_the_largest_block_of_known_widths(channels, block):
    assert largest_block(channels) == block


@pytest.mark.parametrize("block", [0, 3, 16])
def test_a_block_that_does_not_fit_is_refused(block):
    with pytest.raises(ValueError, match=f"blocks of {block} do not fit 24 channels; use 24"):
        rotate(torch.zeros(1, 24), block)


@pytest.mark.parametrize(
    "channels, block, expected", [(128, 64, 128 * 6), (8, 1, 0), (24, 12, 24 * 11), (96, 48, 96 * (2 + 11))]
)
def test_additions_are_those_of_the_fast_transform(channels, block, expected):
    assert additions(channels, block) == expected
