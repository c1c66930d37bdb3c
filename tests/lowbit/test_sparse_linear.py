"""The product that skips zeros: its layout, and every path of the kernel against float64."""

from functools import partial

import lowbit
import pytest
import torch
from lowbit.cpu import native
from lowbit.modules import FEW_TOKENS, Linear
from lowbit.sparse_linear import SPARSE, TILE, untiled

needs_library = pytest.mark.skipif(native.library() is None, reason="lowbit's C++ library is not built here")
needs_avx2 = pytest.mark.skipif(not native.fast_avx2(), reason="here no kernel is faster than PyTorch's products")
# A token, fewer than a vector, a panel, panels with a narrow last one; rows that are cut between threads; ragged tiles.
SHAPES = [
    (1, 1, 1),
    (1, 5, 3),
    (3, TILE, 200),
    (31, TILE + 1, 7),
    (64, 2 * TILE, 16),
    (65, 3 * TILE - 1, 33),
    (200, 40, 300),
]


def sparse(R, C, zeros, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(R, C, generator=generator)
    return weight * (torch.rand(R, C, generator=generator) >= zeros)


def inputs(T, C, seed=1):
    return torch.randn(T, C, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_library)])
def without_or_with_library(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(native, "library", lambda: None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 1.0])
def test_tiles_hold_every_nonzero_once(shape, zeros, without_or_with_library):
    _, C, R = shape
    weight = sparse(R, C, zeros)
    tiles = lowbit.sparse_tiles(weight)
    assert tiles.shape == (R, C)
    assert tiles.values.numel() == weight.count_nonzero()
    assert tiles.starts.shape == (-(-C // TILE), R + 1)
    assert torch.equal(untiled(tiles), weight)


@needs_library
def test_both_layouts_are_the_same_bytes(monkeypatch):
    weight = sparse(33, 3 * TILE - 1, 0.5)
    weight[5] = 0  # a row without entries
    built = lowbit.sparse_tiles(weight)
    monkeypatch.setattr(native, "library", lambda: None)
    plain = lowbit.sparse_tiles(weight)
    for name in ("values", "index", "starts"):
        assert torch.equal(getattr(built, name), getattr(plain, name)), name


def kernel(path):
    from lowbit.cpu.sparse_linear import sparse_linear

    return partial(sparse_linear, path=path)


@needs_library
@pytest.mark.parametrize("path", ["portable", "avx2"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_product_is_the_formula(path, shape, biased):
    T, C, R = shape
    weight, x = sparse(R, C, 0.5), inputs(T, C)
    bias = torch.randn(R, generator=torch.Generator().manual_seed(2)) if biased else None
    try:
        y = kernel(path)(x, lowbit.sparse_tiles(weight), bias)
    except ValueError:
        pytest.skip(f"this machine lacks the {path} path")
    expected = x.double() @ weight.double().t() + (bias.double() if biased else 0)
    # A sum of n products is off by at most n rounding errors of the sum of their magnitudes.
    bound = (C + 1) * torch.finfo(torch.float32).eps * (x.abs().double() @ weight.abs().double().t() + 1)
    assert ((y - expected).abs() <= bound).all()


@needs_library
def test_a_token_does_not_see_the_others_nor_the_threads():
    weight, x = lowbit.sparse_tiles(sparse(130, 2 * TILE + 3, 0.6)), inputs(150, 2 * TILE + 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = lowbit.sparse_linear(x, weight)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(lowbit.sparse_linear(x, weight), expected)
        for some in (slice(0, 1), slice(7, 20), slice(100, 150)):
            assert torch.equal(lowbit.sparse_linear(x[some], weight), expected[some])
    finally:
        torch.set_num_threads(before)


def test_leading_shapes_and_empty_inputs(without_or_with_library):
    weight = sparse(6, 10, 0.5)
    tiles = lowbit.sparse_tiles(weight)
    x = inputs(12, 10).view(3, 4, 10).transpose(0, 1)  # not contiguous
    torch.testing.assert_close(lowbit.sparse_linear(x, tiles), x @ weight.t())
    assert lowbit.sparse_linear(torch.empty(0, 10), tiles).shape == (0, 6)
    assert lowbit.sparse_linear(inputs(2, 10), lowbit.sparse_tiles(torch.empty(0, 10))).shape == (2, 0)
    nothing = lowbit.sparse_tiles(torch.empty(6, 0))
    assert torch.equal(lowbit.sparse_linear(torch.empty(2, 0), nothing, torch.ones(6)), torch.ones(2, 6))


def test_nan_and_infinity_reach_only_the_rows_that_use_them(without_or_with_library):
    weight = torch.tensor([[1.0, 0, 2], [0, 3, 0]])
    tiles = lowbit.sparse_tiles(weight)
    if native.library() is None:
        pytest.skip("the product with the whole weight multiplies NaN by zeros too")
    y = lowbit.sparse_linear(torch.tensor([[float("nan"), 1, 1], [1, 1, float("inf")]]), tiles)
    assert y[0].isnan().tolist() == [True, False]
    assert y[1].tolist() == [float("inf"), 3]


@pytest.mark.parametrize(
    ("x", "bias", "said"),
    [
        (torch.zeros(2, 9), None, "x must be torch.float32"),
        (torch.zeros(2, 10, dtype=torch.float64), None, "x must be torch.float32"),
        (torch.zeros(2, 10), torch.zeros(5), "bias must be torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(x, bias, said):
    with pytest.raises(ValueError, match=said):
        lowbit.sparse_linear(x, lowbit.sparse_tiles(sparse(6, 10, 0.5)), bias)


def test_a_weight_that_is_no_float32_matrix_is_refused():
    for weight in (torch.zeros(3, dtype=torch.float32), torch.zeros(3, 3, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="weight must be float32"):
            lowbit.sparse_tiles(weight)


@needs_avx2
@pytest.mark.parametrize("packed", [False, True])
def test_a_linear_skips_zeros_where_there_are_enough(packed):
    weight = sparse(20, 50, 0.5)
    linear = Linear(50, 20, dtype=torch.float32)
    linear.weight = weight.clone()
    linear.bias = torch.arange(20.0)
    if packed:
        linear.pack_sparse_(weight != 0)
    few, many = inputs(FEW_TOKENS - 1, 50), inputs(FEW_TOKENS + 1, 50)
    expected = linear(few), linear(many)
    linear.skip_zeros_()
    assert linear.tiles is not None
    # for few tokens the whole weight is faster, unless it had to be decoded
    assert torch.equal(linear(few), lowbit.sparse_linear(few, linear.tiles, linear.bias) if packed else expected[0])
    torch.testing.assert_close(linear(many), expected[1])
    assert torch.equal(linear(many), lowbit.sparse_linear(many, linear.tiles, linear.bias))
    assert sorted(linear.state_dict()) == sorted(linear._buffers)  # the layout is not stored


@needs_avx2
def test_a_linear_with_few_zeros_or_another_dtype_stays():
    for weight in (sparse(20, 50, SPARSE / 2), sparse(20, 50, 0.9).double()):
        linear = Linear(50, 20, dtype=weight.dtype)
        linear.weight = weight
        linear.skip_zeros_()
        assert linear.tiles is None


@needs_avx2
def test_a_bias_of_the_checkpoint_s_dtype_is_cast():
    linear = Linear(50, 20, dtype=torch.float16)
    linear.weight, linear.bias = sparse(20, 50, 0.5), torch.arange(20.0).half()
    expected = linear(inputs(FEW_TOKENS, 50))
    linear.skip_zeros_()
    assert linear.tiles is not None
    torch.testing.assert_close(linear(inputs(FEW_TOKENS, 50)), expected)


@needs_avx2
def test_gradients_flow_as_before():
    linear = Linear(50, 20, dtype=torch.float32)
    linear.weight = sparse(20, 50, 0.5)
    linear.skip_zeros_()
    x = inputs(FEW_TOKENS, 50).requires_grad_()
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand_as(x))


@needs_avx2
def test_another_dtype_takes_the_whole_weight():
    linear = Linear(50, 20, bias=False, dtype=torch.float32)
    linear.weight = sparse(20, 50, 0.5)
    linear.skip_zeros_()
    x = inputs(FEW_TOKENS, 50)
    torch.testing.assert_close(linear.double()(x.double()), x.double() @ linear.weight.t())


@needs_avx2
def test_skipping_zeros_follows_the_weight():
    linear = Linear(50, 20, bias=False, dtype=torch.float32)
    x = inputs(FEW_TOKENS, 50)
    for seed in (3, 4):
        linear.weight = sparse(20, 50, 0.5, seed)
        linear.skip_zeros_()
        torch.testing.assert_close(linear(x), x @ linear.weight.t())
    linear.weight = torch.ones(20, 50)
    linear.skip_zeros_()
    torch.testing.assert_close(linear(x), x @ linear.weight.t())
