"""Which weight groups have twice the bits."""

from __future__ import annotations

import pytest
import torch
from lowbit.modules import Linear
from torch import nn

from ptq.consistency import check_packed
from ptq.errors import BadInput
from ptq.fine import fine_groups, grid_costs
from ptq.recipe_build import build
from ptq.sites import InputSite

SITES = (
    InputSite("R1", ("qkv",), None),
    InputSite("R3", ("out",), None),
    InputSite("R4", ("up", "gate"), None),
    InputSite("R5", ("down",), None),
)
SHAPES = {"qkv": (24, 32), "out": (32, 32), "up": (64, 32), "gate": (64, 32), "down": (32, 64)}
SIZES = {"R1": [16, 16], "R3": [16, 16], "R4": [8, 24], "R5": [16, 16, 32]}


@pytest.fixture
def block():
    torch.manual_seed(0)
    made = nn.ModuleDict({name: Linear(C, R, bias=False) for name, (R, C) in SHAPES.items()})
    for module in made.values():
        module.weight = torch.randn(module.out_features, module.in_features)
    return made


@pytest.fixture
def samples(block):
    return {site.name: torch.randn(40, block[site.linears[0]].in_features) for site in SITES}


def chosen(block, samples, share):
    sizes = {name: torch.tensor(of_site) for name, of_site in SIZES.items()}
    found = fine_groups(block, SITES, samples, sizes, bits=4, share=share)
    return {name: flags.tolist() for name, flags in found.items()}


def test_a_cost_is_what_rounding_does_to_the_output(block):
    x, sizes, W = torch.randn(2000, 32), torch.tensor([8, 24]), block["up"].weight
    W[:, :8] *= 3
    for cost, start, stop in zip(grid_costs(W, x, sizes, 6).tolist(), (0, 8), (8, 32)):
        part = W[:, start:stop]
        step = (part.amax(1) - part.amin(1))[:, None] / 63
        lost = (x[:, start:stop] @ (torch.round(part / step) * step - part).t()).square().sum()
        # Errors are taken to be uniform; 6 bits make them so within a few percent on 64 rows.
        assert cost == pytest.approx(float(lost / (x @ W.t()).square().sum()), rel=0.1)


def test_the_costliest_that_fit_share_the_budget(block, samples):
    weights = sum(R * C for R, C in SHAPES.values())
    assert not any(sum(flags) for flags in chosen(block, samples, 0.0).values())
    assert all(all(flags) for flags in chosen(block, samples, 1.0).values())
    block["down"].weight[:, 32:] *= 3
    samples["R1"][:, :16] *= 20
    added = {"R3": output(block["out"], samples["R3"]), "R5": output(block["down"], samples["R5"])}
    branch = {"R1": "R3", "R3": "R3", "R4": "R5", "R5": "R5"}
    groups = []
    for site in SITES:
        for path in site.linears:
            W, sizes = block[path].weight, SIZES[site.name]
            costs = grid_costs(W, samples[site.name], torch.tensor(sizes), 4) * added[branch[site.name]]
            groups += [(float(c) / (n * len(W)), path, g, n * len(W)) for g, (c, n) in enumerate(zip(costs, sizes))]
    groups.sort(reverse=True)
    expected = {path: [False] * len(SIZES[site.name]) for site in SITES for path in site.linears}
    for _, path, g, _ in groups[:3]:
        expected[path][g] = True
    exactly = sum(count for *_, count in groups[:3]) / weights
    assert chosen(block, samples, exactly) == expected
    # what does not fit is passed over, not the end
    found = chosen(block, samples, (groups[0][3] - 1) / weights)
    assert not found[groups[0][1]][groups[0][2]] and sum(map(sum, found.values()))


def output(module, x):
    return float((x @ module.weight.t()).double().square().sum())


def test_a_branch_that_says_little_has_no_fine_groups(block, samples):
    block["down"].weight *= 1e-4
    samples["R3"] *= 10
    found = chosen(block, samples, 0.2)  # R1 and R3 have 0.23 of the weights
    assert not any(found["up"] + found["gate"] + found["down"]) and any(found["qkv"] + found["out"])


@pytest.mark.parametrize("fine", [[1, 0], [0, 0], [0, 2], [-1, 0], [0]])
def test_damaged_fine_groups_are_refused(fine):
    module = Linear(8, 2, bias=False)
    module.weight = torch.zeros(2, 8)
    grids = torch.ones(2, 2).half(), torch.zeros(2, 2), torch.tensor([4, 4])
    module.pack_(torch.ones(2, 8, dtype=torch.uint8), *grids, 4, fine=torch.tensor([True, True]))
    module.weight_fine = torch.tensor(fine, dtype=torch.int32)
    with pytest.raises(
        BadInput, match="down: weight_fine .* of 2 groups and 4 bits is not 8 channels; the checkpoint is"
    ):
        check_packed(nn.ModuleDict({"down": module}), "folder")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "rptq", "weights": {"fine": 0.1}}, "weights.fine: chooses among sorted tiles for gptq"),
        ({"method": "rptq+", "weights": {"fine": 0.1, "solver": "rtn", "asymmetric": 0}}, "weights.fine: chooses"),
        ({"method": "rptq+", "weights": {"fine": 1.5}}, "weights.fine: 1.5 is not a number between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(BadInput, match=words):
        build(preset="W4A4KV4", **options)
