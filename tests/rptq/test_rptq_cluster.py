import warnings

import pytest
import torch

from rptq import ChannelRange, joint_features, kmeans_order, merge_query_groups, per_head_order, range_features


def random_features(channels, seed=0):
    values = torch.randn(channels, 2, generator=torch.Generator().manual_seed(seed))
    return values.sort(1, descending=True).values


def groups(order):
    return {frozenset(part.tolist()) for part in order.perm.split(order.sizes.tolist())}


def test_clusters_are_those_of_sklearn():
    from sklearn.cluster import KMeans

    features = random_features(60)
    labels = torch.from_numpy(KMeans(5, n_init=10, random_state=3).fit(features.double().numpy()).labels_)
    order = kmeans_order(features, 5, seed=3)
    assert groups(order) == {frozenset((labels == g).nonzero().flatten().tolist()) for g in range(5)}
    assert order.perm.dtype == order.sizes.dtype == torch.int64


def test_clusters_ascend_by_width_and_keep_channel_order():
    features = random_features(60)
    order = kmeans_order(features, 6)
    parts = order.perm.split(order.sizes.tolist())
    widths = [float((features[part, 0] - features[part, 1]).mean()) for part in parts]
    assert widths == sorted(widths)
    assert all(torch.equal(part, part.sort().values) for part in parts)


def test_same_bytes_on_any_number_of_threads():
    from threadpoolctl import threadpool_limits

    features, orders = random_features(700), []
    for count in (1, 2):
        with threadpool_limits(limits=count):
            orders.append(kmeans_order(features, 16))
    assert torch.equal(orders[0].perm, orders[1].perm) and torch.equal(orders[0].sizes, orders[1].sizes)


@pytest.mark.parametrize("n_clusters", [3, 4, 9])
def test_fewer_distinct_channels_than_clusters(n_clusters):
    # Clusters without a channel once reached a minimum over nothing.
    features = torch.tensor([[2.0, -2.0], [1.0, -1.0], [2.0, -2.0]]).repeat(3, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        order = kmeans_order(features, n_clusters)
    assert order.perm.tolist() == [1, 4, 7, 0, 2, 3, 5, 6, 8] and order.sizes.tolist() == [3, 6]


def test_one_channel_and_all_constant():
    assert kmeans_order(torch.zeros(1, 2), 1).sizes.tolist() == [1]
    assert kmeans_order(torch.zeros(5, 2), 3).sizes.tolist() == [5]


def test_bfloat16_features():
    features = random_features(20).bfloat16()
    assert torch.equal(kmeans_order(features, 4).perm, kmeans_order(features.float(), 4).perm)


def test_refusals_name_the_numbers():
    with pytest.raises(ValueError, match="9 clusters of 8 channels"):
        kmeans_order(torch.zeros(8, 2), 9)
    with pytest.raises(ValueError, match="0 clusters of 8"):
        kmeans_order(torch.zeros(8, 2), 0)
    with pytest.raises(ValueError, match="1 features are NaN"):
        kmeans_order(torch.tensor([[1.0, float("nan")]]), 1)
    with pytest.raises(ValueError, match=r"pairs, got \[8, 3\]"):
        kmeans_order(torch.zeros(8, 3), 2)


def test_channels_never_cross_heads():
    features = random_features(4 * 16).view(4, 16, 2)
    order = per_head_order(features, 3, seed=1)
    assert torch.equal(order.perm // 16, torch.arange(4).repeat_interleave(16))
    for h in range(4):
        alone = kmeans_order(features[h], 3, seed=1)
        assert torch.equal(order.perm[16 * h : 16 * h + 16], alone.perm + 16 * h)
        assert torch.equal(order.sizes[3 * h : 3 * h + 3], alone.sizes)


def test_range_features_are_max_then_min():
    assert range_features(ChannelRange(torch.tensor([-1.0]), torch.tensor([3.0]))).tolist() == [[3.0, -1.0]]


def test_the_larger_tensor_does_not_decide_alone():
    # q separates even from odd channels, k the first from the last four; on raw values k, 1000 times as large, wins.
    even = torch.arange(8) % 2 == 0
    early = torch.arange(8) < 4
    q = torch.where(even, 1.0, 0.2)
    k = torch.where(early, 1000.0, 500.0)
    q, k = ChannelRange(-q, q), ChannelRange(-k, k)
    assert groups(kmeans_order(joint_features(q, k), 2)) == {frozenset({0, 2, 4, 6}), frozenset({1, 3, 5, 7})}
    raw = torch.cat([range_features(q), range_features(k)], dim=1)
    assert groups(kmeans_order(raw, 2)) == {frozenset({0, 1, 2, 3}), frozenset({4, 5, 6, 7})}


def test_joint_features_survive_a_zero_tensor_and_refuse_other_counts():
    zero, one = (ChannelRange(torch.zeros(n), torch.zeros(n)) for n in (3, 4))
    assert torch.equal(joint_features(zero, zero), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        joint_features(zero, one)


def test_query_groups_merge_over_the_heads_of_a_kv_head():
    low = -torch.arange(1.0, 13.0)  # two KV heads, three query heads each, head dim 2
    merged = merge_query_groups(ChannelRange(low, -low), n_kv=2, n_query_per_kv=3)
    assert merged.max.tolist() == [5.0, 6.0, 11.0, 12.0] and merged.min.tolist() == [-5.0, -6.0, -11.0, -12.0]
    with pytest.raises(ValueError, match="12 channels do not divide into 10 heads"):
        merge_query_groups(ChannelRange(low, -low), n_kv=2, n_query_per_kv=5)
