"""Permutations: algebra, and that folding them into the weights changes no output."""

import pytest
import torch
from torch.nn.functional import layer_norm, relu

from rptq import (
    Order,
    check_permutation,
    compose,
    expand_to_query_groups,
    inverse,
    per_head_order,
    permute_columns,
    permute_rows,
    rotary_pairs_kept,
)

# Permuting only reorders the terms of a sum: float64 rounding of a few dozen terms of size 1 stays far below this.
SAME = dict(rtol=0, atol=1e-12)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_perm(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def test_inverse_and_compose_follow_indexing():
    x, a, b = random(3, 8), random_perm(8, 1), random_perm(8, 2)
    assert torch.equal(x[:, a][:, inverse(a)], x)
    assert torch.equal(x[:, compose(a, b)], x[:, a][:, b])


@pytest.mark.parametrize("bad", [[0, 0, 2], [0, 1, 3], [-1, 0, 1]])
def test_what_is_no_permutation_is_refused(bad):
    with pytest.raises(ValueError, match="1 of them missing"):
        check_permutation(torch.tensor(bad), 3)
    with pytest.raises(ValueError):
        permute_columns(torch.zeros(2, 3), torch.tensor(bad))


def test_a_permutation_of_another_size_or_dtype_is_refused():
    with pytest.raises(ValueError, match=r"int64 \[4\]"):
        check_permutation(torch.arange(3), 4)
    with pytest.raises(ValueError, match="int32"):
        check_permutation(torch.arange(3, dtype=torch.int32), 3)


def test_order_refuses_empty_clusters_and_wrong_sums():
    with pytest.raises(ValueError, match="positive"):
        Order(torch.arange(3), torch.tensor([3, 0]))
    with pytest.raises(ValueError, match="sum to 3"):
        Order(torch.arange(3), torch.tensor([1, 1]))


def test_r1_r4_norm_output_into_linear():
    x, weight, perm = random(5, 12), random(7, 12, seed=3), random_perm(12)
    gamma, beta = random(12, seed=1), random(12, seed=2)
    out = layer_norm(x, (12,), gamma, beta)
    torch.testing.assert_close(out[:, perm] @ permute_columns(weight, perm).T, out @ weight.T, **SAME)


def test_r2_scores():
    x, perm = random(5, 12), random_perm(8)
    w_q, w_k, b_q = random(8, 12, seed=1), random(8, 12, seed=2), random(8, seed=3)
    (v_q, c_q), (v_k, none) = permute_rows(w_q, b_q, perm), permute_rows(w_k, None, perm)
    assert none is None
    torch.testing.assert_close((x @ v_q.T + c_q) @ (x @ v_k.T).T, (x @ w_q.T + b_q) @ (x @ w_k.T).T, **SAME)


def test_r3_values_into_output():
    x, probs, perm = random(5, 12), random(5, 5, seed=1).softmax(-1), random_perm(8)
    w_v, b_v, w_o = random(8, 12, seed=2), random(8, seed=3), random(12, 8, seed=4)
    v_v, c_v = permute_rows(w_v, b_v, perm)
    expected = probs @ (x @ w_v.T + b_v) @ w_o.T
    torch.testing.assert_close(probs @ (x @ v_v.T + c_v) @ permute_columns(w_o, perm).T, expected, **SAME)


def test_r5_relu_between_linears():
    x, perm = random(5, 12), random_perm(20)
    w1, b1, w2 = random(20, 12, seed=1), random(20, seed=2), random(12, 20, seed=3)
    v1, c1 = permute_rows(w1, b1, perm)
    expected = relu(x @ w1.T + b1) @ w2.T
    torch.testing.assert_close(relu(x @ v1.T + c1) @ permute_columns(w2, perm).T, expected, **SAME)


@pytest.mark.parametrize("n_kv, rep", [(1, 4), (2, 3), (3, 1)])
def test_grouped_query_attention_is_unchanged(n_kv, rep):
    T, D = 5, 8
    n_q = n_kv * rep
    order_kv = per_head_order(random(n_kv, D, 2).sort(-1, descending=True).values, 3)
    order_q = expand_to_query_groups(order_kv, n_kv=n_kv, n_query_per_kv=rep)
    assert order_q.sizes.sum() == n_q * D and order_q.sizes.numel() == rep * order_kv.sizes.numel()

    def attend(q, k, v, w_o):
        q = q.view(T, n_q, D).transpose(0, 1)  # [T, Hq*D] -> [Hq, T, D]
        k, v = (t.view(T, n_kv, D).transpose(0, 1).repeat_interleave(rep, dim=0) for t in (k, v))  # -> [Hq, T, D]
        out = (q @ k.mT).softmax(-1) @ v
        return out.transpose(0, 1).reshape(T, n_q * D) @ w_o.T  # [Hq, T, D] -> [T, Hq*D]

    q, w_o = random(T, n_q * D, seed=1), random(6, n_q * D)
    k, v = random(T, n_kv * D, seed=2), random(T, n_kv * D, seed=3)
    reordered = attend(q[:, order_q.perm], k[:, order_kv.perm], v[:, order_kv.perm], permute_columns(w_o, order_q.perm))
    torch.testing.assert_close(reordered, attend(q, k, v, w_o), **SAME)


def test_expanding_repeats_the_clusters_of_each_head():
    order = Order(torch.tensor([2, 0, 1, 3, 5, 4]), torch.tensor([1, 2, 3]))  # two KV heads of 3 channels
    expanded = expand_to_query_groups(order, n_kv=2, n_query_per_kv=2)
    assert expanded.perm.tolist() == [2, 0, 1, 5, 3, 4, 6, 8, 7, 9, 11, 10]
    assert expanded.sizes.tolist() == [1, 2, 1, 2, 3, 3]


def test_expanding_refuses_what_crosses_a_head():
    with pytest.raises(ValueError, match="across heads"):
        expand_to_query_groups(Order(torch.tensor([2, 1, 0, 3]), torch.tensor([2, 2])), n_kv=2, n_query_per_kv=2)
    with pytest.raises(ValueError, match="boundaries"):
        expand_to_query_groups(Order(torch.arange(4), torch.tensor([1, 2, 1])), n_kv=2, n_query_per_kv=2)


def rotate(x, half):
    """Rotary embedding of x [T, D] with all D channels rotating; half: pairs (i, i + D/2), else pairs (2i, 2i + 1)."""
    T, D = x.shape
    angle = torch.arange(T)[:, None] / 10 ** torch.linspace(0, 2, D // 2, dtype=torch.float64)  # [T, D/2]
    a, b = x.chunk(2, dim=1) if half else (x[:, 0::2], x[:, 1::2])
    pair = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return torch.cat(pair, dim=1) if half else torch.stack(pair, dim=2).flatten(1)  # -> [T, D]


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(
    "perm", [[0, 1, 2, 3, 4, 5], [3, 4, 5, 0, 1, 2], [1, 0, 3, 2, 5, 4], [1, 0, 2, 4, 3, 5], [2, 3, 0, 1, 4, 5]]
)
def test_rotary_check_agrees_with_attention_scores(half, perm):
    q, k, perm = random(4, 6, seed=1), random(4, 6, seed=2), torch.tensor(perm)
    expected = rotate(q, half) @ rotate(k, half).T
    unchanged = torch.allclose(rotate(q[:, perm], half) @ rotate(k[:, perm], half).T, expected)
    assert rotary_pairs_kept(perm, head_dim=6, rotary_dim=6) == unchanged


def test_rotary_check_leaves_the_rest_of_a_head_free():
    perm = torch.tensor([0, 1, 3, 2, 4, 5, 6, 7])
    assert rotary_pairs_kept(perm, head_dim=4, rotary_dim=2)
    assert not rotary_pairs_kept(perm, head_dim=4, rotary_dim=3)
    crossing = torch.tensor([0, 1, 2, 7, 4, 5, 6, 3])
    assert not rotary_pairs_kept(crossing, head_dim=4, rotary_dim=2)
