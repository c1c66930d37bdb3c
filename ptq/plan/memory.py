"""A model of the peak of memory of a run: what is alive in each of its phases, and what the allocator adds.

Sizes of tensors follow from the walk (`ptq.walk`, `ptq.sequential`, `ptq.gram`) and the solvers; with letters T tokens of all windows,
t of a micro-batch, C channels, R rows. Small temporaries are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from lowbit.modules import Linear
from torch import nn

from ptq.architectures import Geometry, Spec
from ptq.head import GROUP
from ptq.recipe import Recipe, moves_channels, prunes, quantizes_activations, wants_sample
from ptq.sample import every_of
from ptq.sites import block_sites
from ptq.walk import PAUSED_BYTES
from ptq.weights import wants_hessian

# glibc gives tensors from this size on pages of their own (`ptq.cli.memory`). Smaller ones share a heap, which grows over holes, and a
# little with every block. Fitted to measured runs: over what was alive by 1.35 to 1.38 times in models of 2 and 3 blocks (512 to 768 wide),
# 1.5 to 1.9 in one of 8 (384 wide), 2.1 in one of 30 (576 wide).
OWN_PAGES = 32 << 20
HEAP, A_DOUBLING = 1.35, 0.15
# How much free memory at its end the heap keeps.
KEPT = 512 << 20


Tensors = list[tuple[float, float]]  # how many, bytes of each


@dataclass(frozen=True)
class Phase:
    """Tensors alive together, and bytes of checkpoint pages that are mapped."""

    name: str
    tensors: Tensors
    mapped: float = 0.0

    @property
    def small(self) -> float:
        """Bytes of tensors that share the heap."""
        return sum(n * size for n, size in self.tensors if size < OWN_PAGES)

    @property
    def large(self) -> float:
        """Bytes of tensors on pages of their own, and of mapped ones."""
        return self.mapped + sum(n * size for n, size in self.tensors if size >= OWN_PAGES)


def peak(phases: list[Phase], *, blocks: int) -> tuple[int, str]:
    """(bytes above the process's own, the phase that needs most of them) of a run over so many blocks."""
    holes = HEAP + A_DOUBLING * math.log2(max(1.0, blocks / 2))
    kept = min(KEPT, holes * max(phase.small for phase in phases))
    most = max(max(holes * phase.small, kept) + phase.large for phase in phases)
    return round(most), max(phases, key=lambda phase: holes * phase.small + phase.large).name


@dataclass(frozen=True)
class Tokens:
    """The calibration set: all tokens, those of a micro-batch of `windows` windows, and channels of a hidden state.

    copies: of the hidden states, two where targets are asymmetric.
    """

    all: int
    batch: int
    windows: int
    channels: int
    copies: int

    def held(self, channels: float) -> tuple[float, float]:
        """Float32 activations of `channels` for all tokens, in micro-batches."""
        return self.copies * self.all / self.batch, 4 * self.batch * channels


def tokens_of(recipe: Recipe, windows: int, channels: int) -> Tokens:
    """windows: of a micro-batch. channels: of a hidden state."""
    cal = recipe.calibration
    copies = 2 if recipe.weights.asymmetric else 1
    return Tokens(cal.nsamples * cal.seqlen, windows * cal.seqlen, windows, channels, copies)


def block_phases(
    block: nn.Module, spec: Spec, geometry: Geometry, recipe: Recipe, tokens: Tokens, *, attention: str, itemsize: int
) -> list[Phase]:
    """Every phase of one block's compression.

    attention: transformers' name of the function that runs. itemsize: bytes of a weight of the source.
    """
    linears = {path: block.get_submodule(path) for site in block_sites(spec, block) for path in site.linears}
    weight_bytes = itemsize * sum(linear.in_features * linear.out_features for linear in linears.values())
    around = [tokens.held(tokens.channels)]  # the states that enter
    if recipe.weights.asymmetric or moves_channels(recipe):
        around.append((len(linears), weight_bytes / len(linears)))  # the block beside, or its permuted weights
    forward = _forward(block, spec, geometry, recipe, tokens, attention, itemsize)
    in_order = recipe.true_sequential or spec.experts is not None
    squares = {site.name: _channels(block, site) ** 2 for site in block_sites(spec, block)}
    phases = [Phase("forward", around + forward + [tokens.held(tokens.channels)], weight_bytes)]
    if wants_sample(recipe):
        seen = sum(_channels(block, site) for site in block_sites(spec, block))
        around.append((2 * len(squares), 4 * tokens.all / every_of(tokens.all) * seen / len(squares)))
    if not in_order and wants_hessian(recipe):
        sums: Tensors = [(1, 8 * square) for square in squares.values()]
        largest = (1, 4 * max(squares.values()))  # what is taken out of one
        phases.append(Phase("Hessians", around + forward + sums + [largest], weight_bytes))
    waiting = list(squares.values())
    for site in block_sites(spec, block):
        if not site.linears:
            continue
        C, R = _channels(block, site), sum(block.get_submodule(path).out_features for path in site.linears)
        if in_order:
            beside = _stopped(block, site, recipe, tokens)
            if wants_hessian(recipe):
                drift: Tensors = [(1, 8 * C**2)] if recipe.weights.asymmetric and site.expert is None else []
                taken: Tensors = [(1, 8 * C**2), (1, 4 * C**2), *drift]
                phases.append(Phase(f"{site.name}: Hessian", around + beside + taken, weight_bytes))
        else:
            beside = [(1.0, 4.0 * square) for square in waiting[1:]] if wants_hessian(recipe) else []
            waiting = waiting[1:]
        for name, matrices, whole in _solver(recipe):
            tensors: Tensors = [(matrices, 4 * R * C), (whole, 4 * C**2)]
            phases.append(Phase(f"{site.name}: {name}", around + beside + tensors, weight_bytes))
    return phases


def _channels(block: nn.Module, site) -> int:
    entry = block.get_submodule(site.entry)
    return entry.in_features if isinstance(entry, Linear) else entry.weight.shape[1]


def _forward(block, spec, geometry: Geometry, recipe: Recipe, tokens: Tokens, attention: str, itemsize: int) -> Tensors:
    """One micro-batch on its way through the block: in the attention or in the MLP, whichever holds more."""
    C, t = tokens.channels, tokens.batch
    linears = [module for module in block.modules() if isinstance(module, Linear)]
    widest = max(linear.in_features for linear in linears)
    scores = 4 * t * recipe.calibration.seqlen * geometry.heads
    rounding = 3 if quantizes_activations(recipe) else 0
    attended: Tensors = [(6, 4 * t * C), (0 if attention == "sdpa" else 3 + rounding / 3, scores)]
    mlp: Tensors = [(3, 4 * t * C), (3 + rounding, 4 * t * widest)]
    unpacked = max(linear.in_features * linear.out_features for linear in linears)
    cast: Tensors = [(1, 4 * unpacked)] if itemsize < 4 or recipe.weights.bits < 16 else []
    return max(attended, mlp, key=lambda tensors: sum(n * size for n, size in tensors)) + cast


def _stopped(block: nn.Module, site, recipe: Recipe, tokens: Tokens) -> Tensors:
    """Forwards that stand at a site: residual, the norm's output and what the linears read, twice where they turn or round it."""
    widest = max(module.in_features for module in block.modules() if isinstance(module, Linear))
    if 4 * tokens.copies * tokens.all * (3 * tokens.channels + widest) > PAUSED_BYTES:
        return [(tokens.copies, 4 * tokens.batch * (3 * tokens.channels + widest))]
    if site.name == "R1":
        return [tokens.held(tokens.channels)]
    changed = recipe.clusters.rotate or recipe.activations.bits < 16
    reads = _channels(block, site) * (2 if changed and site.norm is None else 1)
    return [tokens.held(tokens.channels), tokens.held(tokens.channels), tokens.held(reads)]


def _solver(recipe: Recipe) -> list[tuple[str, int, int]]:
    """(phase, float32 matrices [R, C], float32 matrices [C, C]) of one site's solve."""
    w, p = recipe.weights, recipe.pruning
    if not wants_hessian(recipe):
        return [("solve", 3, 0)] if w.bits < 16 else []
    drift = 1 if w.asymmetric else 0
    found = [("factor", 1, 3 + drift), ("solve", 4, 2 + drift)]
    if prunes(recipe) and p.method in ("admm", "alps"):
        found.append((p.method, 9, 6 + drift))
    if prunes(recipe) and p.refine:
        found.append(("refine", 8, 3 + drift))
    if w.bits < 16 and w.descend:
        found.append(("descend", 9, 3 + drift))
    return found


def outer_phases(rest: dict[str, torch.Tensor], head: dict[str, Linear], recipe: Recipe, tokens: Tokens) -> list[Phase]:
    """The embeddings before the blocks, the head and the writing of the rest after them. rest: tensors outside the blocks."""
    sizes = [tensor.nbytes for tensor in rest.values()]
    cast = [(1, 4 * tensor.numel()) for tensor in rest.values() if tensor.element_size() < 4]
    states = [tokens.held(tokens.channels), (4, 4 * tokens.batch * tokens.channels)]
    phases = [Phase("embeddings", cast + states, max(sizes) if cast else sum(sizes))]
    for linear in head.values():
        n = linear.in_features * linear.out_features
        phases.append(Phase("head", [(4, 4 * n), (1, n), (4, 4 * n / GROUP)], 4 * n))
    return phases + [Phase("writing", [], sum(sizes))]
