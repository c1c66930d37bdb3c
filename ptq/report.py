"""report.json: everything that was done, with the numbers. docs/report.md explains the keys."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import torch
from lowbit.hadamard import additions
from torch import nn

from ptq.architectures import Spec, geometry_of
from ptq.blocks import leftovers, tensor_names
from ptq.calibration import Calibration
from ptq.memory import peak_bytes
from ptq.recipe import Recipe, prunes, to_dict
from ptq.source import Checkpoint, commit_of, license_of

SCHEMA_VERSION = 1


def build_report(
    *,
    recipe: Recipe,
    checkpoint: Checkpoint,
    model: nn.Module,
    spec: Spec,
    calibration: Calibration,
    records: list[dict[str, Any]],
    head: list[dict[str, Any]],
    compressed_bytes: int,
    seconds: float,
) -> dict[str, Any]:
    """Assemble the report from what each block recorded, and the row of the output head where it is packed."""
    import transformers

    import ptq

    modules = [row for record in records for row in record["modules"]]
    sites = [row for record in records for row in record["sites"]]
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": {
            "ptq": ptq.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "base_model": {
            "source": recipe.model,
            "revision": None if checkpoint.folder == Path(recipe.model) else commit_of(checkpoint.folder),
            "model_type": checkpoint.config.model_type,
            "license": license_of(checkpoint.folder),
            "files": list(checkpoint.files),
        },
        "recipe": to_dict(recipe),
        "calibration": {
            "source": calibration.source,
            "text_sha256": calibration.text_sha256,
            "fingerprint": calibration.fingerprint,
            "requested": calibration.requested,
            "used": calibration.used,
            "dropped": calibration.dropped,
            "seqlen": calibration.tokens.shape[1],
            "tokens": calibration.tokens.numel(),
        },
        "modules": modules + head,
        "sites": sites,
        "coverage": coverage(model, modules + head),
        "bits": bits_of(recipe, checkpoint.config, spec, modules + head, sites),
        "run_time": _run_time(modules, sites),
        "sparsity": sparsity_of(modules) if prunes(recipe) else None,
        "sizes": {
            "source_bytes": sum(f["bytes"] for f in checkpoint.files),
            "compressed_bytes": compressed_bytes,
        },
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "warnings": _warnings(recipe, spec, modules, leftovers(tensor_names(model, spec, checkpoint), checkpoint)),
    }


def bits_of(
    recipe: Recipe, config: Any, spec: Spec, modules: list[dict[str, Any]], sites: list[dict[str, Any]]
) -> dict[str, Any]:
    """Effective bits of weights, activations and cache; `modules` with the output head where that is packed."""
    return {
        "weights_effective": _effective_bits(modules, sites),
        "activations_effective": _activation_bits(sites),
        "sinks": recipe.activations.sinks,
        "kv_bits_effective": _kv_bits(recipe, config, spec),
        "softmax": recipe.activations.softmax_bits if spec.attention_interface else 16,
    }


def is_compressed(row: dict[str, Any]) -> bool:
    """Whether a module's row says that bits or zeros were asked of it."""
    return row["bits"] < 16 or row["sparsity"] is not None


def coverage(model: nn.Module, modules: list[dict[str, Any]]) -> dict[str, Any]:
    """How much of the model is compressed, and what is not and why; `modules` with the output head where that is packed."""
    compressed = sum(row["shape"][0] * row["shape"][1] for row in modules if is_compressed(row))
    tied = model.all_tied_weights_keys  # one parameter, though the empty skeleton has it twice
    packed = {row["name"] for row in modules}
    apart = [name for name in tied if name.rpartition(".")[0] not in packed]
    total = sum(p.numel() for name, p in model.named_parameters() if name not in apart)
    outside = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding) or m is model.get_output_embeddings()]
    outside = [name for name in outside if name not in packed]
    skipped = [{"name": name, "reason": "outside the blocks: kept in full precision"} for name in outside]
    for row in modules:
        if row["failure"]:
            skipped.append({"name": row["name"], "reason": row["failure"]})
        elif not is_compressed(row):
            skipped.append({"name": row["name"], "reason": "neither bits nor zeros were asked of it"})
    return {"compressed_parameters": compressed, "other_parameters": total - compressed, "skipped": skipped}


