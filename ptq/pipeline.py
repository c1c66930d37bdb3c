"""The walk: block by block, collect -> reorder -> solve -> pack -> propagate, one block in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptq import quantizers, reorder, weights
from ptq.architectures import Geometry, Spec, geometry_of, spec_for
from ptq.blocks import Call, load_block, record_calls, run_block, skeleton, tensor_names
from ptq.calibration import Calibration, calibration_windows
from ptq.card import model_card
from ptq.checkpoint import Writer, load_tokenizer
from ptq.errors import BadInput, NumericalFailure
from ptq.identity import identity_of
from ptq.ledger import Ledger, refuse_existing
from ptq.progress import Progress, module_line
from ptq.recipe import Recipe
from ptq.report import build_report
from ptq.sites import collect, until_last_input
from ptq.source import Checkpoint, open_checkpoint, resolve

MICRO_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Run:
    """What stays the same over the blocks of one run."""

    recipe: Recipe
    checkpoint: Checkpoint
    model: nn.Module
    spec: Spec
    geometry: Geometry
    names: dict[str, str]
    device: torch.device
    calls: list[dict[int, Call]]


def compress(
    recipe: Recipe, *, out: Path, device: str = "auto", resume: bool = False, offline: bool = False, progress: Progress
) -> dict[str, Any]:
    """Compress recipe.model into the folder `out`; returns the report.

    Raises:
        BadInput, UnsupportedModel, NumericalFailure: see their messages; `out` is then not there, OUT.partial may be.
    """
    started = time.monotonic()
    target = torch.device(pick_device(device))
    refuse_existing(out, resume=resume)
    folder = resolve(
        recipe.model, revision=recipe.revision, offline=offline, trust_remote_code=recipe.trust_remote_code
    )
    checkpoint = open_checkpoint(folder, trust_remote_code=recipe.trust_remote_code)
    model = skeleton(checkpoint, trust_remote_code=recipe.trust_remote_code)
    spec = spec_for(checkpoint.config, model)
    model.set_attn_implementation(attention_for(recipe, spec, model))
    names = tensor_names(model, spec, checkpoint)
    calibration = calibrate(recipe, checkpoint, offline=offline)
    ledger = Ledger.open(out, identity_of(recipe, checkpoint, calibration, target.type), resume=resume)
    writer = Writer(ledger.folder, checkpoint, spec, recipe, blocks=len(model.get_submodule(spec.blocks)))

    batches = list(calibration.tokens.split(micro_batch(recipe)))
    states, calls = record_calls(
        model, spec, names, checkpoint, batches, device=target, dtype=compute_dtype(checkpoint, target)
    )
    if ledger.completed < writer.blocks:
        states = ledger.entering(states)
    run = Run(recipe, checkpoint, model, spec, geometry_of(checkpoint.config, spec), names, target, calls)
    for i in progress.track(range(ledger.completed, writer.blocks), start=ledger.completed):
        states, record = compress_block(run, i, states, writer)
        ledger.complete(states, record)
        for row in record["modules"]:
            progress.line(module_line(row))
        for site in record["sites"]:
            progress.detail(
                "  {site:<3} {channels} channels, {clusters} clusters, {bits} bits, grid {grid}".format(**site)
            )
    writer.write_rest(names)
    report = build_report(
        recipe=recipe,
        checkpoint=checkpoint,
        model=model,
        spec=spec,
        calibration=calibration,
        records=ledger.records,
        compressed_bytes=writer.weight_bytes(),
        seconds=time.monotonic() - started,
    )
    specs = {name: spec for record in ledger.records for name, spec in record["specs"].items()}
    writer.finish(report, model_card(report), specs)
    ledger.finish(out)
    return report


@torch.no_grad()
def compress_block(
    run: Run, i: int, states: list[torch.Tensor], writer: Writer
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """One block: returns the hidden states that leave it as compressed, and its part of the report."""
    recipe, spec, geometry = run.recipe, run.spec, run.geometry
    prefix = f"{spec.blocks}.{i}"
    block = load_block(run.model, spec, i, run.names, run.checkpoint, device=run.device)
    wants_h = recipe.weights.bits < 16 and recipe.weights.solver == "gptq"
    a = recipe.activations
    quantizes = min(a.bits, a.norm_bits, a.q_bits, a.kv_bits, a.softmax_bits) < 16

    def passes() -> None:
        for x in states:
            until_last_input(lambda x=x: run_block(block, x.to(run.device), run.calls[i][x.shape[0]]))

    # Without activation quantizers no linear's input changes between the passes, so one pass gives ranges and H.
    one_pass = wants_h and not quantizes and recipe.smooth is None
    found = collect(block, spec, geometry, passes, ranges=True, hessians=one_pass, where=prefix)
    ranges = found.ranges
    if recipe.smooth is not None:  # before the orders: the clusters are those of the smoothed channels
        ranges = reorder.smooth(block, spec, ranges, recipe.smooth)
    orders = reorder.plan_orders(ranges, recipe, spec, geometry, prefix)
    reorder.fold_orders(block, spec, geometry, orders)
    try:
        sites = quantizers.attach(block, spec, geometry, recipe, ranges, orders)
    except ValueError as err:
        raise NumericalFailure(f"{prefix}: {err}") from err
    set_softmax_bits(block, spec, recipe.activations.softmax_bits)
    if wants_h and not one_pass:
        found.H = collect(block, spec, geometry, passes, ranges=False, hessians=True, where=prefix).H
    elif wants_h:
        for name in found.H:  # one at a time: two copies of every H would set the peak of memory
            found.H[name] = permuted_h(name, found.H[name], orders)
    layers = weights.quantize(block, spec, recipe, found.H, orders, prefix)
    writer.write_block(i, block, ranges, orders)
    out = [run_block(block, x.to(run.device), run.calls[i][x.shape[0]]).cpu() for x in states]
    bad = sum(int((~torch.isfinite(x)).sum()) for x in out)
    if bad:
        raise NumericalFailure(f"{prefix}: {bad} NaN or infinite values leave the compressed block; use more bits")
    facts = {"modules": weights.as_rows(layers), "sites": [{"block": i, **vars(s)} for s in sites]}
    return out, {**facts, "specs": writer.module_specs(i, block)}


def permuted_h(name: str, H: torch.Tensor, orders: reorder.Orders) -> torch.Tensor:
    """H of the permuted input: x' = x[perm] gives H' = H[perm][:, perm]."""
    order = reorder.input_order(orders, name)
    return H if order is None else H[order.perm[:, None], order.perm]  # [C, C]


def set_softmax_bits(block: nn.Module, spec: Spec, bits: int) -> None:
    """Tell the block's attention module how many bits its probabilities have (read by the attention function "lowbit")."""
    block.get_submodule(spec.output.rpartition(".")[0]).softmax_bits = bits if spec.attention_interface else 16


