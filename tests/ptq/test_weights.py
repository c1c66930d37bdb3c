"""The weight groups along a linear's input channels."""

import pytest
import torch

import rptq
from ptq.recipe_build import build
from ptq.sites import InputSite
from ptq.weights import group_sizes

SITE = InputSite("R5", ("fc2",), None)
ORDER = rptq.Order(torch.arange(4096), torch.tensor([1, 70, 4025]))


def sizes(C, orders, **options):
    return group_sizes(C, SITE, build(weights={"bits": 4, **options.pop("weights", {})}, **options), orders).tolist()


def test_auto_cuts_wide_clusters_and_leaves_narrow_ones():
    found = sizes(4096, {"R5": ORDER})
    # max(16, 4096 / 128) = 32: the cluster of 70 makes three groups, that of 4025 makes 126, as equal as can be.
    assert found[:4] == [1, 24, 23, 23] and len(found) == 4 + 126 and set(found[4:]) == {31, 32} and sum(found) == 4096


@pytest.mark.parametrize(
    "groups, expected", [("cluster", [1, 70, 4025]), ("channel", [4096]), (2048, [1, 70, 2013, 2012])]
)
def test_the_other_ways(groups, expected):
    assert sizes(4096, {"R5": ORDER}, weights={"groups": groups}) == expected


def test_without_clusters_groups_are_equal():
    assert sizes(256, {}, method="gptq", weights={"groups": 64}) == [64] * 4
    assert sizes(100, {}, method="gptq", weights={"groups": 64}) == [50, 50]


def test_a_group_is_a_tile_where_clusters_are_tiles():
    order = rptq.Order(torch.arange(256), torch.tensor([64, 192]))
    assert sizes(256, {"R5": order}, clusters={"tile": 64}) == [64] * 4