def sparsity_of(modules: list[dict[str, Any]]) -> float:
    """Share of zeros among all weights of the decoder linears, counted in what is stored."""
    weights = sum(row["shape"][0] * row["shape"][1] for row in modules)
    return sum(row["shape"][0] * row["shape"][1] * (row["sparsity"] or 0) for row in modules) / weights


def _effective_bits(modules: list[dict[str, Any]], sites: list[dict[str, Any]]) -> float:
    """Bits a weight of the compressed linears: codes, scales, zero points, group sizes, and the norms' permutations."""
    weights = sum(row["shape"][0] * row["shape"][1] for row in modules)
    stored = sum(row["shape"][0] * row["shape"][1] * row["effective_bits"] for row in modules)
    permutations = sum(32 * s["channels"] for s in sites if s["site"] in ("R1", "R4") and s["permuted"])
    return (stored + permutations) / weights


def _activation_bits(sites: list[dict[str, Any]]) -> float | None:
    """Bits a value that enters a linear: its code, and its share of a dynamic grid's scale and zero point."""
    inputs = [site for site in sites if site["site"] in ("R1", "R3", "R4", "R5")]
    channels = sum(site["channels"] for site in inputs)
    return sum(site["channels"] * site["effective_bits"] for site in inputs) / channels if channels else None


def _run_time(modules: list[dict[str, Any]], sites: list[dict[str, Any]]) -> dict[str, int]:
    """What a token costs at run time beside its products, which are `multiplications` of the decoder linears."""
    return {
        "multiplications": sum(row["shape"][0] * row["shape"][1] for row in modules),
        "hadamard_additions": sum(additions(site["channels"], site["rotation"]) for site in sites),
        "dynamic_channels": sum(site["channels"] for site in sites if site["grid"] in ("tile", "token")),
    }


def _kv_bits(recipe: Recipe, config: Any, spec: Spec) -> float | None:
    """Bits a cached value: its code, and its share of the float32 cosines and sines that the layers hold together for a token.

    Static grids cost nothing a token. Gemma 3 rotates sliding and full layers differently, so it holds two tables.
    """
    bits = recipe.activations.kv_bits
    if bits == 16 or recipe.method == "group4":
        return None
    g = geometry_of(config, spec)
    layer_types, rotations = (getattr(config, name, None) or {} for name in ("layer_types", "rope_parameters"))
    table = 32 * g.rotary_dim * max(1, len(set(layer_types) & set(rotations)))
    return bits + table / (2 * g.kv_heads * g.head_dim * config.num_hidden_layers)


def _warnings(recipe: Recipe, spec: Spec, modules: list[dict[str, Any]], unused: list[str]) -> list[str]:
    found = []
    if unused:
        kinds = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in unused}))
        found.append(f"{len(unused)} tensors of the source are made by the model itself and were left out: {kinds}")
    if recipe.activations.kv_bits < 16 and recipe.method == "group4":
        found.append("group4 keys and values are rounded, the cache itself holds full precision")
    if recipe.activations.softmax_bits < 16 and not spec.attention_interface:
        found.append(
            f"softmax stays in full precision: {spec.model_type}'s attention cannot be replaced in transformers"
        )
    failed = [row["name"] for row in modules if row["failure"]]
    if failed:
        found.append(f"{len(failed)} modules were left whole because their H could not be factored, first {failed[0]}")
    solved = [row for row in modules if row["damp"] is not None]
    few = [row for row in solved if row["tokens"] < row["shape"][1]]
    if few:
        row = few[0]
        found.append(
            f"{len(few)} modules saw fewer calibration tokens than they have input channels, first {row['name']}: "
            f"{row['tokens']} of {row['shape'][1]}; use more calibration tokens"
        )
    raised = [row["name"] for row in modules if row["attempts"] > 1]
    if raised:
        found.append(
            f"H needed more damping or float64 in {len(raised)} modules, first {raised[0]}: use more calibration tokens"
        )
    return found
