"""Which weight groups of a block are fine, that is, have twice the bits: those where a coarse grid costs the block most for its bits.

Each linear's groups count by themselves: a share of all weights is small beside a tile of all the rows that read one input.
"""

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
    """bool [G] by linear: the groups that cost most for their number of weights, of those that fit into `share` of all weights.

    samples: by site, float32 [S, C], some tokens as its linears see them. sizes: by site, int64 [G], channels of its weight groups.
    bits: of the other groups.
    """
    energies = wide.branch_energies(block, sites, samples)
    fine, groups, total = {}, [], 0
    for site in sites:
        of_site = sizes[site.name]
        for path in site.linears:
            weight = block.get_submodule(path).weight
            costs = grid_costs(weight, samples[site.name], of_site, bits) * energies[site.name]
            counts = of_site * weight.shape[0]
            groups += zip((costs.cpu() / counts).tolist(), counts.tolist(), [path] * len(counts), range(len(counts)))
            fine[path] = torch.zeros_like(of_site, dtype=torch.bool)
            total += weight.numel()
    left = round(share * total)
    for _, count, path, g in sorted(groups, key=lambda group: -group[0]):
        if count <= left:
            fine[path][g] = True
            left -= count
    return fine


def grid_costs(weight: torch.Tensor, x: torch.Tensor, sizes: torch.Tensor, bits: int) -> torch.Tensor:
    """What rounding each group of a weight [R, C] does to its output, as a share of it: float64 [G].

        cost_g = sum_r (range_rg / (2^b - 1))^2 / 12 * sum_t sum_{c in g} x_tc^2 / sum_t ||W x_t||^2

    Errors within a step are taken to be uniform and independent. x: float32 [S, C]. sizes: int64 [G].
    """
    parts = sizes.tolist()
    energy = torch.stack([part.sum() for part in x.double().square().sum(0).split(parts)])  # [C] -> [G]
    ranges = [part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0) for part in weight.double().split(parts, 1)]
    steps = torch.stack([(r / (2**bits - 1)).square().sum() for r in ranges])  # G x [R] -> [G]
    output = (x @ weight.float().t()).double().square().sum()  # [S, C] -> [S, R] -> []
    return steps * energy / 12 / output.clamp(min=torch.finfo(torch.float64).tiny)
