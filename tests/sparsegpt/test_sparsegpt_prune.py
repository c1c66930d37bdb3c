"""solve with a mask to choose or to follow, against SparseGPT written from the paper (reference_sparsegpt.py)."""

import math

import pytest
import torch

from sparsegpt import Pattern, activation_order, dequantize, encode, factor, fit_grid, solve, sweep

from .reference_sparsegpt import layer, loss_of, sparsegpt

SHAPES = [(48, 96), (33, 70), (1, 40), (24, 1), (1, 1), (5, 9)]
PATTERNS = [
    dict(sparsity=0.0),
    dict(sparsity=0.5, block=32),
    dict(sparsity=0.9, block=20),
    dict(sparsity=0.7, block=24, scope="row"),
    dict(sparsity=0.6, block=16, scope="layer"),
    dict(sparsity=1.0, block=32),
    dict(keep=(2, 4)),
    dict(keep=(4, 8)),
    dict(keep=(1, 4)),
    dict(keep=(3, 7)),
]


def assert_agrees(result, expected, W, H):
    """Masks and codes to 99.9%, the loss to 1e-4, and the weights of every row that chose alike."""
    # float32 scores flip the choice only at near ties.
    assert (result.mask == expected.mask).double().mean() >= 0.999
    assert result.loss == pytest.approx(loss_of(W, expected.weight, H), rel=1e-4)
    alike = (result.mask == expected.mask).all(1)
    if expected.codes is not None:
        assert (result.codes == expected.codes).double().mean() >= 0.999
        alike &= (result.codes == expected.codes).all(1)
    assert alike.double().mean() >= 0.8
    # A float32 solve of an H with condition number near 1e3.
    torch.testing.assert_close(result.weight[alike].double(), expected.weight[alike], rtol=0, atol=1e-3 * W.abs().max())


def zeros_of_groups(C: int, keep: tuple[int, int]) -> int:
    """Zeros in a row of C live channels."""
    n, m = keep
    return sum(min(m, C - start) - math.ceil(n * min(m, C - start) / m) for start in range(0, C, m))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("R, C", SHAPES)
