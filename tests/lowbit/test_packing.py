"""The packed byte format: worked examples, an oracle over Python integers, and the inverse."""

import pytest
import torch
from lowbit.packing import PACKABLE_BITS, pack, packed_length, unpack

# Each byte worked out by hand from "element i occupies bits i*bits and up, least significant first".
WORKED = [
    (2, [1, 2, 3, 0, 2], [0b00_11_10_01, 0b10]),
    (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),
    (3, [7, 0, 5], [0b01_000_111, 0b1]),
    (4, [0x3, 0xA, 0xF], [0xA3, 0x0F]),
    (8, [7, 255, 0], [7, 255, 0]),
]


def stream_bytes(codes, bits):
    """The row as one big integer, element i at bit i*bits, written little-endian."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


def random_codes(shape, bits, seed=0):
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize("bits, codes, expected", WORKED)
def test_worked_examples(bits, codes, expected):
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.tolist() == expected
    assert unpack(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", PACKABLE_BITS)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 8, 9, 16, 31, 64, 65])
def test_matches_the_integer_oracle_and_inverts(bits, length):
    codes = random_codes((3, length), bits, seed=length)
    packed = pack(codes, bits)
    assert packed.tolist() == [stream_bytes(row, bits) for row in codes.tolist()]
    assert packed.shape[-1] == packed_length(length, bits)
    assert torch.equal(unpack(packed, bits, length), codes)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 5), (2, 3, 4, 11), (2, 0, 3)])
def test_leading_dimensions_and_empty_tensors(bits, shape):
    codes = random_codes(shape, bits)
    packed = pack(codes, bits)
    assert packed.shape == (*shape[:-1], packed_length(shape[-1], bits)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, shape[-1]), codes)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_rows_do_not_depend_on_each_other_or_on_strides(bits):
    codes = random_codes((13, 6), bits).t()  # not contiguous
    assert torch.equal(pack(codes, bits), torch.stack([pack(row, bits) for row in codes]))
    every_other = random_codes((3, 20), bits)[:, ::2]
    assert torch.equal(unpack(pack(every_other, bits), bits, 10), every_other)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_input_is_left_alone(bits):
    codes = random_codes((4, 9), bits)
    before = codes.clone()
    packed = pack(codes, bits)
    kept = packed.clone()
    unpack(packed, bits, 9).zero_()
    assert torch.equal(codes, before) and torch.equal(packed, kept)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_code_that_does_not_fit_is_refused(bits):
    with pytest.raises(ValueError, match=f"code {2**bits} does not fit in {bits} bits"):
        pack(torch.tensor([0, 2**bits], dtype=torch.uint8), bits)


@pytest.mark.parametrize(
    "call",
    [
        lambda: pack(torch.zeros(4, dtype=torch.int64), 4),
        lambda: pack(torch.zeros((), dtype=torch.uint8), 4),
        lambda: pack(torch.zeros(4, dtype=torch.uint8), 5),
        lambda: unpack(torch.zeros(4, dtype=torch.uint8), 6, 4),
        lambda: unpack(torch.zeros(4, dtype=torch.uint8), 4, 6),
        lambda: unpack(torch.zeros(4, dtype=torch.int32), 8, 4),
        lambda: unpack(torch.zeros(0, dtype=torch.uint8), 4, -1),
    ],
)
def test_bad_arguments_are_refused_in_one_line(call):
    with pytest.raises(ValueError) as refused:
        call()
    assert "\n" not in str(refused.value)
