"""The other ways to a mask and its values: scores, conjugate gradients, ADMM, ALPS; against formulas and each other."""

import math

import pytest
import torch

from sparsegpt import METHODS, Pattern, admm, alps, choose, dequantize, encode, factor, fit_grid, prune, refine, solve

from .reference_sparsegpt import damped, error_of, layer, loss_of

PATTERNS = [dict(sparsity=0.5), dict(sparsity=0.7), dict(keep=(2, 4)), dict(keep=(3, 7))]


def outlier_layer(R: int = 48, C: int = 96, seed: int = 0):
    """Power-law covariance in a random basis and a few loud channels, the layer on which methods are compared."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(C, C, generator=generator)).Q
    X = torch.randn(8 * C, C, generator=generator) * torch.arange(1, C + 1) ** -0.75 @ Q.T
    X[:, torch.randperm(C, generator=generator)[: C // 24]] *= 8
    return torch.randn(R, C, generator=generator) * 0.05, X.T @ X


def scores(W, H, method):
    """Wanda (arXiv 2306.11695, eq. 1): |W_ij| ||X_j||; magnitude: |W_ij|."""
    W = W.double().abs()
    return W * H.double().diagonal().sqrt() if method == "wanda" else W


def lowest_first(score, count, first=None):
    """bool: the `count` lowest, those in `first` before all others, then the lower column, then the lower row."""
    R, C = score.shape
    first = torch.zeros_like(score, dtype=torch.bool) if first is None else first
    rank = sorted((not first[r, c], score[r, c].item(), c, r) for r in range(R) for c in range(C))
    pruned = torch.zeros_like(score, dtype=torch.bool)
    for *_, c, r in rank[: max(count, int(first.sum()))]:
        pruned[r, c] = True
    return pruned


def by_groups(score, keep, first=None):
    n, m = keep
    pruned = torch.zeros_like(score, dtype=torch.bool)
    for start in range(0, score.shape[1], m):
        group = score[:, start : start + m]
        t = group.shape[1]
        for r in range(len(group)):
            forced = None if first is None else first[r : r + 1, start : start + t]
            pruned[r, start : start + t] = lowest_first(group[r : r + 1], t - math.ceil(n * t / m), forced)
    return pruned


def expected_mask(W, H, pattern, method):
    """The rule in words: wanda compares inside rows, magnitude over the layer, keep inside groups."""
    score = scores(W, H, method)
    zeros = (W == 0) & pattern.preserve
    if pattern.keep is not None:
        return ~by_groups(score, pattern.keep, zeros)
    if method == "magnitude":
        return ~lowest_first(score, round(pattern.sparsity * W.numel()), zeros)
    count = round(pattern.sparsity * W.shape[1])
    return ~torch.cat([lowest_first(score[r : r + 1], count, zeros[r : r + 1]) for r in range(len(W))])


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize(
    "pattern", [dict(sparsity=0.0), dict(sparsity=0.37), dict(sparsity=1.0), *PATTERNS, dict(keep=(1, 4))], ids=str
)
@pytest.mark.parametrize("R, C", [(12, 50), (1, 9), (5, 1)])
def test_scores_choose_what_their_formula_says(R, C, pattern, method):
    W, H = layer(R, C)
    mask = choose(W, H, Pattern(**pattern), method=method)
    assert mask.dtype == torch.bool and torch.equal(mask, expected_mask(W, H, Pattern(**pattern), method))


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize(
    "pattern", [dict(sparsity=0.5), dict(sparsity=0.2), dict(keep=(2, 4)), dict(keep=(3, 7))], ids=str
)
@pytest.mark.parametrize("preserve", [False, True])
def test_scores_break_ties_by_column_then_row_and_preserve_zeros(preserve, pattern, method):
    # Few distinct values: nearly every threshold is tied. H is the identity, so that scores tie for wanda too.
    W = torch.randint(-2, 3, (7, 29), generator=torch.Generator().manual_seed(0)).float()
    W[0] = -0.0
    pattern = Pattern(**pattern, preserve=preserve)
    mask = choose(W, torch.eye(29), pattern, method=method)
    assert torch.equal(mask, expected_mask(W, torch.eye(29), pattern, method))
    if preserve:
        assert not mask[W == 0].any()


def test_dead_channels_go_beside_the_budget_of_wanda():
    W, H = layer(10, 24)
    H[[2, 9]] = H[:, [2, 9]] = 0
    live = torch.ones(24, dtype=torch.bool).index_fill(0, torch.tensor([2, 9]), False)
    mask = choose(W, H, Pattern(0.5), method="wanda")
    assert not mask[:, ~live].any() and mask.sum(1).tolist() == [11] * 10
    assert torch.equal(mask[:, live], choose(W[:, live], H[live][:, live], Pattern(0.5), method="wanda"))


def test_scale_of_h_and_of_a_row_change_no_wanda_mask():
    W, H = layer(10, 24)
    mask = choose(W, H, Pattern(0.5), method="wanda")
    # Powers of two: no rounding moves.
    rescaled = choose(W * 2.0 ** torch.arange(10)[:, None], 16 * H, Pattern(0.5), method="wanda")
    assert torch.equal(mask, rescaled)


def test_parts_have_their_own_magnitude_threshold():
    W, H = layer(10, 24)
    W[:6] *= 10
    mask = choose(W, H, Pattern(0.5), method="magnitude", parts=[6, 4])
    alone = [choose(part, H, Pattern(0.5), method="magnitude") for part in W.split([6, 4])]
    assert torch.equal(mask, torch.cat(alone))
    assert not torch.equal(mask, choose(W, H, Pattern(0.5), method="magnitude"))


@pytest.mark.parametrize(
    "changed, facts",
    [
        (dict(method="taylor"), ["method", "taylor", "wanda"]),
        (dict(H=torch.eye(7)), ["H", "8", "7"]),
        (dict(W=torch.full((2, 8), float("nan"))), ["NaN"]),
    ],
)
def test_choose_refuses_in_one_line(changed, facts):
    arguments = dict(W=torch.ones(2, 8), H=torch.eye(8), pattern=Pattern(0.5), method="wanda") | changed
    with pytest.raises(ValueError) as caught:
        choose(arguments.pop("W"), arguments.pop("H"), arguments.pop("pattern"), **arguments)
    assert "\n" not in str(caught.value) and all(fact in str(caught.value) for fact in facts)


def least_squares(W, mask, H):
    """Row by row: the w with support S that minimizes (W_r - w) H (W_r - w)^T solves H_SS w_S = (H W_r)_S."""
    weight = torch.zeros_like(W, dtype=torch.float64)
    for r in range(len(W)):
        S = mask[r].nonzero()[:, 0]
        weight[r, S] = torch.linalg.solve(H[S][:, S], (H @ W[r].double())[S])
    return weight


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_refine_never_raises_the_error_and_keeps_the_mask(pattern):
    W, H = layer(24, 70)
    start = solve(W, factor(H), pattern=Pattern(**pattern))
    errors = [error_of(W.double() - start.weight, damped(H))]
    for steps in range(1, 12):
        weight = refine(W, start.weight, start.mask, H, steps=steps)
        assert weight.dtype == torch.float32 and weight[~start.mask].eq(0).all()
        assert not torch.signbit(weight[weight == 0]).any()
        errors.append(error_of(W.double() - weight, damped(H)))
    # Slack for float32 rounding of the iterate, far below what a step gains.
    assert all(after <= before * (1 + 1e-6) for before, after in zip(errors, errors[1:]))
    assert errors[10] < 0.9 * errors[0]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("R, C", [(20, 60), (1, 14), (6, 1)])
def test_refine_converges_to_least_squares_on_the_mask(R, C, pattern):
    W, H = layer(R, C)
    mask = choose(W, H, Pattern(**pattern), method="wanda")
    best = least_squares(W, mask, damped(H))
    # C steps would do in exact arithmetic; many more must not harm, even where a row needs only a few.
    weight = refine(W, W * mask, mask, H, steps=4 * C)
    # float32 gradients of an H with condition number near 1e3.
    torch.testing.assert_close(weight.double(), best, rtol=0, atol=1e-3 * W.abs().max().item())
    # The error is flat at its minimum: second order in the above.
    assert error_of(W - weight, damped(H)) == pytest.approx(error_of(W - best, damped(H)), rel=1e-5)


def test_refine_takes_any_start_for_the_same_end():
    W, H = layer(12, 40)
    mask = choose(W, H, Pattern(0.5), method="wanda")
    # From W itself the values outside the mask do not count.
    best = least_squares(W, mask, damped(H))
    for start in (W, W * mask, torch.zeros_like(W), -3 * W * mask):
        end = refine(W, start, mask, H, steps=160)
        assert end[~mask].eq(0).all() and not torch.signbit(end[~mask]).any()
        # As in the test of convergence.
        torch.testing.assert_close(end.double(), best, rtol=0, atol=1e-3 * W.abs().max().item())


def test_refine_at_its_optimum_stays_there():
    W, H = layer(12, 40)
    everything = torch.ones_like(W, dtype=torch.bool)
    assert torch.equal(refine(W, W, everything, H, steps=5), W)
    nothing = refine(W, torch.zeros_like(W), ~everything, H, steps=5)
    assert nothing.eq(0).all()
    mask = choose(W, H, Pattern(0.5), method="wanda")
    best = least_squares(W, mask, damped(H)).float()
    again = refine(W, best, mask, H, steps=50)
    torch.testing.assert_close(again, best, rtol=0, atol=1e-3 * W.abs().max().item())


def test_refine_takes_no_step_when_asked_for_none_and_leaves_its_inputs():
    W, H = layer(8, 30)
    mask = choose(W, H, Pattern(0.5), method="wanda")
    start, kept, H_before = W * mask, mask.clone(), H.clone()
    unmoved = refine(W, start, mask, H, steps=0)
    assert torch.equal(unmoved, start) and not torch.signbit(unmoved[unmoved == 0]).any()
    refine(W, start, mask, H, steps=3)
    assert torch.equal(start, W * kept) and torch.equal(mask, kept) and torch.equal(H, H_before)


def test_refine_with_dead_and_loud_channels():
    W, H = layer(10, 40)
    # Scales six orders apart are what the diagonal preconditioner is for.
    loudness = torch.logspace(-3, 3, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    H = H * loudness * loudness[:, None] / 1e3
    H[5] = H[:, 5] = 0
    start = solve(W, factor(H), pattern=Pattern(0.5))
    weight = refine(W, start.weight, start.mask, H, steps=10)
    assert weight[:, 5].eq(0).all() and torch.isfinite(weight).all()
    assert loss_of(W, weight, H) <= start.loss * (1 + 1e-5)


def test_refine_does_not_see_the_scale_of_channels():
    W, H = layer(10, 40)
    mask = choose(W, H, Pattern(0.5), method="wanda")
    scale = 2.0 ** torch.randint(-4, 5, (40,), generator=torch.Generator().manual_seed(0))
    # The diagonal preconditioner cancels any scale; damping, which does not, is made too small to matter.
    plain = refine(W, W * mask, mask, H, steps=5, damp=1e-9)
    scaled = refine(W / scale, W / scale * mask, mask, H * scale * scale[:, None], steps=5, damp=1e-9)
    # Powers of two round alike; sums in float32 differ by the order of their terms only.
    torch.testing.assert_close(scaled * scale, plain, rtol=1e-3, atol=1e-4 * W.abs().max().item())


def test_refine_refuses_shapes_that_differ():
    W, H = layer(4, 8)
    for arguments in ((W, W[:, :7], W != 0, H), (W, W, (W != 0)[:3], H), (W, W, W != 0, H[:7, :7])):
        with pytest.raises(ValueError, match=r"4, 8.*|8, 8.*") as caught:
            refine(*arguments, steps=1)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    [dict(sparsity=0.5, scope="layer"), dict(sparsity=0.7, scope="layer"), dict(keep=(2, 4)), dict(keep=(4, 8))],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_order_of_the_methods_on_an_outlier_layer(seed, pattern):
    W, H = outlier_layer(seed=seed)
    # SparseGPT's own scope; the others know one threshold for the layer or a row.
    paper = Pattern(**(pattern | {"scope": "block"} if "scope" in pattern else pattern))
    pattern = Pattern(**pattern)
    swept = solve(W, factor(H), pattern=paper)
    short = admm(W, H, pattern, start=swept.weight)
    full = alps(W, H, pattern)
    mask = choose(W, H, paper, method="wanda")

    def refined(weight, mask):
        return loss_of(W, refine(W, weight, mask, H, steps=10), H)

    errors = {
        "alps": refined(*full),
        "admm": refined(*short),
        "sparsegpt + pcg": refined(swept.weight, swept.mask),
        "sparsegpt": swept.loss,
        "wanda": loss_of(W, W * mask, H),
    }
    assert errors["admm"] <= errors["sparsegpt + pcg"] <= errors["sparsegpt"] <= errors["wanda"]
    assert errors["alps"] <= errors["sparsegpt + pcg"]
    # Without the refinement they already beat the sweep.
    assert loss_of(W, short[0], H) <= swept.loss and loss_of(W, full[0], H) <= swept.loss


def multiplier_admm(W, H, pattern, rho, grow, inner, rounds):
    """ADMM with the multiplier V itself (ALPS, arXiv 2406.07831, Alg. 1), in float64; H to unit diagonal first.

    X = (W H - V + rho D) (H + rho I)^-1,  D = project(X + V / rho),  V += rho (X - D); rho grows every `inner`.
    """
    scale = damped(H).diagonal().sqrt()
    H, W = damped(H) / scale / scale[:, None], W.double() * scale
    D, V = W * expected_mask(W, H, pattern, "magnitude"), torch.zeros_like(W)
    for _ in range(rounds):
        before = D != 0
        for _ in range(inner):
            X = torch.linalg.solve(H + rho * torch.eye(len(H)), W @ H - V + rho * D, left=False)
            D = (X + V / rho) * expected_mask(X + V / rho, H, pattern, "magnitude")
            V = V + rho * (X - D)
        rho *= grow(int((before ^ (D != 0)).sum()) / int((D != 0).sum()))
    return D / scale


def alps_growth(moved: float) -> float:
    """ALPS, Alg. 1: the more of the support moved, the faster rho grows."""
    return 1.3 if moved >= 0.1 else 1.2 if moved >= 0.005 else 1.1


@pytest.mark.parametrize("pattern", [dict(sparsity=0.6, scope="layer"), dict(keep=(2, 4))], ids=str)
def test_admm_and_alps_are_the_iteration_of_the_paper(pattern):
    W, H = layer(12, 36)
    pattern = Pattern(**pattern)
    for (weight, _), expected in (
        (
            admm(W, H, pattern, rho=0.1, doublings=4, iterations=2),
            multiplier_admm(W, H, pattern, 0.1, lambda _: 2, 2, 4),
        ),
        (alps(W, H, pattern, rho=0.1, rounds=5), multiplier_admm(W, H, pattern, 0.1, alps_growth, 3, 5)),
    ):
        # Rows within float32 rounding, apart from one whose support may turn at a near tie and then goes another way.
        off = (weight.double() - expected).abs().amax(1) > 1e-4 * W.abs().max()
        assert off.sum() <= 1


@pytest.mark.parametrize("method", [admm, alps])
@pytest.mark.parametrize("pattern", [dict(sparsity=0.0), dict(sparsity=0.37), dict(sparsity=1.0), *PATTERNS], ids=str)
@pytest.mark.parametrize("R, C", [(20, 60), (1, 15), (9, 1)])
def test_admm_masks_count_exactly(R, C, pattern, method):
    W, H = layer(R, C)
    pattern = Pattern(**pattern, **({"scope": "layer"} if "sparsity" in pattern else {}))
    weight, mask = method(W, H, pattern)
    assert weight.dtype == torch.float32 and mask.dtype == torch.bool and weight.shape == mask.shape == (R, C)
    assert torch.isfinite(weight).all() and weight[~mask].eq(0).all() and not torch.signbit(weight[weight == 0]).any()
    if pattern.keep is None:
        assert (~mask).sum() == round(pattern.sparsity * R * C)
    else:
        for group in mask.split(pattern.keep[1], dim=1):
            assert group.sum(1).eq(math.ceil(pattern.keep[0] * group.shape[1] / pattern.keep[1])).all()


def test_scope_row_gives_each_row_its_share():
    W, H = layer(10, 45)
    W[:5] *= 10
    pattern = Pattern(0.37, scope="row")
    masks = [admm(W, H, pattern)[1], alps(W, H, pattern)[1], choose(W, H, pattern, method="magnitude")]
    for mask in masks:
        assert (~mask).sum(1).tolist() == [round(0.37 * 45)] * 10


@pytest.mark.parametrize("method", [admm, alps])
def test_admm_counts_kept_zeros_as_kept(method):
    W, H = layer(6, 16)
    W[2] = 0
    weight, mask = method(W, H, Pattern(keep=(2, 4)))
    assert weight[2].eq(0).all() and mask.view(6, 4, 4).sum(2).eq(2).all()


@pytest.mark.parametrize("method", [admm, alps])
@pytest.mark.parametrize("pattern", [dict(sparsity=0.7, scope="layer"), dict(keep=(2, 4))], ids=str)
def test_admm_preserves_zeros_and_drops_dead_channels(pattern, method):
    W, H = layer(20, 44)
    zeros = torch.rand(20, 44, generator=torch.Generator().manual_seed(3)) < 0.3
    W[zeros] = -0.0
    H[[1, 30]] = H[:, [1, 30]] = 0
    weight, mask = method(W, H, Pattern(**pattern, preserve=True))
    assert weight[zeros].eq(0).all() and not mask[zeros].any()
    assert weight[:, [1, 30]].eq(0).all() and not mask[:, [1, 30]].any()
    if "sparsity" in pattern:
        live = torch.ones(44, dtype=torch.bool).index_fill(0, torch.tensor([1, 30]), False)
        assert (~mask[:, live]).sum() == round(0.7 * 20 * 42)


@pytest.mark.parametrize("method", [admm, alps])
def test_admm_is_deterministic_and_leaves_its_inputs(method):
    W, H = layer(20, 44)
    W_before, H_before = W.clone(), H.clone()
    (first, mask), (second, again) = method(W, H, Pattern(keep=(2, 4))), method(W, H, Pattern(keep=(2, 4)))
    assert torch.equal(first, second) and torch.equal(mask, again)
    assert torch.equal(W, W_before) and torch.equal(H, H_before)


@pytest.mark.parametrize("method", [admm, alps])
def test_scale_of_h_changes_nothing_in_admm(method):
    W, H = layer(20, 44)
    weight, mask = method(W, H, Pattern(keep=(2, 4)))
    scaled, same = method(W, 16 * H, Pattern(keep=(2, 4)))
    # A power of two, so only square roots and divisions of equal ratios: the same up to float32 rounding.
    assert torch.equal(mask, same)
    torch.testing.assert_close(weight, scaled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [admm, alps])
def test_parts_have_their_own_admm_budget(method):
    W, H = layer(20, 44)
    W[:12] *= 10
    pattern = Pattern(0.5, scope="layer")
    mask = method(W, H, pattern, parts=[12, 8])[1]
    assert (~mask[:12]).sum() == 12 * 22 and (~mask[12:]).sum() == 8 * 22
    assert (~method(W, H, pattern)[1][:12]).sum() < 12 * 22


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [dict(sparsity=0.5), dict(keep=(2, 4))], ids=str)
def test_prune_by_every_method(method, pattern):
    W, H = outlier_layer()
    plain = prune(W, H, factor(H), Pattern(**pattern), method=method)
    better = prune(W, H, factor(H), Pattern(**pattern), method=method, refine_steps=10)
    assert (~plain.mask).sum() == W.numel() // 2 and torch.equal(plain.mask, better.mask)
    for result in (plain, better):
        assert result.weight[~result.mask].eq(0).all() and result.codes is None
        # float32 V against float64 H.
        assert result.loss == pytest.approx(loss_of(W, result.weight, H), rel=1e-4)
        assert result.relative_error == pytest.approx(result.loss / loss_of(W, 0 * W, H), rel=1e-4)
    assert better.loss < plain.loss


@pytest.mark.parametrize("method", METHODS)
def test_prune_and_quantize_lie_on_the_grid_of_the_pruned_weights(method):
    W, H = outlier_layer()
    sizes = torch.tensor([40, 56])
    pruned = prune(W, H, factor(H), Pattern(0.5), method=method, refine_steps=5)
    both = prune(W, H, factor(H), Pattern(0.5), method=method, refine_steps=5, bits=4, sizes=sizes)
    grid = fit_grid(pruned.weight, sizes, 4)
    assert torch.equal(both.mask, pruned.mask) and both.weight[~both.mask].eq(0).all()
    assert torch.equal(both.grid.scale, grid.scale) and torch.equal(both.weight, dequantize(both.codes, grid))
    assert both.loss == pytest.approx(loss_of(W, both.weight, H), rel=1e-4)
    assert both.loss < loss_of(W, dequantize(encode(pruned.weight, grid), grid), H)


def test_prune_refuses_an_unknown_method():
    W, H = layer(4, 8)
    with pytest.raises(ValueError, match="method.*sparsegpt.*obs"):
        prune(W, H, factor(H), Pattern(0.5), method="obs")
