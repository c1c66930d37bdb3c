"""K-means clustering of channels by their ranges (RPTQ, arXiv 2304.01089)."""

from __future__ import annotations

import torch
from torch import Tensor

from rptq.heads import join_heads
from rptq.order import Order


def kmeans_order(features: Tensor, n_clusters: int, *, seed: int = 0) -> Order:
    """Reorder channels so that those of like range are neighbours (RPTQ, arXiv 2304.01089).

    features: [C, F], columns in (max, min) pairs, from range_features or joint_features. Clusters ascend by their mean
    width (max - min, summed over the pairs); within a cluster the channels keep their order. Fewer clusters come back
    where fewer distinct channels exist; none is ever empty. Returns int64 tensors on the features' device.
    The same features and seed give the same order on any number of threads. ValueError if n_clusters is below 1 or
    above C, if F is odd or zero, or if a feature is not finite.
    """
    if features.ndim != 2 or features.shape[1] == 0 or features.shape[1] % 2:
        raise ValueError(f"features must be [C, F] in (max, min) pairs, got {list(features.shape)}")
    if not 1 <= n_clusters <= features.shape[0]:
        raise ValueError(f"{n_clusters} clusters of {features.shape[0]} channels; ask for 1 to {features.shape[0]}")
    if not torch.isfinite(features).all():
        raise ValueError(f"{int((~torch.isfinite(features)).sum())} features are NaN or infinite; clean the ranges")
    points = features.detach().cpu().double()
    labels = _by_width(points, _labels(points, n_clusters, seed))
    order = Order(labels.argsort(stable=True), labels.bincount())
    return Order(order.perm.to(features.device), order.sizes.to(features.device))


def per_head_order(features: Tensor, n_clusters: int, *, seed: int = 0) -> Order:
    """kmeans_order of each head on its own, joined into one order over H*D channels: no channel leaves its head.

    features: [H, D, F]. n_clusters counts the clusters of one head. Raises as kmeans_order does.
    """
    if features.ndim != 3 or features.shape[0] == 0:
        raise ValueError(f"features must be [H, D, F] with at least one head, got {list(features.shape)}")
    return join_heads([kmeans_order(head, n_clusters, seed=seed) for head in features])


def _labels(points: Tensor, n_clusters: int, seed: int) -> Tensor:
    """Cluster of each point, int64 [C]; labels may leave gaps."""
    distinct, labels = points.unique(dim=0, return_inverse=True)
    if distinct.shape[0] <= n_clusters:
        return labels
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    # More threads would add the centres up in another order, and a last bit can move a channel.
    with threadpool_limits(limits=1):
        fitted = KMeans(n_clusters, n_init=10, random_state=seed).fit(points.numpy())
    return torch.from_numpy(fitted.labels_).long()


def _by_width(points: Tensor, labels: Tensor) -> Tensor:
    """Labels renamed to 0 .. G-1, ascending by mean cluster width, then by first channel; gaps closed."""
    width = (points[:, 0::2] - points[:, 1::2]).sum(1)  # [C, F] -> [C]
    names = labels.unique().tolist()
    first = {name: int((labels == name).nonzero()[0]) for name in names}
    ascending = sorted(names, key=lambda name: (float(width[labels == name].mean()), first[name]))
    renamed = torch.empty_like(labels)
    for rank, name in enumerate(ascending):
        renamed[labels == name] = rank
    return renamed
