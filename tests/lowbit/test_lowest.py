"""The choice of the smallest scores: the compiled library and the PyTorch form against a stable sort."""

import math

import lowbit
import pytest
import torch
from lowbit.cpu import native
from lowbit.cpu.lowest import lowest as native_lowest

needs_library = pytest.mark.skipif(native.library() is None, reason="lowbit's C++ library is not built here")


def oracle(score, count):
    """Python's sort is stable and compares floats by value: -0 equals 0."""
    values = score.flatten().tolist()
    chosen = sorted(range(len(values)), key=values.__getitem__)[: max(count, 0)]
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[chosen] = True
    return mask.view(score.shape)  # [n] -> score's shape


def from_bits(bits):
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def cases():
    gen = torch.Generator().manual_seed(0)
    some = torch.randn(37, 53, generator=gen)
    few = torch.randint(-2, 3, (37, 53), generator=gen).float()
    digits = torch.randint(0, 1 << 21, (999,), generator=gen)
    infinite = some.clone()
    infinite[3::4], infinite[1::5] = math.inf, -math.inf
    tiny = torch.finfo(torch.float32).smallest_normal
    return {
        "positive": some.square(),
        "both signs": some,
        "negative": -some.abs(),
        "many ties": few,
        "all equal": torch.full((7, 11), 0.25),
        "infinities": infinite,
        "all infinite": torch.full((5, 3), math.inf),
        "both zeros": torch.where(some > 0, 0.0, -0.0),
        "both zeros among others": few * torch.where(some > 0, 1.0, -1.0),
        "the ends of the range": torch.tensor([3.4028235e38, -3.4028235e38, math.inf, -math.inf, 1.0, -1.0] * 3),
        "subnormal": some * tiny / 8,
        # Ordered bits are read in digits of 11, 11 and 10: these differ only in the later two, in the last, or in the middle.
        "one first digit": from_bits((0x3F800000 | digits).tolist()),
        "one first digit, negative": -from_bits((0x3F800000 | digits).tolist()),
        "two equal digits": from_bits((0x3F8AAC00 | digits & 1023).tolist()),
        "two equal digits, negative": -from_bits((0x3F8AAC00 | digits & 1023).tolist()),
        "a few of the middle digit": from_bits((0x3F800000 | (digits & 7) << 10).tolist()),
        "one element": torch.tensor([[2.0]]),
        "no dimension": torch.tensor(3.0),
        "vector": some[0],
        "one column": some[:, :1],
        "one row": some[:1],
        "three dimensions": some.view(37, 53, 1).expand(37, 53, 2),
        "columns of a wider matrix": some[:, 5:34],
        "few columns of a wider matrix": few[3:, 50:],
        "transposed": few.t(),
        "every second column": few[:, ::2],
        "equal rows": few[:1].expand(9, 53),
        "empty": torch.empty(0, 4),
    }


CASES = cases()


def check(score, count):
    before = score.clone()
    # float64 holds every float32, so that the order is the same; it goes the way of a machine without the library.
    for given in (score, score.double()):
        found = lowbit.lowest(given, count)
        assert found.dtype == torch.bool and found.is_contiguous()
        assert torch.equal(found, oracle(score, count))
    assert torch.equal(score, before)


@pytest.mark.parametrize("name", CASES)
def test_is_a_stable_sort(name):
    score = CASES[name]
    n = score.numel()
    for count in sorted({-3, 0, 1, 2, n // 3, n // 2, n - 2, n - 1, n, n + 1, 1 << 70}):
        check(score, count)


def test_every_count():
    score = torch.tensor([[1, -0.0, 2, 0.0], [-math.inf, 1, 1, math.inf], [0, -1, math.inf, 2]])
    for count in range(13):
        check(score, count)


def large(kind):
    """As many scores as several threads share, and no whole number of them for each."""
    gen = torch.Generator().manual_seed(1)
    normal = torch.randn(1536, 577, generator=gen)
    return {"normal": normal, "ties": (normal * 2).round(), "equal": torch.ones(1536, 577)}[kind][:, :576]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["normal", "ties", "equal"])
def test_threads_change_nothing(kind, threads):
    score = large(kind)
    n = score.numel()
    order = score.flatten().sort(stable=True).indices
    for count in (1, n // 3, n // 2, n - 1):
        expected = torch.zeros(n, dtype=torch.bool)
        expected[order[:count]] = True
        for number in (1, 2, 3, 7):
            threads(number)
            for given in (score, score.contiguous()):
                assert torch.equal(lowbit.lowest(given, count), expected.view(score.shape))  # [n] -> [1536, 576]


@needs_library
def test_the_public_function_runs_the_library(monkeypatch):
    score = CASES["many ties"]
    monkeypatch.setattr(torch.Tensor, "kthvalue", None)
    assert torch.equal(lowbit.lowest(score, 700), native_lowest(score, 700))


@needs_library
def test_a_flushed_subnormal_is_still_a_number():
    score = CASES["subnormal"]
    expected = oracle(score, 800)
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine does not flush subnormals")
    try:
        found = lowbit.lowest(score, 800)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    score = CASES["both signs"].to(dtype)
    assert torch.equal(lowbit.lowest(score, 1000), oracle(score, 1000))


def test_bad_input_is_refused_in_one_line():
    for score, count, message in (
        (torch.ones(3, dtype=torch.int32), 1, "score must be floating point, got torch.int32"),
        (torch.ones(3), 1.5, "count must be a whole number, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            lowbit.lowest(score, count)
        assert "\n" not in str(caught.value)
