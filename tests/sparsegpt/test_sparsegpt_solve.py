"""solve against GPTQ written from the paper: Cholesky, inverse, Cholesky, and right-looking columns, all in float64."""

import pytest
import torch

from sparsegpt import activation_order, dequantize, encode, factor, fit_grid, round_to_nearest, solve

RAGGED = [5, 1, 60, 30]


def layer(R: int, C: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the H of correlated inputs with a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(C, C, generator=generator) * torch.logspace(0, -1.5, C)
    X = torch.randn(3 * C, C, generator=generator) @ mix.T
    X[:, :: max(C // 4, 1)] *= 5
    return torch.randn(R, C, generator=generator) * 0.1, (X.double().T @ X.double()).float()


def damped(H: torch.Tensor, damp: float = 0.01) -> torch.Tensor:
    return H.double() + damp * H.double().diagonal().mean() * torch.eye(H.shape[0], dtype=torch.float64)


def layer_loss(W: torch.Tensor, W_hat: torch.Tensor, H: torch.Tensor) -> float:
    D = W.double() - W_hat.double()
    return ((D @ H) * D).sum().item()


def oracle(W, H, sizes, bits, order, fine=()):
    """GPTQ, Alg. 1, one column at a time; groups in `fine` have twice the bits. Returns (codes, weights) in channel order."""
    R, C = W.shape
    scales, zeros, tops = [], [], []
    for g, part in enumerate(W.split(sizes, dim=1)):
        top = 2 ** (bits * (1 + (g in fine))) - 1
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale = ((high - low) / top).half().double()
        scales += [scale] * part.shape[1]
        zeros += [torch.round(-low.double() / scale).clamp(0, top)] * part.shape[1]
        tops += [top] * part.shape[1]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(H)[order][:, order]))
    U = torch.linalg.cholesky(inverse, upper=True)
    work = W.double()[:, order]
    codes, W_hat = torch.zeros(R, C, dtype=torch.uint8), torch.zeros(R, C, dtype=torch.float64)
    for i, channel in enumerate(order.tolist()):
        q = torch.clamp(torch.round(work[:, i] / scales[channel]) + zeros[channel], 0, tops[channel])
        codes[:, channel] = q.to(torch.uint8)
        W_hat[:, channel] = (q - zeros[channel]) * scales[channel]
        error = (work[:, i] - W_hat[:, channel]) / U[i, i]
        work[:, i:] -= error[:, None] * U[i, i:]
    return codes, W_hat


def orders(H, sizes):
    C = H.shape[0]
    return {
        "natural": torch.arange(C),
        "in groups": activation_order(H.diagonal(), torch.tensor(sizes)),
        "across groups": activation_order(H.diagonal(), torch.tensor([C])),
    }


@pytest.mark.parametrize("order", ["natural", "in groups", "across groups"])
@pytest.mark.parametrize(
    "R, sizes, bits, update_block",
    [
        (48, RAGGED, 2, 128),
        (48, RAGGED, 3, 40),
        (48, [96], 4, 17),
        (48, [40, 56], 8, 1),
        (1, [7, 4], 4, 4),
        (9, [1], 3, 128),
    ],
)
def test_agrees_with_the_papers_algorithm(R, sizes, bits, update_block, order):
    W, H = layer(R, sum(sizes))
    order = orders(H, sizes)[order]
    expected_codes, expected_weight = oracle(W, H, sizes, bits, order)
    result = solve(W, factor(H, order=order), sizes=torch.tensor(sizes), bits=bits, update_block=update_block)
    # Rounding differences of float32 flip codes only at near ties; each flip may move a few later codes of its row.
    assert (result.codes == expected_codes).double().mean() >= 0.999
    expected_loss = layer_loss(W, expected_weight, damped(H))
    assert result.loss == pytest.approx(expected_loss, rel=1e-4)
    assert result.relative_error == pytest.approx(expected_loss / layer_loss(W, 0 * W, damped(H)), rel=1e-4)


def test_agrees_with_the_papers_algorithm_where_groups_are_fine():
    W, H = layer(48, sum(RAGGED))
    order = orders(H, RAGGED)["across groups"]
    expected_codes, expected_weight = oracle(W, H, RAGGED, 3, order, fine=(0, 3))
    fine = torch.tensor([True, False, False, True]).expand(48, 4)
    result = solve(W, factor(H, order=order), sizes=torch.tensor(RAGGED), bits=3, fine=fine)
    assert (result.codes == expected_codes).double().mean() >= 0.999  # near ties, as above
    assert result.loss == pytest.approx(layer_loss(W, expected_weight, damped(H)), rel=1e-4)
    assert torch.equal(result.weight, dequantize(result.codes, result.grid))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_solution_is_consistent_with_itself(bits):
    W, H = layer(20, 96)
    f = factor(H, order=activation_order(H.diagonal(), torch.tensor(RAGGED)))
    result = solve(W, f, sizes=torch.tensor(RAGGED), bits=bits)
    assert result.codes.dtype == torch.uint8 and result.codes.max().item() < 2**bits and result.codes.is_contiguous()
    assert result.weight.dtype == torch.float32 and torch.equal(result.weight, dequantize(result.codes, result.grid))
    assert torch.equal(result.grid.scale, fit_grid(W, torch.tensor(RAGGED), bits).scale)
    # The sweep sums float32 errors, the check is float64 on the finished weights.
    assert result.loss == pytest.approx(layer_loss(W, result.weight, damped(H)), rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_round_to_nearest_on_correlated_inputs(bits):
    W, H = layer(32, 96)
    f, sizes = factor(H), torch.tensor(RAGGED)
    nearest = round_to_nearest(W, sizes=sizes, bits=bits, factor=f)
    assert nearest.loss == pytest.approx(layer_loss(W, nearest.weight, damped(H)), rel=1e-4)
    assert solve(W, f, sizes=sizes, bits=bits).loss < 0.7 * nearest.loss


def test_uncorrelated_inputs_leave_nothing_to_compensate():
    W, _ = layer(7, 24)
    sizes = torch.tensor([10, 14])
    f = factor(torch.diag(torch.linspace(1, 9, 24)))
    solved, nearest = solve(W, f, sizes=sizes, bits=3), round_to_nearest(W, sizes=sizes, bits=3, factor=f)
    assert torch.equal(solved.codes, nearest.codes)
    # Two float32 sums of the same squares.
    assert solved.loss == pytest.approx(nearest.loss, rel=1e-5)
    assert solved.relative_error == pytest.approx(nearest.relative_error, rel=1e-5)


def test_nearest_without_factor_has_no_loss():
    W, _ = layer(3, 8)
    result = round_to_nearest(W, sizes=torch.tensor([8]), bits=4)
    assert result.loss is None and result.relative_error is None
    assert torch.equal(result.codes, encode(W, result.grid))


def test_order_equals_permuting_by_hand():
    W, H = layer(16, 96)
    sizes = torch.tensor(RAGGED)
    order = activation_order(H.diagonal(), sizes)
    assert not torch.equal(order, torch.arange(96))
    ordered = solve(W, factor(H, order=order), sizes=sizes, bits=3)
    by_hand = solve(W[:, order], factor(H[order][:, order]), sizes=sizes, bits=3)
    assert torch.equal(ordered.codes[:, order], by_hand.codes)
    assert torch.equal(ordered.weight[:, order], by_hand.weight)


def test_weights_stacked_on_one_input_solve_as_they_do_alone():
    W, H = layer(40, 96)
    f, sizes = factor(H), torch.tensor(RAGGED)
    stacked = solve(W, f, sizes=sizes, bits=4)
    alone = [solve(rows, f, sizes=sizes, bits=4) for rows in W.split([1, 24, 15])]
    # Matrix products of another height may round otherwise, which flips codes at near ties.
    assert (stacked.codes == torch.cat([part.codes for part in alone])).double().mean() >= 0.999
    assert stacked.loss == pytest.approx(sum(part.loss for part in alone), rel=1e-4)


@pytest.mark.parametrize("update_block", [1, 16, 33])
def test_block_width_changes_only_the_schedule(update_block):
    W, H = layer(24, 96)
    f, sizes = factor(H), torch.tensor(RAGGED)
    whole = solve(W, f, sizes=sizes, bits=3, update_block=96)
    blocked = solve(W, f, sizes=sizes, bits=3, update_block=update_block)
    # Same sums in another order: near ties only.
    assert (whole.codes == blocked.codes).double().mean() >= 0.999
    assert blocked.loss == pytest.approx(whole.loss, rel=1e-4)


def test_dead_channels_are_nearest_and_touch_nothing():
    W, H = layer(12, 40)
    dead = torch.tensor([0, 17, 39])
    H[dead] = H[:, dead] = 0
    sizes = torch.tensor([20, 20])
    first = solve(W, factor(H), sizes=sizes, bits=4)
    assert torch.equal(first.codes[:, dead], encode(W, first.grid)[:, dead])
    moved = W.clone()
    moved[:, dead] *= -0.5
    grid_kept = torch.equal(fit_grid(moved, sizes, 4).scale, first.grid.scale)
    live = torch.ones(40, dtype=torch.bool)
    live[dead] = False
    changed = solve(moved, factor(H), sizes=sizes, bits=4)
    rows = (changed.grid.scale == first.grid.scale).all(1) & (changed.grid.zero == first.grid.zero).all(1)
    assert not grid_kept and rows.sum() >= 3
    assert torch.equal(changed.codes[rows][:, live], first.codes[rows][:, live])


def test_errors_leave_dead_channels_out():
    W, H = layer(12, 40)
    # Small inputs beside loud weights on the dead ones: their 1 on the diagonal would rule both sums.
    H *= 1e-6
    H[3] = H[:, 3] = 0
    W[:, 3] *= 50
    live = torch.arange(40) != 3
    reference = damped(H[live][:, live])
    sizes = torch.tensor([3, 1, 36])
    for result in (
        solve(W, factor(H), sizes=sizes, bits=4),
        round_to_nearest(W, sizes=sizes, bits=4, factor=factor(H)),
    ):
        loss = layer_loss(W[:, live], result.weight[:, live], reference)
        assert result.loss == pytest.approx(loss, rel=1e-4)
        assert result.relative_error == pytest.approx(
            loss / layer_loss(W[:, live], 0 * W[:, live], reference), rel=1e-4
        )


def test_same_input_same_bytes():
    W, H = layer(16, 96)
    results = [solve(W, factor(H), sizes=torch.tensor(RAGGED), bits=4) for _ in range(2)]
    assert torch.equal(results[0].codes, results[1].codes) and results[0].loss == results[1].loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_weight_dtype_is_solved_in_float32(dtype):
    W, H = layer(8, 32)
    W = W.to(dtype)
    kept = W.clone()
    result = solve(W, factor(H), sizes=torch.tensor([32]), bits=4)
    expected = solve(W.float(), factor(H), sizes=torch.tensor([32]), bits=4)
    assert torch.equal(result.codes, expected.codes) and result.loss == expected.loss
    assert torch.equal(W, kept)


def test_zero_weights():
    W, H = layer(4, 16)
    nothing = solve(torch.zeros_like(W), factor(H), sizes=torch.tensor([8, 8]), bits=4)
    assert nothing.codes.eq(0).all() and nothing.weight.eq(0).all()
    assert nothing.loss == 0 and nothing.relative_error == 0
    W[:, 8:] = 0
    # A zero group has steps of 1: the errors that reach it, far below half a step, leave it at 0.
    half = solve(W, factor(H), sizes=torch.tensor([8, 8]), bits=4)
    assert half.codes[:, 8:].eq(0).all() and half.weight[:, 8:].eq(0).all()


def test_no_rows():
    result = solve(torch.zeros(0, 6), factor(torch.eye(6)), sizes=torch.tensor([6]), bits=4)
    assert result.codes.shape == (0, 6) and result.weight.shape == (0, 6) and result.relative_error == 0


def test_bad_arguments_raise():
    f, sizes = factor(torch.eye(4)), torch.tensor([5])
    with pytest.raises(ValueError, match="5 columns, the factor 4"):
        solve(torch.ones(2, 5), f, sizes=sizes, bits=4)
    with pytest.raises(ValueError, match="5 columns, the factor 4"):
        round_to_nearest(torch.ones(2, 5), sizes=sizes, bits=4, factor=f)
    with pytest.raises(ValueError, match="update_block"):
        solve(torch.ones(2, 4), f, sizes=torch.tensor([4]), bits=4, update_block=0)


def test_relative_error_of_many_rows_is_that_of_evenly_spaced_ones():
    W, H = layer(4096, 8)
    result = solve(W, factor(H), sizes=torch.tensor([8]), bits=4)
    some, hat = W[::16], result.weight[::16]
    expected = layer_loss(some, hat, damped(H)) / layer_loss(some, 0 * some, damped(H))
    assert result.relative_error == pytest.approx(expected, rel=1e-4)
    assert result.loss == pytest.approx(layer_loss(W, result.weight, damped(H)), rel=1e-4)
