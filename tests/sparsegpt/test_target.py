"""The asymmetric target against least squares in float64."""

import pytest
import torch

import sparsegpt

DAMP = 0.01


def problem(C=12, R=5, T=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, C, generator=generator, dtype=torch.float64) @ torch.randn(
        C, C, generator=generator, dtype=torch.float64
    )
    xhat = x + 0.3 * torch.randn(T, C, generator=generator, dtype=torch.float64) * x.std(0)
    W = torch.randn(R, C, generator=generator, dtype=torch.float64)
    return W, x, xhat


def target(W, x, xhat, strength, order=None):
    factor = sparsegpt.factor((xhat.t() @ xhat).float(), damp=DAMP, order=order)
    drift = ((x - xhat).t() @ xhat).float()
    return sparsegpt.asymmetric_target(W.float(), drift, factor, strength=strength)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_it_goes_its_share_of_the_way_to_ridge_regression(strength):
    W, x, xhat = problem()
    H = xhat.t() @ xhat
    ridge = DAMP * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    # argmin over W' of ||W x - W' xhat||^2 + lambda ||W - W'||^2
    whole = (W @ x.t() @ xhat + W @ ridge) @ torch.linalg.inv(H + ridge)
    # float32 against float64, H of condition below 1e4
    torch.testing.assert_close(target(W, x, xhat, strength).double(), W + strength * (whole - W), rtol=1e-3, atol=1e-3)


def test_the_output_comes_closer_to_that_of_full_precision():
    W, x, xhat = problem()
    errors = [float((W @ x.t() - target(W, x, xhat, a).double() @ xhat.t()).square().sum()) for a in (0.0, 0.5, 1.0)]
    assert errors[0] > errors[1] > errors[2]


def test_the_order_of_the_factor_changes_nothing():
    W, x, xhat = problem()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(target(W, x, xhat, 0.5), target(W, x, xhat, 0.5, order), rtol=1e-4, atol=1e-4)


def test_without_drift_the_weight_stays():
    W, x, _ = problem()
    assert torch.equal(target(W, x, x, 1.0), W.float())


def test_a_dead_channel_keeps_its_weights():
    W, x, xhat = problem()
    xhat[:, 4] = 0  # never fires in the compressed model, does in full precision
    found = target(W, x, xhat, 1.0)
    assert torch.equal(found[:, 4], W[:, 4].float())
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("W", "drift", "strength", "said"),
    [
        (torch.zeros(2, 11), torch.zeros(12, 12), 0.5, "must fit C = 12"),
        (torch.zeros(2, 12), torch.zeros(12, 11), 0.5, "must fit C = 12"),
        (torch.zeros(2, 12), torch.zeros(12, 12), 1.5, "strength must lie in 0..1"),
    ],
)
def test_what_does_not_fit_is_refused(W, drift, strength, said):
    factor = sparsegpt.factor(torch.eye(12))
    with pytest.raises(ValueError, match=said):
        sparsegpt.asymmetric_target(W, drift, factor, strength=strength)
