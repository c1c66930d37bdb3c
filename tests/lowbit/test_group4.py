"""FlexGen's 4-bit groups: error bound, tails, constant groups, size, idempotence."""

import pytest
import torch
from lowbit.group4 import compress, decompress


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def oracle(row, group):
    """One row, one group at a time, with the formula of the paper and float16 metadata."""
    out = []
    for start in range(0, len(row), group):
        part = row[start : start + group]
        low, scale = part.min().half().float(), ((part.max() - part.min()) / 15).half().float()
        codes = torch.zeros_like(part) if scale == 0 else ((part - low) / scale).round().clamp(0, 15)
        out.append(low + codes * scale)
    return torch.cat(out)


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 130])
def test_matches_the_per_group_oracle(length):
    x = normal(3, length)
    decoded = decompress(compress(x, dim=1), torch.float32)
    assert torch.equal(decoded, torch.stack([oracle(row, 64) for row in x]))


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_groups_run_along_the_given_dimension(dim):
    x = normal(5, 7, 70)
    decoded = decompress(compress(x, dim=dim, group=8), torch.float32)
    moved = x.movedim(dim, -1)
    rows = torch.stack([oracle(row, 8) for row in moved.reshape(-1, moved.shape[-1])])
    assert decoded.shape == x.shape
    assert torch.equal(decoded.movedim(dim, -1).reshape(rows.shape), rows)


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_error_is_at_most_half_a_step_plus_float16_rounding(offset):
    x = normal(16, 256) + offset
    compressed = compress(x, dim=1)
    low, high = x.unflatten(1, (4, 64)).aminmax(dim=-1)
    half_ulp = 2.0**-11  # float16 keeps 11 significant bits; rounding moves a value by at most this fraction
    bound = compressed.scale.float() / 2 + half_ulp * (low.abs() + (high - low)) + 1e-6  # + float32 arithmetic on ~50
    error = (decompress(compressed, torch.float32) - x).abs().unflatten(1, (4, 64)).amax(dim=-1)
    assert (error <= bound).all()


def test_constant_groups_decode_to_the_constant():
    x = torch.cat([torch.full((2, 64), 0.5), torch.zeros(2, 64), normal(2, 10)], dim=1)
    decoded = decompress(compress(x, dim=1), torch.float32)
    assert torch.equal(decoded[:, :128], x[:, :128])


def test_compressing_again_changes_nothing():
    once = decompress(compress(normal(8, 200), dim=1), torch.float32)
    again = decompress(compress(once, dim=1), torch.float32)
    assert torch.equal(again, once)


def test_bits_per_element_are_the_papers():
    assert compress(normal(32, 128), dim=1).bits_per_element == 4.5
    assert compress(normal(32, 128), dim=1, group=128).bits_per_element == 4.25
    # 5 codes take 3 bytes, one scale and one minimum 4 more
    assert compress(normal(1, 5), dim=1).bits_per_element == 8 * 7 / 5


def test_dtype_follows_the_caller():
    decoded = decompress(compress(normal(4, 64).bfloat16(), dim=0), torch.bfloat16)
    assert decoded.dtype == torch.bfloat16 and decoded.shape == (4, 64)


@pytest.mark.parametrize(
    "x, dim, group",
    [
        (torch.zeros(4, dtype=torch.int32), 0, 64),
        (torch.zeros(0, 4), 0, 64),
        (torch.zeros(4), 1, 64),
        (torch.zeros(4), 0, 0),
        (torch.tensor([1e6, 0.0]), 0, 64),
        (torch.tensor([-1e6, 0.0]), 0, 64),
        (torch.tensor([float("nan"), 0.0]), 0, 64),
    ],
)
def test_bad_input_is_refused_in_one_line(x, dim, group):
    with pytest.raises(ValueError) as refused:
        compress(x, dim=dim, group=group)
    assert "\n" not in str(refused.value)


def test_meta_tensor_gives_the_shapes():
    real, shapes = compress(normal(6, 100), dim=0), compress(torch.empty(6, 100, device="meta"), dim=0)
    assert (shapes.packed.shape, shapes.scale.shape) == (real.packed.shape, real.scale.shape) == ((100, 3), (100, 1))