def test_agrees_with_the_papers_algorithm(R, C, pattern):
    W, H = layer(R, C)
    result = solve(W, factor(H), pattern=Pattern(**pattern), update_block=16)
    assert_agrees(result, sparsegpt(W, H, **pattern), W, H)
    share = pattern.get("sparsity")
    rows = R if pattern.get("scope") == "row" else 1
    zeros = R * zeros_of_groups(C, pattern["keep"]) if share is None else rows * round(share * (R // rows) * C)
    assert (~result.mask).sum() == zeros
    assert result.weight.dtype == torch.float32 and result.weight[~result.mask].eq(0).all()
    assert result.codes is None and result.grid is None


@pytest.mark.parametrize("pattern", [dict(sparsity=0.5, block=32), dict(keep=(2, 4))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_weight_dtype_is_solved_in_float32(dtype, pattern):
    W, H = layer(20, 64)
    W = W.to(dtype)
    before = W.clone()
    result = solve(W, factor(H), pattern=Pattern(**pattern))
    assert_agrees(result, sparsegpt(W, H, **pattern), W.float(), H)
    assert result.weight.dtype == torch.float32 and torch.equal(W, before)
    expected = solve(W.float(), factor(H), pattern=Pattern(**pattern))
    assert torch.equal(result.weight, expected.weight) and torch.equal(result.mask, expected.mask)


@pytest.mark.parametrize("sparsity", [0.0, 0.013, 0.5, 0.985])
@pytest.mark.parametrize("block", [1, 10, 128])
@pytest.mark.parametrize("scope", ["block", "layer", "row"])
def test_zeros_number_exactly_the_share(scope, block, sparsity):
    W, H = layer(7, 61)
    mask = solve(W, factor(H), pattern=Pattern(sparsity, scope=scope, block=block)).mask
    if scope == "row":
        assert (~mask).sum(1).tolist() == [round(sparsity * 61)] * 7
    else:
        assert (~mask).sum() == round(sparsity * 7 * 61)


@pytest.mark.parametrize("scope", ["block", "row"])
def test_each_mask_block_has_its_share_by_cumulative_rounding(scope):
    W, H = layer(6, 50)
    # 0.37 meets no half, where the order of two float products would decide.
    mask = solve(W, factor(H), pattern=Pattern(0.37, scope=scope, block=7)).mask
    rows = [mask[r : r + 1] for r in range(6)] if scope == "row" else [mask]
    for part in rows:
        for stop in [7, 14, 21, 28, 35, 42, 49, 50]:
            assert (~part[:, :stop]).sum() == round(0.37 * len(part) * stop)


def test_scope_layer_scores_the_weights_as_they_came():
    W, H = layer(12, 40)
    score = W.double() ** 2 * factor(H).V.double().diagonal() ** 2
    mask = solve(W, factor(H), pattern=Pattern(0.5, scope="layer", block=8)).mask
    assert torch.equal(mask, score > score.flatten().sort().values[12 * 20 - 1])


def test_ties_prune_the_lower_step_then_the_lower_row():
    # Equal scores and no correlation: only the tie rule decides.
    W, f = torch.ones(3, 4), factor(torch.eye(4))
    rows = solve(W, f, pattern=Pattern(5 / 12)).mask.int().tolist()
    assert rows == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]]
    assert solve(W, f, pattern=Pattern(0.5, scope="row")).mask.int().tolist() == [[0, 0, 1, 1]] * 3
    assert solve(W, f, pattern=Pattern(keep=(1, 4))).mask.int().tolist() == [[0, 0, 0, 1]] * 3
    backwards = factor(torch.eye(4), order=torch.tensor([3, 2, 1, 0]))
    rows = solve(W, backwards, pattern=Pattern(5 / 12)).mask.int().tolist()
    assert rows == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [
        dict(sparsity=0.5, block=8),
        dict(sparsity=0.3, block=5, scope="row"),
        dict(sparsity=0.6, scope="layer"),
        dict(keep=(3, 7)),
    ],
    ids=str,
)
def test_few_distinct_values_tie_everywhere_and_agree_exactly(pattern, preserve):
    W = torch.randint(-2, 3, (9, 30), generator=torch.Generator().manual_seed(0)).float()
    H = torch.eye(30)
    H[11, 11] = 0
    order = None if "keep" in pattern else torch.randperm(30, generator=torch.Generator().manual_seed(1))
    result = solve(W, factor(H, order=order), pattern=Pattern(**pattern, preserve=preserve))
    expected = sparsegpt(W, H, order=order, preserve=preserve, **pattern)
    assert torch.equal(result.mask, expected.mask) and torch.equal(result.weight.double(), expected.weight)


@pytest.mark.parametrize(
    "pattern",
    [dict(sparsity=0.5, block=32), dict(sparsity=0.5, scope="layer"), dict(keep=(2, 4)), dict(keep=(3, 7))],
    ids=str,
)
@pytest.mark.parametrize("update_block", [1, 16, 33, 128])
def test_update_block_changes_only_the_schedule(update_block, pattern):
    W, H = layer(24, 96)
    whole = solve(W, factor(H), pattern=Pattern(**pattern), update_block=96)
    blocked = solve(W, factor(H), pattern=Pattern(**pattern), update_block=update_block)
    # The same sums in another order: near ties only.
    assert (whole.mask == blocked.mask).double().mean() >= 0.999
    assert blocked.loss == pytest.approx(whole.loss, rel=1e-4)


def test_mask_block_decides_what_competes():
    W, H = layer(24, 96)
    narrow, wide = (solve(W, factor(H), pattern=Pattern(0.5, block=block), update_block=16) for block in (8, 96))
    assert (~narrow.mask[:, :8]).sum() == 24 * 4
    # Loud channels are spared when they compete with quiet ones.
    assert (~wide.mask[:, :8]).sum() != 24 * 4


@pytest.mark.parametrize("quantized", [False, True])
def test_follows_an_external_mask(quantized):
    W, H = layer(30, 50)
    mask = torch.rand(30, 50, generator=torch.Generator().manual_seed(1)) > 0.6
    sizes = torch.tensor([20, 30])
    options = dict(sizes=sizes, bits=4) if quantized else {}
    result = solve(W, factor(H), mask=mask, update_block=16, **options)
    assert torch.equal(result.mask, mask) and result.weight[~mask].eq(0).all()
    assert_agrees(result, sparsegpt(W, H, mask=mask, grid=result.grid), W, H)
    # What the update is for: better than multiplying by the mask, even where it also has to quantize.
    assert result.loss < 0.8 * loss_of(W, W * mask, H)


@pytest.mark.parametrize("pattern", [dict(sparsity=0.5, block=32), dict(keep=(2, 4))], ids=str)
def test_a_chosen_mask_given_back_gives_the_same_weights(pattern):
    W, H = layer(16, 64)
    chosen = solve(W, factor(H), pattern=Pattern(**pattern), update_block=16)
    given = solve(W, factor(H), mask=chosen.mask, update_block=16)
    # The same sums, possibly in another order.
    torch.testing.assert_close(given.weight, chosen.weight, rtol=0, atol=1e-5)


def test_nothing_pruned_returns_the_weights_bit_for_bit():
    W, H = layer(9, 40)
    for result in (
        solve(W, factor(H), pattern=Pattern(0.0, block=16), update_block=8),
        solve(W, factor(H), mask=torch.ones_like(W, dtype=torch.bool)),
    ):
        assert torch.equal(result.weight, W) and result.mask.all()
        assert result.loss == 0 and result.relative_error == 0


def test_everything_pruned():
    W, H = layer(9, 40)
    result = solve(W, factor(H), pattern=Pattern(1.0))
    assert result.weight.eq(0).all() and not result.mask.any()
    assert result.relative_error == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("pattern", [dict(sparsity=0.5), dict(keep=(2, 4)), dict(sparsity=0.0, preserve=True)], ids=str)
@pytest.mark.parametrize("bits", [None, 4])
def test_no_negative_zero_comes_out(bits, pattern):
    W, H = layer(8, 32)
    W[:, ::3] = -0.0
    W[W.abs() < 0.02] *= 0
    options = {} if bits is None else dict(sizes=torch.tensor([32]), bits=bits)
    result = solve(W, factor(H), pattern=Pattern(**pattern), **options)
    assert result.weight.eq(0).any() and not torch.signbit(result.weight[result.weight == 0]).any()


@pytest.mark.parametrize(
    "further",
    [dict(sparsity=0.7, block=32), dict(sparsity=0.7, scope="row"), dict(keep=(2, 4)), dict(keep=(3, 7))],
    ids=str,
)
def test_preserve_keeps_every_zero_and_counts_it(further):
    W, H = layer(20, 64)
    half = solve(W, factor(H), pattern=Pattern(0.5, block=32)).weight
    half[half == 0] = torch.tensor([0.0, -0.0]).repeat((half == 0).sum() // 2)
    result = solve(half, factor(H), pattern=Pattern(**further, preserve=True))
    assert result.weight[half == 0].eq(0).all() and not result.mask[half == 0].any()
    assert_agrees(result, sparsegpt(half, H, **further, preserve=True), half, H)
    if further.get("scope") is None and "sparsity" in further:
        assert (~result.mask).sum() == round(0.7 * 20 * 64)


def test_without_preserve_zeros_may_return():
    W, H = layer(20, 64)
    half = solve(W, factor(H), pattern=Pattern(0.5, block=32)).weight
    free = solve(half, factor(H), pattern=Pattern(keep=(2, 4)))
    assert free.mask[half == 0].any() and free.weight[half == 0].ne(0).any()


def test_preserve_with_more_zeros_than_asked_for_prunes_nothing_else():
    W, H = layer(10, 48)
    W[torch.rand(10, 48, generator=torch.Generator().manual_seed(2)) < 0.6] = 0
    for pattern in (Pattern(0.1, preserve=True, block=16), Pattern(0.1, preserve=True, scope="layer")):
        result = solve(W, factor(H), pattern=pattern)
        assert torch.equal(result.mask, W != 0) and torch.equal(result.weight, W)


def test_preserve_leaves_the_count_exact_where_zeros_crowd_the_first_block():
    W, H = layer(10, 48)
    W[:, :12] = 0
    result = solve(W, factor(H), pattern=Pattern(0.5, block=16, preserve=True))
    assert (~result.mask).sum() == 240
    assert_agrees(result, sparsegpt(W, H, sparsity=0.5, block=16, preserve=True), W, H)


@pytest.mark.parametrize(
    "pattern",
    [
        dict(sparsity=0.5, block=16),
        dict(sparsity=0.5, scope="row"),
        dict(sparsity=0.5, scope="layer"),
        dict(keep=(2, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("preserve", [False, True])
def test_dead_columns_are_zero_and_outside_the_budget(pattern, preserve):
    W, H = layer(15, 44)
    dead = torch.tensor([0, 17, 18, 43])
    H[dead] = H[:, dead] = 0
    W[:, dead] *= 100
    W[:, 17] = 0
    live = torch.ones(44, dtype=torch.bool).index_fill(0, dead, False)
    result = solve(W, factor(H), pattern=Pattern(**pattern, preserve=preserve))
    assert result.weight[:, dead].eq(0).all() and not result.mask[:, dead].any()
    assert_agrees(result, sparsegpt(W, H, **pattern, preserve=preserve), W, H)
    if "sparsity" in pattern:
        assert (~result.mask[:, live]).sum() == 15 * 20
        loud = solve(W * torch.where(live, 1, 7), factor(H), pattern=Pattern(**pattern, preserve=preserve))
        assert torch.equal(loud.weight, result.weight) and loud.loss == result.loss
    else:
        # A dead channel of a group is one of its zeros.
        assert (~result.mask).sum(1).tolist() == [22] * 15


def test_dead_columns_under_an_external_mask_are_zeroed_too():
    W, H = layer(6, 20)
    H[4] = H[:, 4] = 0
    result = solve(W, factor(H), mask=torch.ones_like(W, dtype=torch.bool))
    assert result.weight[:, 4].eq(0).all() and not result.mask[:, 4].any() and result.mask.sum() == 6 * 19


@pytest.mark.parametrize(
    "pattern",
    [dict(sparsity=0.5, block=32), dict(sparsity=0.7, scope="row"), dict(keep=(2, 4)), dict(keep=(3, 7))],
    ids=str,
)
@pytest.mark.parametrize("bits, sizes", [(2, [96]), (3, [5, 1, 60, 30]), (4, [40, 56]), (8, [96])])
def test_joint_quantization_agrees_with_the_paper(bits, sizes, pattern):
    W, H = layer(48, 96)
    sizes = torch.tensor(sizes)
    result = solve(W, factor(H), pattern=Pattern(**pattern), sizes=sizes, bits=bits, update_block=20)
    grid = fit_grid(W, sizes, bits)
    assert torch.equal(result.grid.scale, grid.scale) and torch.equal(result.grid.zero, grid.zero)
    assert result.codes.dtype == torch.uint8 and result.codes.max().item() < 2**bits and result.codes.is_contiguous()
    assert torch.equal(result.weight, dequantize(result.codes, grid))
    assert torch.equal(encode(result.weight, grid), result.codes)
    assert result.weight[~result.mask].eq(0).all()
    assert_agrees(result, sparsegpt(W, H, grid=grid, **pattern), W, H)
    # The sweep sums float32 errors, the check is float64 on the finished weights.
    assert result.loss == pytest.approx(loss_of(W, result.weight, H), rel=1e-4)


def test_grids_do_not_move_with_the_mask():
    W, H = layer(12, 32)
    sizes = torch.tensor([32])
    pruned, full = (solve(W, factor(H), sizes=sizes, bits=4, pattern=p) for p in (Pattern(0.9), None))
    assert torch.equal(pruned.grid.scale, full.grid.scale) and full.mask is None


@pytest.mark.parametrize("pattern", [dict(sparsity=0.5, block=32), dict(sparsity=0.5, scope="row", block=32)], ids=str)
@pytest.mark.parametrize("groups", [[96], [50, 46]])
@pytest.mark.parametrize("bits", [None, 4])
def test_act_order_chooses_in_processing_steps(bits, groups, pattern):
    W, H = layer(24, 96)
    order = activation_order(H.diagonal(), torch.tensor(groups))
    assert not torch.equal(order, torch.arange(96))
    options = {} if bits is None else dict(sizes=torch.tensor(groups), bits=bits)
    result = solve(W, factor(H, order=order), pattern=Pattern(**pattern), **options)
    assert_agrees(result, sparsegpt(W, H, order=order, grid=result.grid, **pattern), W, H)
    assert (~result.mask[:, order[:32]]).sum() == 24 * 16


@pytest.mark.parametrize("keep", [(2, 4), (3, 7)])
def test_an_order_of_whole_groups_serves_n_of_m(keep):
    m = keep[1]
    W, H = layer(16, 8 * m)
    H[:m] *= 3
    H[:, :m] *= 3
    groups = torch.arange(8 * m).view(8, m)
    moved = groups.flip(0).reshape(-1)
    inside = activation_order(H.diagonal(), torch.tensor([m] * 8))
    assert not torch.equal(inside, torch.arange(8 * m))
    for order in (moved, inside):
        result = solve(W, factor(H, order=order), pattern=Pattern(keep=keep), update_block=16)
        assert result.mask.view(16, 8, m).sum(2).eq(keep[0]).all()
        assert_agrees(result, sparsegpt(W, H, order=order, keep=keep), W, H)


@pytest.mark.parametrize(
    "pattern", [dict(keep=(2, 4)), dict(keep=(3, 7)), dict(sparsity=0.5, scope="row", block=32)], ids=str
)
@pytest.mark.parametrize("bits", [None, 4])
def test_rows_stacked_solve_as_they_do_alone(bits, pattern):
    W, H = layer(40, 64)
    W[:24] *= 5
    options = {} if bits is None else dict(sizes=torch.tensor([64]), bits=bits)
    stacked = solve(W, factor(H), pattern=Pattern(**pattern), **options)
    alone = [solve(part, factor(H), pattern=Pattern(**pattern), **options) for part in W.split([1, 23, 16])]
    # Products of another height may round otherwise, which flips near ties.
    assert (stacked.mask == torch.cat([part.mask for part in alone])).double().mean() >= 0.999
    assert stacked.loss == pytest.approx(sum(part.loss for part in alone), rel=1e-4)


@pytest.mark.parametrize("scope", ["block", "layer"])
def test_stacked_rows_share_one_budget_unless_parts_say_otherwise(scope):
    W, H = layer(40, 64)
    W[:24] *= 5
    pattern = Pattern(0.5, scope=scope, block=32)
    stacked = solve(W, factor(H), pattern=pattern).mask
    assert (~stacked).sum() == 40 * 32 and (~stacked[:24]).sum() < 24 * 20
    apart = solve(W, factor(H), pattern=pattern, parts=[24, 16]).mask
    alone = torch.cat([solve(part, factor(H), pattern=pattern).mask for part in W.split([24, 16])])
    assert (~apart[:24]).sum() == 24 * 32 and (apart == alone).double().mean() >= 0.999


def test_no_rows():
    for pattern in (Pattern(0.5), Pattern(0.5, scope="row"), Pattern(keep=(2, 4))):
        result = solve(torch.zeros(0, 6), factor(torch.eye(6)), pattern=pattern)
        assert result.weight.shape == (0, 6) and result.mask.shape == (0, 6) and result.loss == 0


def test_same_input_same_bytes():
    W, H = layer(16, 64)
    first, second = (solve(W, factor(H), pattern=Pattern(0.5, block=32)) for _ in range(2))
    assert torch.equal(first.weight, second.weight) and first.loss == second.loss


def test_beats_magnitude_and_masking_alone_by_far():
    W, H = layer(32, 96)
    result = solve(W, factor(H), pattern=Pattern(0.5, block=32))
    by_magnitude = W * (W.abs() > W.abs().flatten().median())
    assert result.loss < 0.5 * loss_of(W, W * result.mask, H) < 0.5 * loss_of(W, by_magnitude, H)


@pytest.mark.parametrize(
    "arguments, facts",
    [
        (dict(sparsity=1.5), ["sparsity", "1.5"]),
        (dict(sparsity=-0.1), ["sparsity", "-0.1"]),
        (dict(sparsity=float("nan")), ["sparsity", "nan"]),
        (dict(), ["sparsity", "keep", "None"]),
        (dict(sparsity=0.5, keep=(2, 4)), ["sparsity", "keep", "0.5", "(2, 4)"]),
        (dict(keep=(4, 2)), ["keep", "(4, 2)"]),
        (dict(keep=(4, 4)), ["keep", "(4, 4)"]),
        (dict(keep=(-1, 4)), ["keep", "(-1, 4)"]),
        (dict(sparsity=0.5, scope="column"), ["scope", "column", "row"]),
        (dict(sparsity=0.5, block=0), ["block", "0"]),
    ],
)
def test_bad_patterns_raise_one_line(arguments, facts):
    with pytest.raises(ValueError) as caught:
        Pattern(**arguments)
    assert "\n" not in str(caught.value) and all(fact in str(caught.value) for fact in facts)


HALF, KEPT = Pattern(0.5), torch.ones(2, 8, dtype=torch.bool)
INTERLEAVED = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])


@pytest.mark.parametrize(
    "changed, facts",
    [
        (dict(pattern=HALF, mask=KEPT), ["mask", "pattern"]),
        (dict(), ["nothing", "pattern", "mask", "bits"]),
        (dict(mask=KEPT[:, :7]), ["mask", "[2, 8]", "[2, 7]"]),
        (dict(mask=KEPT.float()), ["mask", "bool", "float32"]),
        (dict(pattern=HALF, W=torch.ones(2, 9)), ["9", "8"]),
        (dict(pattern=HALF, W=torch.ones(8)), ["W", "[8]"]),
        (dict(pattern=HALF, W=torch.ones(2, 8, dtype=torch.int64)), ["W", "int64"]),
        (dict(pattern=HALF, W=torch.full((2, 8), float("nan"))), ["NaN"]),
        (dict(pattern=HALF, W=torch.full((2, 8), 1e39, dtype=torch.float64)), ["W", "float32"]),
        (dict(pattern=HALF, update_block=0), ["update_block", "0"]),
        (dict(pattern=HALF, bits=4), ["bits", "sizes", "4"]),
        (dict(pattern=HALF, sizes=torch.tensor([8])), ["bits", "sizes", "None"]),
        (dict(pattern=HALF, bits=0, sizes=torch.tensor([8])), ["bits", "0"]),
        (dict(pattern=HALF, bits=4, sizes=torch.tensor([7])), ["sizes", "8", "7"]),
        (dict(pattern=Pattern(keep=(2, 4)), order=INTERLEAVED), ["4"]),
        (dict(pattern=HALF, parts=[1, 2]), ["parts", "[1, 2]", "2"]),
    ],
)
def test_bad_arguments_raise_one_line(changed, facts):
    arguments = dict(W=torch.ones(2, 8), order=None) | changed
    W, f = arguments.pop("W"), factor(torch.eye(8), order=arguments.pop("order"))
    with pytest.raises(ValueError) as caught:
        solve(W, f, **arguments)
    assert "\n" not in str(caught.value) and all(fact in str(caught.value) for fact in facts)


def test_a_tail_group_in_the_middle_of_the_order_is_refused():
    # Steps 2..5 would be channels 0..3 and the tail would come first.
    order = torch.tensor([4, 5, 0, 1, 2, 3])
    with pytest.raises(ValueError, match="order"):
        solve(torch.ones(2, 6), factor(torch.eye(6), order=order), pattern=Pattern(keep=(2, 4)))


def sweep_inputs(b: int, R: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    V = torch.randn(b, b, generator=generator).mul_(0.2).triu_(1) + torch.diag(torch.rand(b, generator=generator) + 0.5)
    U = torch.linalg.inv(V.double())
    steps = (U / U.diagonal()[:, None]).triu(1).float()
    mask = torch.rand(b, R, generator=generator) > 0.3
    return torch.randn(b, R, generator=generator), steps, V.diagonal().square(), mask


@pytest.mark.parametrize("b", [1, 4, 13, 40])
@pytest.mark.parametrize("keep", [None, (2, 4), (3, 7)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_sweep_is_the_loop_of_its_contract(b, keep, masked, quantized):
    R = 9
    W1, steps, score, mask = sweep_inputs(b, R)
    grid = [torch.full((b, R), value) for value in (0.3, -5.0, 6.0)] if quantized else [None] * 3
    options = dict(zip(("scale", "low", "high"), grid)) | dict(mask=mask if masked else None, keep=keep)
    values, kept, errors = sweep(W1.clone(), steps, score=None if keep is None else score, **options)

    work, allowed = W1.double(), mask.clone() if masked else torch.ones(b, R, dtype=torch.bool)
    for i in range(b):
        if keep is not None and i % keep[1] == 0:
            stop = min(i + keep[1], b)
            zeros = (stop - i) - math.ceil(keep[0] * (stop - i) / keep[1])
            for r in range(R):
                rank = sorted((allowed[j, r].item(), (work[j, r] ** 2 * score[j]).item(), j) for j in range(i, stop))
                allowed[[j for *_, j in rank[:zeros]], r] = False
        level = torch.clamp(torch.round(work[i] / 0.3), -5, 6) if quantized else work[i]
        level = level * allowed[i]
        e = work[i] - level * (0.3 if quantized else 1)
        # float32 against float64: b steps of growth below 2.
        torch.testing.assert_close(values[i].double(), level, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(errors[i].double(), e, rtol=1e-4, atol=1e-4)
        work -= steps[i].double()[:, None] * e
    assert kept is None if keep is None and not masked else torch.equal(kept, allowed)
    assert not torch.signbit(values[values == 0]).any()


def test_sweep_leaves_its_mask_alone_and_prunes_the_lower_step_on_ties():
    W1, mask = torch.ones(4, 3), torch.ones(4, 3, dtype=torch.bool)
    mask[2, 1] = False
    _, kept, _ = sweep(W1, torch.zeros(4, 4), mask=mask, keep=(2, 4), score=torch.ones(4))
    assert kept.t().int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1]]
    assert mask.sum() == 11
