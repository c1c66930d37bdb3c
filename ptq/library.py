"""The verbs of the command as functions, for programs: `ptq.quantize`, `ptq.prune` and `ptq.evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq import pipeline
from ptq.evaluation import Evaluation, evaluate
from ptq.progress import Progress
from ptq.recipe import Recipe
from ptq.recipe_options import prune_recipe, quantize_recipe

__all__ = ["Evaluation", "Result", "evaluate", "prune", "quantize"]


@dataclass(frozen=True)
class Result:
    """What a run made.

    folder: the new model. effective_bits: bits a weight of the compressed linears, with scales, zero points and masks. sparsity: share
    of zeros among the weights of the decoder linears, None where nothing was pruned. source_bytes, compressed_bytes: of the safetensors.
    warnings: one line each. report: all of report.json (docs/report.md).
    """

    folder: Path
    effective_bits: float
    sparsity: float | None
    source_bytes: int
    compressed_bytes: int
    warnings: list[str]
    report: dict[str, Any]


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    preset: str | None = None,
    method: str | None = None,
    wbits: int | None = None,
    abits: int | None = None,
    norm_abits: int | None = None,
    kv_bits: int | None = None,
    act_grid: str | None = None,
    groups: str | int | None = None,
    tile: int | None = None,
    calib: str | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    seed: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
    resume: bool = False,
    offline: bool = False,
    progress: bool = False,
) -> Result:
    """Quantize a model into a new folder: `ptq quantize` as a function, with the same bytes.

    Args:
        model: a local folder or a hub id.
        out: the new folder; it appears whole or not at all.
        preset, method: names that `ptq list` shows; a preset or some of the bits must be given.
        wbits, abits, norm_abits, kv_bits: bits of weights, activations, norm outputs, keys and values; they win over the preset.
        act_grid: activation grids, "cluster", "tensor" or "token". groups: weight groups, "auto", "cluster", "channel" or channels.
        tile: clusters in whole tiles of so many channels.
        calib: a text's name or file, or several joined by commas. nsamples: windows. seqlen: tokens a window. seed: of all that is random.
        revision: hub branch, tag or commit. trust_remote_code: run code that ships with the model.
        settings: any other key of `ptq.recipe.Recipe`, for instance {"weights.damp": 0.05}; these have the last word.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N". offline: no network.
        resume: continue the interrupted run beside `out`. progress: say on stderr how far it is.

    Raises:
        BadInput, UnsupportedModel, NumericalFailure (`ptq.errors`): one line each; `out` is then not there.
    """
    recipe = quantize_recipe(
        model,
        preset=preset,
        method=method,
        wbits=wbits,
        abits=abits,
        norm_abits=norm_abits,
        kv_bits=kv_bits,
        act_grid=act_grid,
        groups=groups,
        tile=tile,
        calib=calib,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
        settings=settings,
    )
    return _run(recipe, Path(out), device=device, resume=resume, offline=offline, progress=progress)


def prune(
    model: str | Path,
    out: str | Path,
    *,
    sparsity: float | None = None,
    nm: str | None = None,
    wbits: int | None = None,
    groups: str | int | None = None,
    first: float | None = None,
    preserve: bool = False,
    method: str | None = None,
    refine: int | None = None,
    allocation: str | None = None,
    storage: str | None = None,
    on_failure: str | None = None,
    calib: str | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    seed: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
    resume: bool = False,
    offline: bool = False,
    progress: bool = False,
) -> Result:
    """Prune a model into a new folder: `ptq prune` as a function, with the same bytes.

    Args:
        model: a local folder or a hub id.
        out: the new folder; it appears whole or not at all.
        sparsity, nm: one of them: the share of zeros, 0 to 1, or "2:4" to keep 2 of every 4 weights along a row.
        wbits, groups: quantize what is kept, in the same solve, in groups "channel" or of so many channels.
        first: only this share of the blocks, from the first on. preserve: zeros that are there stay, and count.
        method: a name that `ptq list` shows. refine: conjugate gradient steps on what is kept, 0 for none.
        allocation: of the sparsity over the linears, "uniform", "owl" or "error". storage: "dense" (zeros included) or "packed".
        on_failure: "stop", or "skip" to leave a module whole when its H fails.
        calib to progress: as for `ptq.quantize`.

    Raises:
        BadInput, UnsupportedModel, NumericalFailure (`ptq.errors`): one line each; `out` is then not there.
    """
    recipe = prune_recipe(
        model,
        sparsity=sparsity,
        nm=nm,
        wbits=wbits,
        groups=groups,
        first=first,
        preserve=preserve,
        method=method,
        refine=refine,
        allocation=allocation,
        storage=storage,
        on_failure=on_failure,
        calib=calib,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
        settings=settings,
    )
    return _run(recipe, Path(out), device=device, resume=resume, offline=offline, progress=progress)


def _run(recipe: Recipe, out: Path, *, device: str, resume: bool, offline: bool, progress: bool) -> Result:
    report = pipeline.compress(
        recipe, out=out, device=device, resume=resume, offline=offline, progress=Progress(quiet=not progress)
    )
    return Result(
        folder=out,
        effective_bits=report["bits"]["weights_effective"],
        sparsity=report["sparsity"],
        source_bytes=report["sizes"]["source_bytes"],
        compressed_bytes=report["sizes"]["compressed_bytes"],
        warnings=report["warnings"],
        report=report,
    )
