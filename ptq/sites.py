"""The sites of a block: where activations are measured, reordered and quantized.

Input sites R1, R3, R4, R5 are the inputs of linears; q, k, v are the projections' outputs (R2 permutes q and k together). The names
are RPTQ's (arXiv 2304.01089, section 3.4); HOUSE words: a site is a place where an activation is quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from lowbit.experts import ROLES
from lowbit.modules import Linear, Norm
from lowbit.sinks import sink_rows
from torch import nn

import rptq
from ptq import distributed
from ptq.architectures import Geometry, Spec, has_experts
from ptq.architectures.geometry import qkv_rows
from ptq.errors import NumericalFailure
from ptq.gram import Gram
from ptq.sample import Sample


@dataclass(frozen=True)
class InputSite:
    """One input shared by `linears`, made by `norm` (or by the block's own arithmetic when None).

    expert: which expert's input this is, that is, only of the tokens routed to it. router: its input is this site's too.
    """

    name: str
    linears: tuple[str, ...]
    norm: str | None
    expert: int | None = None
    router: str | None = None

    @property
    def entry(self) -> str:
        """The module to watch for this input: the first linear, or the router where no linear shares its input."""
        return self.linears[0] if self.linears else self.router


@dataclass(frozen=True)
class OutputSite:
    """q, k or v: `rows` of the output of `module` (a linear, or a head norm whose channels are one head's)."""

    name: str
    module: str
    rows: torch.Tensor


def input_sites(spec: Spec) -> tuple[InputSite, ...]:
    """R1, R3, R4, R5 in the order a block computes them; a parallel block's one norm feeds R1 only."""
    attention, down = InputSite("R3", (spec.output,), None), InputSite("R5", (spec.down,), None)
    if spec.mlp_norm is None:
        return (InputSite("R1", (*spec.qkv_linears, *spec.up), spec.attention_norm), attention, down)
    mlp = InputSite("R4", spec.up, spec.mlp_norm)
    return (InputSite("R1", spec.qkv_linears, spec.attention_norm), attention, mlp, down)


def block_sites(spec: Spec, block: nn.Module) -> tuple[InputSite, ...]:
    """The sites of `block` in the order it reaches them: `input_sites`, or those of a block with experts.

    With experts, R4 is the input that the router and a shared expert see (no linears without a shared expert) and R5 the shared
    expert's inner one. Then come, expert by expert, R4.e<i> (gate and up, on the tokens routed to expert i) and R5.e<i> (down).
    """
    if not has_experts(spec, block):
        return input_sites(spec)
    experts = spec.experts
    sites = [
        InputSite("R1", spec.qkv_linears, spec.attention_norm),
        InputSite("R3", (spec.output,), None),
        InputSite("R4", (experts.shared or ())[:2], spec.mlp_norm, router=experts.router),
    ]
    if experts.shared:
        sites.append(InputSite("R5", experts.shared[2:], None))
    for e in range(block.get_submodule(experts.module).num_experts):
        gate, up, down = (f"{experts.module}.{e}.{role}" for role in ROLES)
        sites += [InputSite(f"R4.e{e}", (gate, up), None, e), InputSite(f"R5.e{e}", (down,), None, e)]
    return tuple(sites)


def output_sites(spec: Spec, geometry: Geometry) -> tuple[OutputSite, ...]:
    """q, k, v: where each is last seen before the rotary embedding."""
    sites = [OutputSite(name, path, rows) for name, (path, rows) in zip("qkv", qkv_rows(spec, geometry))]
    for i, path in enumerate(spec.head_norms or ()):
        sites[i] = OutputSite(sites[i].name, path, torch.arange(geometry.head_dim))
    return tuple(sites)


@dataclass
class Statistics:
    """What one pass over a block measured, by site name: channel ranges, some of the tokens (float32 [S, C]), and of input sites
    H = sum x x^T (float32 [C, C])."""

    ranges: dict[str, rptq.ChannelRange]
    H: dict[str, torch.Tensor]
    samples: dict[str, torch.Tensor] = field(default_factory=dict)


class _LastInput(Exception):
    """The block's last linear has shown its input; its output is not needed for statistics."""


def collect(
    block: nn.Module,
    spec: Spec,
    geometry: Geometry,
    forward: Callable[[], None],
    *,
    ranges: bool,
    hessians: bool,
    where: str,
    sinks: int = 0,
    every: int | None = None,
) -> Statistics:
    """Run `forward` (which calls the block once a micro-batch, each through `until_last_input`) and measure.

    Inputs are measured as the linears use them: rotated and quantized where a linear does so. Of several processes each runs its own
    micro-batches; all get what the whole shows. With `sinks`, ranges and samples leave out the tokens announced as sinks
    (`lowbit.sinks`). every: take every so-manieth token into the samples, None for none.

    Raises:
        NumericalFailure: NaN or infinite activations, with the block and site.
    """
    found = Statistics({}, {})
    grams: dict[str, Gram] = {}
    handles = []

    samples: dict[str, Sample] = {}

    def see(name: str, x: torch.Tensor) -> None:
        if sinks:
            x = x[~sink_rows(x).squeeze(-1)]  # [..., C] -> [T, C]
        try:
            found.ranges[name] = rptq.update(found.ranges.get(name), x)
        except ValueError as err:
            raise NumericalFailure(f"{where}, site {name}: {err}") from err
        if every is not None:
            samples.setdefault(name, Sample(every)).add(x.reshape(-1, x.shape[-1]))  # [..., C] -> [T, C]

    def on_input(site: InputSite, linear: Linear):
        def hook(_, args):
            x = used_input(linear, args[0])
            if ranges:
                see(site.name, x)
            if hessians:
                grams[site.name].add(x)
            if site.name == "R5":
                raise _LastInput

        return hook

    def on_output(site: OutputSite):
        return lambda _, args, y: see(site.name, y[..., site.rows.to(y.device)])

    for site in input_sites(spec):
        linear = block.get_submodule(site.linears[0])
        if hessians:
            grams[site.name] = Gram(linear.in_features, linear.weight.device)
        handles.append(linear.register_forward_pre_hook(on_input(site, linear)))
    if ranges:
        for out in output_sites(spec, geometry):
            handles.append(block.get_submodule(out.module).register_forward_hook(on_output(out)))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    device = linear.weight.device
    channels = {site.name: block.get_submodule(site.linears[0]).in_features for site in input_sites(spec)}
    channels |= {site.name: site.rows.numel() for site in output_sites(spec, geometry)}
    if ranges and distributed.size() > 1:
        found.ranges = {name: _of_all(found.ranges.get(name), count, device) for name, count in channels.items()}
    if ranges and every is not None:
        for name, count in channels.items():
            found.samples[name] = samples.pop(name, Sample(every)).take(count, device)
    for name in list(grams):
        found.H[name], _ = grams.pop(name).take()
    return found


def _of_all(found: rptq.ChannelRange | None, channels: int, device: torch.device) -> rptq.ChannelRange:
    """The range over the tokens of all processes; `found`, this one's, is None where it has no micro-batch."""
    low = torch.full((channels,), torch.inf, device=device) if found is None else found.min
    high = torch.full((channels,), -torch.inf, device=device) if found is None else found.max
    return rptq.ChannelRange(*distributed.extremes(low, high))


def used_input(entry: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x as the site's linears multiply it: rotated and quantized where they do so, which a router never does."""
    return entry.multiplied(x) if isinstance(entry, Linear) else x


def until_last_input(run: Callable[[], object]) -> None:
    """Call `run`, stopping where the block's last linear is reached."""
    try:
        run()
    except _LastInput:
        pass


def norm_of(block: nn.Module, site: InputSite) -> Norm | None:
    """The norm module that makes the site's input, if one does."""
    return None if site.norm is None else block.get_submodule(site.norm)
