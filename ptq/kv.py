"""The key and value grids of a compressed model, as the packed cache wants them."""

from __future__ import annotations

import torch
from lowbit.cache import KVGrid
from lowbit.modules import ActivationQuantizer
from torch import nn

from ptq.architectures import Geometry, Spec, geometry_of
from ptq.sites import OutputSite, output_sites


def packed_kv_grids(model: nn.Module, spec: Spec, bits: int) -> list[KVGrid] | None:
    """One KVGrid a block, or None where keys and values are not on static grids (full precision, dynamic codecs)."""
    if bits >= 16:
        return None
    geometry = geometry_of(model.config, spec)
    _, k_site, v_site = output_sites(spec, geometry)
    grids = []
    for block in model.get_submodule(spec.blocks):
        k, v = _quantizer(block, k_site), _quantizer(block, v_site)
        if k is None or v is None or k.mode != "static" or v.mode != "static":
            return None
        k_scale, k_zero = _by_head(k, k_site, geometry)
        v_scale, v_zero = _by_head(v, v_site, geometry)
        grids.append(
            KVGrid(
                key_scale=k_scale,
                key_zero=k_zero,
                value_scale=v_scale,
                value_zero=v_zero,
                bits=bits,
                rotary=spec.rotary,
                rotary_dim=geometry.rotary_dim,
                sinks=k.sinks,
            )
        )
    return grids


def _quantizer(block: nn.Module, site: OutputSite) -> ActivationQuantizer | None:
    module = block.get_submodule(site.module)
    return module.quantizer if hasattr(module, "quantizer") else module.output_quantizer


def _by_head(quantizer: ActivationQuantizer, site: OutputSite, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero) float32 [H, D]; a head norm's grid is shared by the heads."""
    rows = site.rows.to(quantizer.scale.device)
    sizes = quantizer.sizes.long()
    scale, zero = (t.repeat_interleave(sizes)[rows] for t in (quantizer.scale, quantizer.zero))  # [G] -> [R] -> [H D]
    shape = (-1, geometry.head_dim)
    return tuple(t.view(shape).expand(geometry.kv_heads, -1) for t in (scale, zero))  # [H D] -> [H, D]
