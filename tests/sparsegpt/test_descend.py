"""Coordinate descent on codes against its definition."""

import pytest
import torch

from sparsegpt import Pattern, dequantize, descend, factor, solve


def problem(R=6, C=20, seed=0, dead=()):
    random = torch.Generator().manual_seed(seed)
    X = torch.randn(200, C, generator=random) @ torch.randn(C, C, generator=random)
    X[:, list(dead)] = 0
    return torch.randn(R, C, generator=random), X.t() @ X


def damped(H, F):
    return H + F.damp * H.diagonal().mean() * torch.eye(len(H))


def error(W, W_hat, A):
    D = (W - W_hat).double()
    return float(((D @ A.double()) * D).sum())


@pytest.mark.parametrize("bits, fine", [(2, None), (3, None), (4, None), (8, None), (2, (True, False))])
@pytest.mark.parametrize("ordered", [False, True])
def test_where_it_ends_no_single_code_can_be_bettered(bits, fine, ordered):
    W, H = problem()
    F = factor(H, order=H.diagonal().argsort(descending=True) if ordered else None)
    sizes = torch.tensor([8, 12])
    first = solve(W, F, sizes=sizes, bits=bits, fine=None if fine is None else torch.tensor([fine] * 6))
    found = descend(W, first, H, F, passes=50)
    A = damped(H, F)
    assert error(W, found.weight, A) < error(W, first.weight, A)
    assert torch.equal(found.weight, dequantize(found.codes, found.grid))
    least = error(W, found.weight, A)
    for r in range(W.shape[0]):
        for c in range(W.shape[1]):
            for step in (-1, 1):
                code = int(found.codes[r, c]) + step
                if 0 <= code < (2 ** (2 * bits) if fine and c < 8 else 2**bits):
                    other = found.codes.clone()
                    other[r, c] = code
                    # float32 against float64 may take a tie the other way.
                    assert error(W, dequantize(other, found.grid), A) > least * (1 - 1e-5)


def test_each_pass_lowers_the_error_and_the_facts_follow():
    W, H = problem(C=300)
    F, sizes = factor(H), torch.tensor([100, 200])
    found = [solve(W, F, sizes=sizes, bits=3)]
    found += [descend(W, found[0], H, F, passes=n) for n in (1, 3)]
    errors = [error(W, f.weight, damped(H, F)) for f in found]
    assert errors[0] > errors[1] > errors[2]
    for f, e in zip(found, errors):
        assert f.loss == pytest.approx(e, rel=1e-3)  # float32 products of float32 factors
        assert f.relative_error / found[0].relative_error == pytest.approx(e / errors[0], rel=1e-3)


def test_pruned_weights_stay_zero_and_dead_columns_as_they_are():
    W, H = problem(dead=(3,))
    F, sizes = factor(H), torch.tensor([20])
    first = solve(W, F, pattern=Pattern(keep=(2, 4)), sizes=sizes, bits=4)
    found = descend(W, first, H, F, passes=3)
    assert found.weight[~first.mask].eq(0).all() and torch.equal(found.mask, first.mask)
    assert torch.equal(found.codes[:, 3], first.codes[:, 3])
    assert error(W, found.weight, damped(H, F)) < error(W, first.weight, damped(H, F))


def test_no_pass_changes_nothing():
    W, H = problem()
    F = factor(H)
    first = solve(W, F, sizes=torch.tensor([20]), bits=4)
    assert torch.equal(descend(W, first, H, F, passes=0).codes, first.codes)


def test_rows_do_not_depend_on_each_other():
    W, H = problem(R=8)
    F, sizes = factor(H), torch.tensor([20])
    whole = descend(W, solve(W, F, sizes=sizes, bits=3), H, F, passes=3)
    half = descend(W[:4], solve(W[:4], F, sizes=sizes, bits=3), H, F, passes=3)
    assert torch.equal(whole.codes[:4], half.codes)


def test_a_solution_without_codes_is_refused():
    W, H = problem()
    F = factor(H)
    with pytest.raises(ValueError, match="no grid to descend on"):
        descend(W, solve(W, F, pattern=Pattern(sparsity=0.5)), H, F, passes=1)