def attention_for(recipe: Recipe, spec: Spec, model: nn.Module) -> str:
    """transformers' name of the attention function: the one that quantizes probabilities where they are quantized."""
    if not spec.attention_interface:
        return "eager"
    if recipe.activations.softmax_bits == 16:
        return "sdpa" if model._supports_sdpa else "eager"  # Gemma 2 caps its scores, which sdpa cannot
    import lowbit.attention

    return lowbit.attention.NAME


def calibrate(recipe: Recipe, checkpoint: Checkpoint, *, offline: bool) -> Calibration:
    """Token windows of the recipe's text, refused where they exceed the model's positions or vocabulary."""
    spec = recipe.calibration
    limit = getattr(checkpoint.config, "max_position_embeddings", None)
    if limit is not None and spec.seqlen > limit:
        raise BadInput(f"--seqlen {spec.seqlen} is beyond the model's {limit} positions; use --seqlen {limit} or less")
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=recipe.trust_remote_code)
    found = calibration_windows(
        tokenizer,
        spec.text,
        nsamples=spec.nsamples,
        seqlen=spec.seqlen,
        seed=recipe.seed,
        mode=spec.mode,
        offline=offline,
    )
    token, vocabulary = int(found.tokens.max()), checkpoint.config.vocab_size
    if token >= vocabulary:
        raise BadInput(f"token id {token} is outside the vocabulary of {vocabulary}; use the model's own tokenizer")
    return found


def micro_batch(recipe: Recipe) -> int:
    """Windows that run together: about MICRO_BATCH_TOKENS tokens."""
    return max(1, min(recipe.calibration.nsamples, MICRO_BATCH_TOKENS // recipe.calibration.seqlen))


def pick_device(device: str) -> str:
    """The device named, or for "auto" the first accelerator, else the CPU."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as err:
        raise BadInput(f"--device {device}: {str(err).splitlines()[0]}") from err
    if torch.device(device).type == "meta":
        raise BadInput("--device meta: computes nothing; choose cpu or an accelerator")
    return device


def compute_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The checkpoint's dtype, but float32 on a CPU, where half precision is slower and less exact."""
    dtype = getattr(checkpoint.config, "dtype", None) or torch.float32
    return torch.float32 if device.type == "cpu" else dtype
