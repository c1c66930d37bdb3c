"""How many clusters and weight groups a run will make, as far as recipe and shapes tell.

Tiles of sorted channels are exact. K-means and cuts at the least cost are not: a run makes the number of clusters that the recipe allows,
or a few less, and how wide each is depends on the text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

import rptq
from ptq.architectures import Geometry
from ptq.errors import BadInput
from ptq.recipe import Recipe
from ptq.sites import InputSite
from ptq.weights import groups_of_clusters, widest_group


@dataclass(frozen=True)
class Clusters:
    """Clusters of a site. sizes: int64 [count], near equal where they are not exact."""

    sizes: torch.Tensor
    exact: bool

    @property
    def count(self) -> int:
        return self.sizes.numel()


def clusters_of(site: InputSite, C: int, recipe: Recipe, geometry: Geometry) -> Clusters:
    """The clusters of a site of C channels.

    Raises:
        BadInput: more clusters than channels.
    """
    c = recipe.clusters
    if not recipe.reorder:
        return Clusters(torch.tensor([C]), exact=True)
    heads = (
        geometry.heads if site.name == "R3" else 1
    )  # each head by itself, query heads as the KV head that they share
    channels, count = C // heads, getattr(c, site.name)
    if c.wide is not None:
        same = rptq.ChannelRange(torch.zeros(channels), torch.zeros(channels))
        return Clusters(rptq.sorted_tiles(same, c.tile).sizes.repeat(heads), exact=True)
    if c.tile is not None and site.name != "R3":
        count = min(count, -(-channels // c.tile))
    if count > channels:
        raise BadInput(f"clusters.{site.name}: {count} clusters of {channels} channels; lower it to {channels} or less")
    return Clusters(_equal(channels, count).repeat(heads), exact=False)


def groups_of(site: InputSite, clusters: Clusters, recipe: Recipe) -> torch.Tensor:
    """int64 [G]: the weight groups of the site's linears.

    K-means makes a few wide clusters and many narrow ones. With widths distributed exponentially about their mean mu, a cluster cut into
    groups of at most m has on average sum_k P(width > k m) = 1 / (1 - exp(-m / mu)) of them.
    """
    if clusters.exact or recipe.weights.groups in ("channel", "cluster"):
        return groups_of_clusters(clusters.sizes, recipe)
    C = int(clusters.sizes.sum())
    most, tile = widest_group(C, recipe), recipe.clusters.tile
    if tile is not None and site.name != "R3" and tile % most == 0:  # cuts fall on tiles
        return groups_of_clusters(torch.tensor([C]), recipe)
    return _equal(C, min(C, round(clusters.count / -math.expm1(-most * clusters.count / C))))


def _equal(C: int, count: int) -> torch.Tensor:
    """int64 [count]: C cut into near-equal parts."""
    return torch.tensor([len(part) for part in torch.arange(C).tensor_split(count)])
