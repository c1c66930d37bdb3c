"""What a run would do, before it runs: modules, bits, disk, peak of memory, and a model of the result's speed. Reads no weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lowbit.modules import Linear, Norm
from torch import nn

from ptq.architectures import Geometry, Spec, geometry_of
from ptq.blocks import load_block
from ptq.head import head_source
from ptq.memory import peak_bytes
from ptq.plan import memory, process, roofline
from ptq.plan.decoding import step_of
from ptq.plan.headers import Headers, headers_of
from ptq.plan.storage import Stored, store
from ptq.recipe import Recipe, has_fine_groups, prunes
from ptq.report import bits_of, coverage, is_compressed, sparsity_of
from ptq.source import Checkpoint


def plan(recipe: Recipe, *, device: str = "auto", offline: bool = False, batch: int, context: int) -> dict[str, Any]:
    """Predict the run of `recipe`, and decoding at `batch` sequences of `context` tokens. docs: `ptq plan --help`.

    Raises:
        BadInput, UnsupportedModel: what the run itself would refuse before it reads weights.
    """
    from ptq import pipeline

    target = torch.device(pipeline.pick_device(device))
    checkpoint, model, spec, names = pipeline.open_model(recipe, offline=offline)
    calibration = pipeline.calibrate(recipe, checkpoint, offline=offline)
    process.touch(kmeans=recipe.reorder and recipe.clusters.wide is None)
    began, set_up = process.resident(), peak_bytes()
    headers, geometry = headers_of(checkpoint), geometry_of(checkpoint.config, spec)
    stored = store(recipe, model, spec, geometry, names, headers)
    above, phase = memory.peak(
        _phases(recipe, model, spec, geometry, headers, stored, names), blocks=len(stored.blocks)
    )
    modules = stored.modules
    bits = bits_of(recipe, checkpoint.config, spec, modules, stored.sites)
    itemsize = pipeline.compute_dtype(checkpoint, target).itemsize
    states = 2 * (2 if recipe.weights.asymmetric else 1) * calibration.tokens.numel() * checkpoint.config.hidden_size
    return {
        "peak_bytes": max(set_up, began + above),
        "process_bytes": began,
        "peak_phase": phase if began + above > set_up else "reading the calibration text",
        "disk_bytes": stored.bytes,
        "disk_bytes_while_running": stored.bytes + 4 * states,
        "source_bytes": sum(f["bytes"] for f in checkpoint.files),
        "effective_bits": bits,
        "sparsity": sparsity_of(modules) if prunes(recipe) else None,
        "compressed_modules": [_facts(row) for row in modules if is_compressed(row)],
        "skipped_modules": list(_skipped(model, spec, names, stored)),
        "sites": stored.sites,
        "by_budget": _by_budget(recipe, stored),
        "decode": _decode(
            recipe, model, spec, geometry, checkpoint, names, headers, stored, bits, target, itemsize, batch, context
        ),
    }


def _phases(recipe, model, spec: Spec, geometry: Geometry, headers, stored: Stored, names) -> list[memory.Phase]:
    from ptq.pipeline import attention_for, micro_batch

    tokens = memory.tokens_of(recipe, micro_batch(recipe), model.config.hidden_size)
    sizes = {headers.dtypes[names[n]].itemsize for n in names if n.startswith(f"{spec.blocks}.0.")}
    how = {"attention": attention_for(recipe, spec, model), "itemsize": max(sizes)}
    phases = memory.outer_phases(stored.rest, stored.head, recipe, tokens)
    for block in stored.blocks:
        phases += memory.block_phases(block, spec, geometry, recipe, tokens, **how)
    return phases


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("name", "shape", "bits", "groups", "fine_share", "sparsity", "keep", "storage", "effective_bits")
    return {key: row[key] for key in keys}


def _skipped(model: nn.Module, spec: Spec, names: dict[str, str], stored: Stored) -> Iterator[dict[str, str]]:
    """Every module with tensors that stays as it is, and why."""
    told = coverage(model, stored.modules)["skipped"]
    yield from told
    listed = {one["name"] for one in told} | {row["name"] for row in stored.modules} | stored.head.keys()
    for i, block in enumerate(stored.blocks):
        for name in dict.fromkeys(local.rpartition(".")[0] for local in block.state_dict()):
            module = block.get_submodule(name)
            if isinstance(module, Linear) or "quantizer" in name:
                continue
            router = spec.experts is not None and name == spec.experts.router
            why = "router: few weights, and a wrong expert costs more than a wrong bit" if router else "not in the spec"
            why = "norm: a number a channel" if isinstance(module, Norm) else why
            yield {"name": f"{spec.blocks}.{i}.{name}", "reason": f"{why}: kept in full precision"}
    outside = (n.rpartition(".")[0] for n in names if not n.startswith(f"{spec.blocks}."))
    for name in dict.fromkeys(outside):
        if name not in listed:
            yield {"name": name, "reason": "outside the blocks: kept in full precision"}


def _by_budget(recipe: Recipe, stored: Stored) -> list[str]:
    """What the weights and the text decide, and a plan takes from the recipe."""
    w, found = recipe.weights, []
    if not all(site["exact"] for site in stored.sites):
        found.append("clusters: as many as the recipe allows; weight groups cut from them: their expected number")
    if has_fine_groups(recipe) and w.bits < 16:
        found.append(f"weights with twice the bits: {w.fine:.1%}, in the first groups; which ones depends on the text")
    if prunes(recipe) and recipe.pruning.allocation != "uniform":
        found.append(f"sparsity of each linear: the mean; {recipe.pruning.allocation} spreads it by the text")
    if prunes(recipe) and w.bits < 16:
        found.append("codes left out: those of pruned weights; more where a kept weight rounds to zero")
    return found


def _decode(
    recipe: Recipe, model, spec, geometry, checkpoint: Checkpoint, names, headers: Headers, stored: Stored,
    bits: dict[str, Any], target: torch.device, itemsize: int, batch: int, context: int,
) -> dict[str, Any]:  # fmt: skip
    machine = roofline.measure(target)
    source = head_source(model, names)
    head = headers.read([source])[source]
    how = {"batch": batch, "context": context, "itemsize": itemsize}
    rounded = {site["site"]: site["bits"] for site in stored.sites if site["bits"] < 16}
    with torch.device("meta"):
        whole = [load_block(model, spec, i, names, headers, device="meta") for i in range(len(stored.blocks))]
    contenders = {
        "compressed": (stored.blocks, next(iter(stored.head.values()), head), bits["kv_bits_effective"], rounded),
        "full_precision": (whole, head, None, {}),
    }
    found: dict[str, Any] = {"model": "roofline", "batch": batch, "context": context, **vars(machine)}
    for name, (blocks, matrix, kv_bits, inputs) in contenders.items():
        step = step_of(blocks, matrix, spec, geometry, checkpoint.config, kv_bits=kv_bits, input_bits=inputs, **how)
        speed = roofline.speed(step, machine)
        found[name] = {**vars(step), **vars(speed), "pays": roofline.pays(speed)}
    return found
