"""Scale the channels of every input so that activation and weight share their size, and fold that into the block.

R1, R4   divided in the norm, multiplied in its consumers' columns
R3       divided in the value projection's rows, multiplied in the output projection's columns; query heads of a KV head share factors
R5       divided in the up projection's rows, multiplied in the down projection's columns, where a factor passes what lies between
"""

from __future__ import annotations

import torch
from lowbit.modules import Linear, Norm
from torch import nn

import rptq
from ptq.architectures import Geometry, Spec
from ptq.architectures.geometry import qkv_rows
from ptq.sites import InputSite, Statistics, input_sites, norm_of


def balance(block: nn.Module, spec: Spec, geometry: Geometry, found: Statistics) -> Statistics:
    """Balance the block in place by `rptq.balance_factors`, its function unchanged up to rounding; returns what `found` is then.

    found: ranges and samples of the block as it is.
    """
    factors = {}
    for site in input_sites(spec):
        s = _factors(block, site, geometry, found.samples[site.name])
        if site.norm is not None and norm_of(block, site).weight is not None:
            divide_norm(norm_of(block, site), s)
        elif site.name == "R3":
            v, rows = qkv_rows(spec, geometry)[2]
            factors["v"] = s.view(geometry.kv_heads, -1, geometry.head_dim)[
                :, 0
            ].flatten()  # [H D] -> [KV, H/KV, D] -> [KV D]
            _divide_rows(block.get_submodule(v), rows, factors["v"])
        elif site.name == "R5" and geometry.scaled_up is not None:
            up = block.get_submodule(geometry.scaled_up)
            _divide_rows(up, torch.arange(up.out_features), s)
        else:
            continue
        factors[site.name] = s
        multiply_columns(block, site, s)
    return _scaled(found, factors)


def _factors(block: nn.Module, site: InputSite, geometry: Geometry, x: torch.Tensor) -> torch.Tensor:
    """float32 [C], at R3 equal over the query heads that share a KV head."""
    energy = x.double().square().mean(0)  # [C]
    weight_energy = sum(block.get_submodule(path).weight.double().square().sum(0) for path in site.linears)  # [C]
    if site.name != "R3":
        return rptq.balance_factors(energy, weight_energy)
    shape = geometry.kv_heads, -1, geometry.head_dim
    grouped = (t.view(shape).sum(1).flatten() for t in (energy, weight_energy))  # [H D] -> [KV, H/KV, D] -> [KV D]
    s = rptq.balance_factors(*grouped).view(geometry.kv_heads, 1, geometry.head_dim)
    return s.expand(-1, geometry.heads // geometry.kv_heads, -1).flatten()  # [KV, 1, D] -> [KV, H/KV, D] -> [H D]


def divide_norm(norm: Norm, s: torch.Tensor) -> None:
    """Fold 1 / s into the norm, rounded to the dtype it is stored in, so that what is measured next is what is saved."""
    one = 1.0 if norm.kind == "rmsnorm_plus_one" else 0.0
    if norm.weight is not None:
        norm.weight = ((norm.weight.float() + one) / s - one).to(norm.weight.dtype)
    if norm.bias is not None:
        norm.bias = (norm.bias.float() / s).to(norm.bias.dtype)


def multiply_columns(block: nn.Module, site: InputSite, s: torch.Tensor) -> None:
    """Multiply the columns of the site's linears by s, for an input that is divided by it."""
    for path in site.linears:
        linear = block.get_submodule(path)
        linear.weight = (linear.weight.float() * s).to(linear.weight.dtype)


def _divide_rows(linear: Linear, rows: torch.Tensor, s: torch.Tensor) -> None:
    """Divide those rows of the weight, and of the bias if there is one, by s."""
    rows = rows.to(s.device)
    divisor = torch.ones(linear.out_features, device=s.device).index_copy(0, rows, s)
    linear.weight = (linear.weight.float() / divisor[:, None]).to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias = (linear.bias.float() / divisor).to(linear.bias.dtype)


def _scaled(found: Statistics, factors: dict[str, torch.Tensor]) -> Statistics:
    ranges, samples = dict(found.ranges), dict(found.samples)
    for name, s in factors.items():
        ranges[name] = rptq.ChannelRange(ranges[name].min / s, ranges[name].max / s)
        samples[name] = samples[name] / s
    return Statistics(ranges, {}, samples)
