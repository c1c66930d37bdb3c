"""report.json: everything that was done, with the numbers. docs/report.md explains the keys."""

from __future__ import annotations

import platform
import resource
import sys
from typing import Any

import torch
from torch import nn

from ptq.architectures import Spec
from ptq.calibration import Calibration
from ptq.recipe import Recipe, to_dict
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
    compressed_bytes: int,
    seconds: float,
) -> dict[str, Any]:
    """Assemble the report from what each block recorded."""
    import transformers

    import ptq

    modules = [row for record in records for row in record["modules"]]
    sites = [row for record in records for row in record["sites"]]
    compressed = sum(row["shape"][0] * row["shape"][1] for row in modules if row["bits"] < 16)
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
            "revision": commit_of(checkpoint.folder) or recipe.revision,
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
        "modules": modules,
        "sites": sites,
        "coverage": _coverage(model, compressed, modules),
        "bits": {
            "weights_effective": _effective_bits(modules, records),
            "kv_bits_effective": _kv_bits(recipe),
        },
        "sizes": {
            "source_bytes": sum(f["bytes"] for f in checkpoint.files),
            "compressed_bytes": compressed_bytes,
        },
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "warnings": _warnings(recipe, spec, modules),
    }


def _coverage(model: nn.Module, compressed: int, modules: list[dict[str, Any]]) -> dict[str, Any]:
    total = sum(p.numel() for p in model.parameters())
    outside = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding) or m is model.get_output_embeddings()]
    skipped = [{"name": name, "reason": "outside the blocks: kept in full precision"} for name in outside]
    skipped += [{"name": row["name"], "reason": "16 bits asked for"} for row in modules if row["bits"] == 16]
    return {"compressed_parameters": compressed, "other_parameters": total - compressed, "skipped": skipped}


def _effective_bits(modules: list[dict[str, Any]], records: list[dict[str, Any]]) -> float:
    """Bits a weight of the compressed linears: codes, scales, zero points, group sizes, and the norms' permutations."""
    weights = sum(row["shape"][0] * row["shape"][1] for row in modules)
    stored = sum(row["shape"][0] * row["shape"][1] * row["effective_bits"] for row in modules)
    permutations = sum(
        32 * s["channels"] for r in records for s in r["sites"] if s["site"] in ("R1", "R4") and s["permuted"]
    )
    return (stored + permutations) / weights


def _kv_bits(recipe: Recipe) -> float | None:
    """Bits a cached value: static grids cost nothing a token, FlexGen's codec a float16 scale and minimum in 64."""
    bits = recipe.activations.kv_bits
    if bits == 16:
        return None
    return bits + 32 / 64 if recipe.method == "group4" else float(bits)


def _warnings(recipe: Recipe, spec: Spec, modules: list[dict[str, Any]]) -> list[str]:
    found = []
    if recipe.activations.softmax_bits < 16 and not spec.attention_interface:
        found.append(
            f"softmax stays in full precision: {spec.model_type}'s attention cannot be replaced in transformers"
        )
    raised = [row["name"] for row in modules if row["attempts"] > 1]
    if raised:
        found.append(
            f"H needed more damping or float64 in {len(raised)} modules, first {raised[0]}: use more calibration tokens"
        )
    return found


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
