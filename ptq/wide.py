"""Which clusters of a block's inputs have 8 bits: the widest of each site, or those of the block whose rounding costs most.

What a site's error costs the block: its share of the site's output, times what the branch it lies in adds to the residual stream, so
that an error in a branch that says little counts little.
"""

from __future__ import annotations

import torch
from lowbit.modules import ActivationQuantizer
from torch import nn

from ptq.sites import InputSite

WIDE_BITS = 8


def how_many(share: float, clusters: int) -> int:
    """`share` of the clusters, at least one if it is above 0."""
    return max(1, round(share * clusters)) if share else 0


def widest(sizes: torch.Tensor, bits: int, share: float) -> torch.Tensor:
    """int64 [G]: `bits`, but WIDE_BITS, if that is more, for the last `share` of the clusters."""
    widths = torch.full_like(sizes, bits)
    widths[sizes.numel() - how_many(share, sizes.numel()) :] = max(bits, WIDE_BITS)
    return widths


def branches(site: InputSite, sites: tuple[InputSite, ...]) -> tuple[str, ...]:
    """Where what passes `site` is added to the residual stream: R3's linear, R5's, or both in a parallel block, which has no R4."""
    parallel = all(other.name != "R4" for other in sites)
    if site.name == "R1" and parallel:
        return "R3", "R5"
    return ("R3",) if site.name in ("R1", "R3") else ("R5",)


def branch_energies(
    block: nn.Module, sites: tuple[InputSite, ...], samples: dict[str, torch.Tensor]
) -> dict[str, float]:
    """By site, what its branches add to the residual stream: the energy of their last linears' outputs over the sampled tokens."""
    added = {site.name: output_energy(block, site, samples[site.name]) for site in sites if site.name in ("R3", "R5")}
    return {site.name: sum(added[end] for end in branches(site, sites)) for site in sites}


def costliest(costs: dict[str, torch.Tensor], narrow: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """int64 [G] by site: WIDE_BITS for the costliest `share` of all clusters that have a cost, else as in `narrow`.

    costs: by site, float64 [G]. Of equal costs the first counts as higher.
    """
    counts = [cost.numel() for cost in costs.values()]
    flat = torch.cat(list(costs.values()))  # G of each site -> [sum G]
    wide = torch.zeros_like(flat, dtype=torch.bool)
    wide[flat.argsort(descending=True, stable=True)[: how_many(share, flat.numel())]] = True
    return {
        name: torch.where(chosen, WIDE_BITS, narrow[name])  # [G]
        for name, chosen in zip(costs, wide.split(counts))
    }


def rounding_costs(block: nn.Module, site: InputSite, x: torch.Tensor, quantizer: ActivationQuantizer) -> torch.Tensor:
    """What rounding each cluster of x alone does to the site's linears, as a share of their output: float64 [G].

        cost_g = sum_t sum_{c in g} ||W_c||^2 (x_tc - xhat_tc)^2 / sum_t ||W x_t||^2

    W are the weights of all the site's linears, W_c one of their columns: errors of different channels are taken to be independent.
    x: float32 [S, C], some of the site's tokens as the linears see them. quantizer: one that knows its clusters' sizes.
    """
    energy = sum(block.get_submodule(path).weight.double().square().sum(0) for path in site.linears)  # [C]
    error = (quantizer(x) - x).double().square().sum(0) * energy  # [C]
    cluster = torch.arange(quantizer.clusters, device=x.device).repeat_interleave(quantizer.sizes.long())  # [G] -> [C]
    by_cluster = torch.zeros(quantizer.clusters, dtype=torch.float64, device=x.device).index_add(0, cluster, error)
    return by_cluster / max(output_energy(block, site, x), torch.finfo(torch.float64).tiny)


def output_energy(block: nn.Module, site: InputSite, x: torch.Tensor) -> float:
    """sum_t ||W x_t||^2 over the site's linears, without their biases."""
    outputs = (x @ block.get_submodule(path).weight.float().t() for path in site.linears)  # [S, C] -> [S, R]
    return sum(float(y.double().square().sum()) for y in outputs)
