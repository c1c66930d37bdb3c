"""x^T x, one half: the kernel and the plain form against float64."""

import lowbit
import pytest
import torch
from lowbit.cpu import native

# A token, ragged panels, whole panels, more tokens than are summed at a time.
SHAPES = [(1, 1), (3, 5), (7, 24), (130, 25), (128, 48), (300, 100), (257, 131)]


@pytest.fixture(params=["plain", "native"])
def form(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(native, "fast_avx2", lambda: False)
    elif not native.fast_avx2():
        pytest.skip("here no kernel is faster than PyTorch's products")


def inputs(T, C, seed=0):
    return torch.randn(T, C, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_upper_half_is_the_formula(shape, form):
    T, C = shape
    upper = torch.ones(C, C, dtype=torch.float64)
    parts = inputs(T, C), inputs(2 * T, C, seed=1)
    for x in parts:
        lowbit.add_gram(upper, x)
    x = torch.cat(parts).double()
    # A float32 sum of n products is off by at most n rounding errors of the sum of their magnitudes.
    bound = 2 * T * torch.finfo(torch.float32).eps * (x.abs().t() @ x.abs())
    assert ((upper - 1 - x.t() @ x).abs() <= bound).triu().sum() == C * (C + 1) // 2


def test_nothing_is_added_for_no_tokens(form):
    upper = torch.ones(3, 3, dtype=torch.float64)
    lowbit.add_gram(upper, torch.empty(0, 3))
    assert torch.equal(upper.triu(), torch.ones(3, 3, dtype=torch.float64).triu())


def test_inputs_need_not_be_contiguous(form):
    x = inputs(50, 80)
    found, expected = (torch.zeros(40, 40, dtype=torch.float64) for _ in range(2))
    lowbit.add_gram(found, x[:, ::2])
    lowbit.add_gram(expected, x[:, ::2].contiguous())
    assert torch.equal(found.triu(), expected.triu())


def test_threads_change_nothing(form):
    if not native.fast_avx2():
        pytest.skip("PyTorch promises no such thing of its own products")
    x, before = inputs(300, 90), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(torch.zeros(90, 90, dtype=torch.float64))
            lowbit.add_gram(found[-1], x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_show(value, form):
    x = torch.ones(5, 30)
    x[2, 7] = value
    upper = torch.zeros(30, 30, dtype=torch.float64)
    lowbit.add_gram(upper, x)
    assert not torch.isfinite(upper[7, 7:]).any() and not torch.isfinite(upper[:8, 7]).any()
    assert torch.equal(upper[8:, 8:].triu(), torch.full((22, 22), 5.0, dtype=torch.float64).triu())


@pytest.mark.parametrize(
    ("upper", "x", "said"),
    [
        (torch.zeros(3, 3), torch.zeros(2, 3), "upper must be contiguous float64"),
        (torch.zeros(4, 4, dtype=torch.float64), torch.zeros(2, 3), "upper must be contiguous float64"),
        (torch.zeros(3, 3, dtype=torch.float64), torch.zeros(2, 3).double(), "x must be float32"),
        (torch.zeros(3, 3, dtype=torch.float64), torch.zeros(1, 2, 3), "x must be float32"),
    ],
)
def test_what_does_not_fit_is_refused(upper, x, said):
    with pytest.raises(ValueError, match=said):
        lowbit.add_gram(upper, x)
