"""A run from checkpoint to checkpoint: block by block, one block in memory."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lowbit.modules import Linear
from torch import nn

from ptq import distributed, experts, weights
from ptq.allocate import allocate
from ptq.architectures import Spec, geometry_of, spec_for
from ptq.blocks import record_calls, skeleton, tensor_names
from ptq.calibration import Calibration, calibration_windows
from ptq.card import model_card
from ptq.checkpoint import Writer, load_tokenizer
from ptq.errors import BadInput
from ptq.head import compress_head, head_name
from ptq.identity import identity_of
from ptq.ledger import Ledger, refuse_existing
from ptq.progress import Progress, module_line
from ptq.recipe import Recipe
from ptq.report import build_report
from ptq.source import Checkpoint, open_checkpoint, resolve
from ptq.walk import Run, compress_block

MICRO_BATCH_TOKENS = 2048


def compress(
    recipe: Recipe, *, out: Path, device: str = "auto", resume: bool = False, offline: bool = False, progress: Progress
) -> dict[str, Any]:
    """Compress recipe.model into the folder `out`; returns the report, {} in all but the first process of a distributed run.

    Raises:
        BadInput, UnsupportedModel, NumericalFailure: see their messages; `out` is then not there, OUT.partial may be.
    """
    started = time.monotonic()
    target = torch.device(pick_device(distributed.own_device(device)))
    if distributed.rank() == 0:
        refuse_existing(out, resume=resume)
    checkpoint, model, spec, names = open_model(recipe, offline=offline)
    calibration = calibrate(recipe, checkpoint, offline=offline)
    ledger = Ledger.open(out, identity_of(recipe, checkpoint, calibration, target.type), resume=resume)
    writer = Writer(ledger.folder, checkpoint, model, spec, recipe, names)

    batches = distributed.mine(list(calibration.tokens.split(micro_batch(recipe))))
    states, calls = record_calls(
        model, spec, names, checkpoint, batches, device=target, dtype=compute_dtype(checkpoint, target)
    )
    run = Run(recipe, checkpoint, model, spec, geometry_of(checkpoint.config, spec), names, target, calls)
    run = replace(run, shares=allocate(run, states))
    if recipe.weights.asymmetric:
        states = states + [x.clone() for x in states]  # those of the compressed model and those of full precision
    if ledger.completed < writer.blocks:
        states = ledger.entering(states)
    for i in progress.track(range(ledger.completed, writer.blocks), start=ledger.completed):
        done = compress_block(run, i, states)
        if distributed.rank() == 0:
            writer.write_block(i, done.block, done.ranges, done.orders)
        states = done.states
        record: dict[str, Any] = {
            "modules": weights.as_rows(done.modules),
            "sites": [{"block": i, **vars(site)} for site in done.sites],
            "specs": writer.module_specs(i, done.block),
        }
        del done
        ledger.complete(states, record)
        for row in record["modules"]:
            progress.line(module_line(row))
        for site in record["sites"]:
            progress.detail(
                "  {site:<3} {channels} channels, {clusters} clusters, {bits} bits, grid {grid}".format(**site)
            )
    if distributed.rank() > 0:
        return {}
    rows, head = _compress_head(recipe, model, names, checkpoint)
    writer.write_rest(head)
    report = build_report(
        recipe=recipe,
        checkpoint=checkpoint,
        model=model,
        spec=spec,
        calibration=calibration,
        records=ledger.records,
        head=rows,
        compressed_bytes=writer.weight_bytes(),
        seconds=time.monotonic() - started,
    )
    specs = {name: spec for record in ledger.records for name, spec in record["specs"].items()}
    specs |= {name: linear.spec() for name, linear in head.items()}
    writer.finish(report, model_card(report), specs)
    ledger.finish(out)
    return report


def open_model(recipe: Recipe, *, offline: bool) -> tuple[Checkpoint, nn.Module, Spec, dict[str, str]]:
    """The checkpoint of `recipe`, its empty model, its spec and its tensors' names (see `tensor_names`); no weights are read.

    Raises:
        BadInput, UnsupportedModel: not a model, or one that the recipe cannot be run on.
    """
    trust = {"trust_remote_code": recipe.trust_remote_code}
    folder = resolve(recipe.model, revision=recipe.revision, offline=offline, **trust)
    checkpoint = open_checkpoint(folder, **trust)
    model = skeleton(checkpoint, **trust)
    spec = spec_for(checkpoint.config, model)
    experts.check_recipe(spec, recipe)
    if recipe.weights.head < 16:
        head_name(model)  # refused before anything is computed
    model.set_attn_implementation(attention_for(recipe, spec, model))
    return checkpoint, model, spec, tensor_names(model, spec, checkpoint)


def _compress_head(
    recipe: Recipe, model: nn.Module, names: dict[str, str], checkpoint: Checkpoint
) -> tuple[list[dict[str, Any]], dict[str, Linear]]:
    """(rows of the report, the head by name), both empty where it stays as it is."""
    if recipe.weights.head == 16:
        return [], {}
    linear, fact = compress_head(model, names, checkpoint, recipe.weights.head)
    return weights.as_rows([fact]), {fact.name: linear}


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
