"""factor and activation_order: the identity they promise, and every way they refuse."""

import pytest
import torch

from sparsegpt import SolveError, activation_order, factor


def gram(C: int, samples: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(samples, C, generator=generator, dtype=torch.float64)
    return X.T @ X


@pytest.mark.parametrize("C", [1, 2, 37])
@pytest.mark.parametrize("permuted", [False, True])
def test_v_is_upper_and_squares_to_damped_h(C, permuted):
    H = gram(C, 4 * C)
    order = torch.randperm(C, generator=torch.Generator().manual_seed(1)) if permuted else None
    result = factor(H, damp=0.02, order=order)
    V = result.V.double()
    damped = H + 0.02 * H.diagonal().mean() * torch.eye(C, dtype=torch.float64)
    assert result.V.dtype == torch.float32 and torch.equal(V, V.triu()) and (V.diagonal() > 0).all()
    damped = damped[result.order][:, result.order]
    # A float32 Cholesky is backward stable to about C * 6e-8 of the largest entry.
    assert (V @ V.T - damped).abs().max() <= 1e-5 * damped.abs().max()
    assert result.attempts == ((0.02, torch.float32),) and result.damp == 0.02 and result.dtype == torch.float32


def test_v_is_the_inverse_of_gptq_factor():
    H = gram(24, 96)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    # float32 V against float64 U, condition number near 10.
    torch.testing.assert_close(factor(H).V.double() @ U, torch.eye(24, dtype=torch.float64), atol=1e-5, rtol=0)


def test_scale_of_h_only_scales_v():
    H = gram(16, 64)
    # 4 is a power of two: every rounding is the same.
    assert torch.equal(factor(16 * H).V, 4 * factor(H).V)


def test_input_is_left_alone():
    H = gram(8, 3).float()
    H[2] = H[:, 2] = 0
    before = H.clone()
    factor(H)
    assert torch.equal(H, before)


def test_rank_deficient_h_needs_float64_at_tiny_damping():
    result = factor(gram(64, 8), damp=1e-10)
    assert result.attempts == ((1e-10, torch.float32), (1e-10, torch.float64))
    assert result.dtype == torch.float64 and result.V.dtype == torch.float32


@pytest.mark.parametrize("C", [1, 3])
def test_h_beyond_float32_is_factored_in_float64(C):
    result = factor(1e39 * torch.eye(C, dtype=torch.float64))
    assert result.attempts == ((0.01, torch.float32), (0.01, torch.float64))
    torch.testing.assert_close(result.V.double(), (1.01e39**0.5) * torch.eye(C, dtype=torch.float64))


def test_ladder_climbs_to_the_rung_that_lifts_the_lowest_eigenvalue():
    Q = torch.linalg.qr(gram(12, 40)).Q
    eigenvalues = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)
    eigenvalues[0] = -0.05
    H = (Q * eigenvalues) @ Q.T
    result = factor((H + H.T) / 2)
    expected = [(0.01, torch.float32), (0.01, torch.float64), (0.03, torch.float32), (0.03, torch.float64)]
    assert list(result.attempts) == expected + [(0.1, torch.float32)]
    assert result.damp == 0.1


@pytest.mark.parametrize("H", [-torch.eye(3), torch.tensor([[1.0, 4.0], [4.0, 1.0]])])
def test_indefinite_h_raises_one_line_with_the_facts(H):
    with pytest.raises(SolveError) as caught:
        factor(H)
    message = str(caught.value)
    assert "\n" not in message and f"C={H.shape[0]}" in message and "0.01, 0.03, 0.1, 0.3, 1 " in message
    assert f"diagonal {H[0, 0].item():.3g}..{H[0, 0].item():.3g}" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_raise_at_once(value):
    H = torch.eye(4)
    H[1, 2] = value
    with pytest.raises(SolveError, match="NaN or Inf"):
        factor(H)


def test_h_without_any_input_raises_instead_of_becoming_the_identity():
    with pytest.raises(SolveError, match="no input reached"):
        factor(torch.zeros(5, 5))


def test_dead_channels_are_decoupled_and_out_of_the_mean():
    H = gram(6, 30)
    H[3] = H[:, 3] = 0
    live = torch.tensor([0, 1, 2, 4, 5])
    result = factor(H)
    assert result.dead.tolist() == [False, False, False, True, False, False]
    assert result.V[3].count_nonzero() == 1 and result.V[:, 3].count_nonzero() == 1
    alone = factor(H[live][:, live]).V
    # The same numbers in another blocking of the float32 Cholesky.
    torch.testing.assert_close(result.V[live][:, live], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(H=torch.ones(2, 3)),
        dict(H=torch.ones(0, 0)),
        dict(H=torch.eye(2, dtype=torch.int64)),
        dict(H=torch.eye(2), damp=0.0),
        dict(H=torch.eye(2), damp=float("nan")),
        dict(H=torch.eye(2), order=torch.tensor([0, 0])),
        dict(H=torch.eye(2), order=torch.tensor([1.0, 0.0])),
        dict(H=torch.eye(2), order=torch.tensor([1])),
    ],
)
def test_bad_arguments_raise(arguments):
    with pytest.raises(ValueError, match="H must|damp must|order must"):
        factor(**arguments)


def test_activation_order_sorts_inside_groups_with_stable_ties():
    diagonal = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 7.0])
    assert activation_order(diagonal, torch.tensor([3, 3])).tolist() == [1, 2, 0, 5, 3, 4]
    assert activation_order(diagonal, torch.tensor([6])).tolist() == [5, 3, 4, 1, 2, 0]
    assert activation_order(diagonal, torch.tensor([1] * 6)).tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="sum 6"):
        activation_order(diagonal, torch.tensor([3, 2]))
