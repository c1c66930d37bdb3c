"""The sparse codecs against loops over single weights, their inverses, and what they refuse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from lowbit.packing import pack
from lowbit.sparse import (
    bitmask_decode,
    bitmask_encode,
    group_counts,
    index_bytes,
    mask_pack,
    mask_unpack,
    nm_decode,
    nm_encode,
    slots_per_row,
)

SHAPES = [(1, 1), (1, 8), (3, 13), (5, 16), (4, 31), (2, 64)]
KEEPS = [(1, 2), (2, 4), (4, 8), (1, 3), (3, 5), (7, 16), (15, 16)]
FORMAT = Path(__file__).resolve().parents[2] / "docs" / "format.md"


def random_mask(shape, share=0.5, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def random_weight(shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stream_bytes(elements, bits):
    """A row as one big integer, element i at bit i*bits, written little-endian."""
    number = sum(int(e) << (i * bits) for i, e in enumerate(elements))
    return list(number.to_bytes(-(-len(elements) * bits // 8), "little"))


def thinned(kept, n, m):
    """The mask with the last entries of each crowded group taken out, one group at a time; tails keep ceil(n t / m)."""
    out = kept.clone()
    for row in out:
        for start in range(0, kept.shape[1], m):
            size = min(m, kept.shape[1] - start)
            for c in [c for c in range(start, start + size) if row[c]][-(-n * size // m) :]:
                row[c] = False
    return out


def slots_by_hand(weight, kept, n, m):
    """(values, indices) of every row, a group at a time, the first unused positions as filler."""
    values, indices = [], []
    for row, mask in zip(weight.tolist(), kept.tolist()):
        vs, js = [], []
        for start in range(0, len(row), m):
            size = min(m, len(row) - start)
            used = [j for j in range(size) if mask[start + j] and row[start + j] != 0]
            unused = [j for j in range(size) if j not in used]
            for j in sorted(used + unused[: -(-n * size // m) - len(used)]):
                vs.append(row[start + j] if j in used else 0.0)
                js.append(j)
        values.append(vs)
        indices.append(js)
    return values, indices


def is_negative_zero(t):
    return (t == 0) & torch.signbit(t)


# --- the bitmask


@pytest.mark.parametrize("shape", [*SHAPES, (2, 0), (0, 9)])
def test_masks_are_one_bit_a_channel(shape):
    kept = random_mask(shape)
    packed = mask_pack(kept)
    assert packed.dtype == torch.uint8 and packed.shape == (shape[0], -(-shape[1] // 8))
    assert packed.tolist() == [stream_bytes(row, 1) for row in kept.tolist()]
    assert torch.equal(mask_unpack(packed, shape[1]), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 0), (0, 9)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_bitmask_stores_the_kept_row_after_row_and_gives_them_back(share, shape, dtype):
    W, kept = random_weight(shape, dtype), random_mask(shape, share)
    values, mask = bitmask_encode(W, kept)
    assert values.dtype == dtype
    assert values.tolist() == [w for row, keeps in zip(W.tolist(), kept.tolist()) for w, k in zip(row, keeps) if k]
    again = bitmask_decode(values, mask, channels=shape[1])
    assert again.dtype == dtype and torch.equal(again, torch.where(kept, W, 0))


def test_rows_without_a_value_and_full_rows():
    W = random_weight((4, 11))
    kept = torch.tensor([False, True, False, True]).unsqueeze(1).expand(4, 11)
    values, mask = bitmask_encode(W, kept)
    assert values.numel() == 22 and mask[0].tolist() == [0, 0] and mask[1].tolist() == [255, 7]
    assert torch.equal(bitmask_decode(values, mask, channels=11), W * kept)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bitmask_of_codes_fills_in_the_zero_points(bits):
    codes = torch.randint(0, 2**bits, (5, 13), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    zeros = [0, 1, 2, 3, 1]
    zero = torch.tensor(zeros, dtype=torch.uint8).unsqueeze(1)
    kept = random_mask((5, 13))
    values, mask = bitmask_encode(codes, kept, blank=zero)
    assert values.numel() == int((kept & (codes != zero)).sum())  # a code on its zero point is a zero weight
    expected = [[c if k else z for c, k in zip(*rows)] for *rows, z in zip(codes.tolist(), kept.tolist(), zeros)]
    assert bitmask_decode(values, mask, channels=13, blank=zero).tolist() == expected


# --- n of m


@pytest.mark.parametrize("keep", KEEPS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 9), (3, 0)])
def test_slots_equal_a_loop_over_groups_and_give_the_weight_back(shape, keep):
    n, m = keep
    W = random_weight(shape)
    for share in (0.0, 0.2, 0.6, 1.0):
        kept = thinned(random_mask(shape, share), n, m)
        values, indices = nm_encode(W, kept, keep)
        expected_values, expected_indices = slots_by_hand(W, kept, n, m)
        assert values.shape == (shape[0], slots_per_row(shape[1], keep)) and values.tolist() == expected_values
        assert indices.shape == (shape[0], index_bytes(shape[1], keep))
        assert indices.tolist() == [stream_bytes(row, (m - 1).bit_length()) for row in expected_indices]
        again = nm_decode(values, indices, channels=shape[1], keep=keep)
        assert torch.equal(again, torch.where(kept, W, 0)) and not is_negative_zero(again).any()


@pytest.mark.parametrize("keep", [(2, 4), (4, 8), (1, 2)], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_slots_of_codes_fill_up_with_the_zero_points(bits, keep):
    shape, (n, m) = (6, 27), keep
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(9), dtype=torch.uint8)
    kept = thinned(random_mask(shape, 0.3), n, m)
    values, indices = nm_encode(codes, kept, keep, blank=zero)
    assert values.dtype == torch.uint8
    again = nm_decode(values, indices, channels=27, keep=keep, blank=zero)
    assert torch.equal(again, torch.where(kept, codes, zero))


def test_a_group_that_keeps_less_fills_up_with_its_first_unused_positions():
    W = torch.tensor([[0.0, 0, 0, 5, 0, 0, 0, 0, 0, 7, 8, 0]])
    values, indices = nm_encode(W, W != 0, (2, 4))
    assert values.tolist() == [[0, 5, 0, 0, 7, 8]]
    assert indices.tolist() == [stream_bytes([0, 3, 0, 1, 1, 2], 2)]


@pytest.mark.parametrize("length, keep, slots", [(9, (2, 4), 5), (10, (2, 4), 5), (11, (2, 4), 6), (7, (1, 8), 1)])
def test_a_tail_of_t_channels_has_its_share_rounded_up(length, keep, slots):
    assert slots_per_row(length, keep) == slots


def test_group_counts_count():
    kept = torch.tensor([[True, True, True, False, True, False], [False] * 6])
    counts, most = group_counts(kept, (2, 4))
    assert counts.tolist() == [[3, 1], [0, 0]] and most.tolist() == [2, 1]


# --- zeros, strides, what is refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_negative_zero_is_no_value_and_does_not_come_back(dtype):
    W = torch.tensor([[-0.0, 1.0, -0.0, -2.0], [0.0, -0.0, 3.0, -0.0]], dtype=dtype)
    kept = torch.ones(2, 4, dtype=torch.bool)
    values, mask = bitmask_encode(W, kept)
    assert values.tolist() == [1, -2, 3]
    slots, indices = nm_encode(W, kept, (2, 4))  # keeps all four, but two of them are zero
    for again in (bitmask_decode(values, mask, channels=4), nm_decode(slots, indices, channels=4, keep=(2, 4))):
        assert torch.equal(again, W) and not is_negative_zero(again).any()


def test_strides_do_not_matter_and_inputs_are_left_alone():
    W, kept = random_weight((13, 6)).t(), thinned(random_mask((13, 6)).t(), 2, 4)
    before = W.clone(), kept.clone()
    for encode in (bitmask_encode, lambda w, k: nm_encode(w, k, (2, 4))):
        for a, b in zip(encode(W, kept), encode(W.contiguous(), kept.contiguous()), strict=True):
            assert torch.equal(a, b) and a.is_contiguous()
    assert torch.equal(W, before[0]) and torch.equal(kept, before[1])


def packed_nm(row, m=4):
    return pack(torch.tensor([row], dtype=torch.uint8), (m - 1).bit_length())


KEPT = torch.tensor([[True, False, True], [False, False, True]])
BAD = {
    "a number of values that is not the mask's": lambda: bitmask_decode(torch.ones(2), mask_pack(KEPT), channels=3),
    "a mask with bits beyond the row": lambda: bitmask_decode(torch.ones(1), torch.tensor([[8]]).byte(), channels=3),
    "a mask of another length": lambda: mask_unpack(torch.zeros(2, 2, dtype=torch.uint8), 8),
    "a mask that is no bytes": lambda: mask_unpack(torch.zeros(2, 1, dtype=torch.int32), 8),
    "a mask to pack that is not bool": lambda: mask_pack(torch.ones(2, 3)),
    "a mask of another shape": lambda: bitmask_encode(torch.ones(2, 4), KEPT),
    "a mask that is not bool": lambda: nm_encode(torch.ones(2, 3), KEPT.byte(), (2, 4)),
    "a crowded group": lambda: nm_encode(torch.ones(1, 8), torch.ones(1, 8, dtype=torch.bool), (2, 4)),
    "a crowded tail": lambda: nm_encode(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), (2, 4)),
    "a position twice": lambda: nm_decode(torch.ones(1, 2), packed_nm([1, 1]), channels=4, keep=(2, 4)),
    "positions that descend": lambda: nm_decode(torch.ones(1, 2), packed_nm([2, 1]), channels=4, keep=(2, 4)),
    "a position beyond the group": lambda: nm_decode(torch.ones(1, 1), packed_nm([3], 3), channels=3, keep=(1, 3)),
    "a position beyond the tail": lambda: nm_decode(torch.ones(1, 1), packed_nm([2]), channels=2, keep=(2, 4)),
    "another number of slots": lambda: nm_decode(torch.ones(1, 3), packed_nm([0, 1]), channels=4, keep=(2, 4)),
    "indices of another length": lambda: nm_decode(torch.ones(1, 2), packed_nm([0] * 5), channels=4, keep=(2, 4)),
    "all of m": lambda: slots_per_row(8, (4, 4)),
    "none of m": lambda: slots_per_row(8, (0, 4)),
    "groups above sixteen": lambda: slots_per_row(64, (4, 32)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_and_corrupt_bytes_are_refused_in_one_line(case):
    with pytest.raises(ValueError) as refused:
        BAD[case]()
    assert "\n" not in str(refused.value)


def test_a_crowded_group_is_named():
    kept = torch.zeros(3, 12, dtype=torch.bool)
    kept[1, 5:8] = True
    with pytest.raises(ValueError, match="row 1, group 1 keeps 3, 2:4 has 2 slots"):
        nm_encode(torch.ones(3, 12), kept, (2, 4))


# --- the document


def example(title):
    """The fenced block after `title` in docs/format.md: {name: words of its line}."""
    text = FORMAT.read_text(encoding="utf8").split(title, 1)[1]
    lines = re.search(r"```\n(.*?)```", text, re.S)[1].splitlines()
    return {name.strip(): content.split() for name, content in (line.split(":", 1) for line in lines)}


def numbers(words):
    return [float(w) for w in words]


def octets(words):
    return [int(w, 16) for w in words]


def test_the_bitmask_example_of_the_document():
    said = example("### Bitmask")
    W = torch.tensor([numbers(said["row 0"]), numbers(said["row 1"])])
    values, mask = bitmask_encode(W, W != 0)
    assert values.tolist() == numbers(said["values"])
    assert mask.flatten().tolist() == octets(said["mask bytes"])
    codes, zero = torch.tensor([[int(w) for w in said[k]] for k in ("codes 0", "codes 1")]).byte(), int(said["zero"][0])
    stored, _ = bitmask_encode(codes, W != 0, blank=zero)
    assert pack(stored, 4).tolist() == octets(said["code bytes"])


def test_the_n_of_m_example_of_the_document():
    said = example("### Keep n of m")
    W = torch.tensor([numbers(said["row"])])
    values, indices = nm_encode(W, W != 0, (2, 4))
    assert values.flatten().tolist() == numbers(said["values"])
    assert indices.flatten().tolist() == octets(said["index bytes"])
    assert slots_by_hand(W, W != 0, 2, 4)[1] == [[int(i) for i in said["indices"]]]
