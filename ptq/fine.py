"""Which weight groups of a block are fine, that is, have twice the bits: those where a coarse grid costs the block most for its bits."""

from __future__ import annotations

import torch
from torch import nn

from ptq import wide
from ptq.sites import InputSite


def fine_groups(
    block: nn.Module,
    sites: tuple[InputSite, ...],
    samples: dict[str, torch.Tensor],
    sizes: dict[str, torch.Tensor],
    *,
    bits: int,
    share: float,
) -> dict[str, torch.Tensor]:
    """bool [G] by site: of all groups the costliest a weight, as many as fit into `share` of the sites' weights.

    samples: by site, float32 [S, C], some tokens as its linears see them. sizes: by site, int64 [G], channels of its weight groups.
    bits: of the other groups.
    """
    energies = wide.branch_energies(block, sites, samples)
    costs, weights = {}, {}
    for site in sites:
        rows = sum(block.get_submodule(path).out_features for path in site.linears)
        weights[site.name] = sizes[site.name] * rows
        cost = grid_costs(block, site, samples[site.name], sizes[site.name], bits).cpu() * energies[site.name]
        costs[site.name] = cost / weights[site.name]
    counts = [cost.numel() for cost in costs.values()]
    each = torch.cat(list(weights.values()))  # G of each site -> [sum G]
    by_cost = torch.cat(list(costs.values())).argsort(descending=True, stable=True)
    fits = each[by_cost].cumsum(0) <= round(share * int(each.sum()))
    fine = torch.zeros_like(fits).index_copy_(0, by_cost, fits)
    return dict(zip(costs, fine.split(counts)))


def grid_costs(block: nn.Module, site: InputSite, x: torch.Tensor, sizes: torch.Tensor, bits: int) -> torch.Tensor:
    """What rounding each weight group does to the site's linears, as a share of their output: float64 [G].

        cost_g = sum_r (range_rg / (2^b - 1))^2 / 12 * sum_t sum_{c in g} x_tc^2 / sum_t ||W x_t||^2

    over the rows of all the site's linears: errors of a step's width are taken to be uniform and independent. x: float32 [S, C].
    """
    parts = sizes.tolist()
    energy = torch.stack([part.sum() for part in x.double().square().sum(0).split(parts)])  # [C] -> [G]
    steps = torch.zeros_like(energy)
    for path in site.linears:
        groups = block.get_submodule(path).weight.double().split(parts, dim=1)  # [R, C] -> G x [R, n]
        ranges = [part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0) for part in groups]  # G x [R]
        steps += torch.stack([(r / (2**bits - 1)).square().sum() for r in ranges])
    return steps * energy / 12 / max(wide.output_energy(block, site, x), torch.finfo(torch.float64).tiny)
