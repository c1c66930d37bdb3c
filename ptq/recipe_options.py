"""Recipes from the options of `ptq quantize` and `ptq prune`, which are the keywords of `ptq.quantize` and `ptq.prune`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptq.errors import BadInput
from ptq.presets import PRESETS
from ptq.recipe import KV_BITS, Recipe, prunes
from ptq.recipe_build import build


def quantize_recipe(
    model: str | Path,
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
) -> Recipe:
    """The recipe that the options ask for; `ptq.quantize` says what they mean. Pure.

    Raises:
        BadInput: no bits chosen, or a value that `recipe_build.build` refuses.
    """
    wanted = given(
        model=str(model),
        method=method,
        preset=preset,
        revision=revision,
        trust_remote_code=trust_remote_code or None,
        seed=seed,
        weights=given(bits=wbits, groups=groups),
        activations={**_activation_bits(abits, norm_abits, kv_bits), **given(grid=act_grid)},
        clusters=given(tile=tile),
        calibration=given(text=calib, nsamples=nsamples, seqlen=seqlen),
    )
    overlay(wanted, nested(settings or {}))
    recipe = build(**wanted)
    sites = [key for key in wanted["activations"] if key.endswith("bits")]
    if recipe.preset is None and "bits" not in wanted["weights"] and not sites:
        choices = f"--preset ({', '.join(PRESETS)}) or --wbits, --abits, --norm-abits, --kv-bits"
        raise BadInput(f"no bits chosen: give {choices}")
    return recipe


def prune_recipe(
    model: str | Path,
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
) -> Recipe:
    """The recipe that the options ask for; `ptq.prune` says what they mean. Pure.

    Raises:
        BadInput: nothing to prune, or a value that `recipe_build.build` refuses.
    """
    if (sparsity is None) == (nm is None):
        raise BadInput("give one of --sparsity (share of zeros, for instance 0.5) and --nm (2:4 keeps 2 of every 4)")
    wanted = given(
        model=str(model),
        method=method or "sparsegpt",
        revision=revision,
        trust_remote_code=trust_remote_code or None,
        seed=seed,
        on_failure=on_failure,
        weights=given(bits=wbits, groups=groups),
        pruning=given(
            sparsity=sparsity,
            keep=nm,
            refine=refine,
            allocation=allocation,
            first=first,
            preserve=preserve or None,
            storage=storage or ("packed" if wbits not in (None, 16) else None),
        ),
        calibration=given(text=calib, nsamples=nsamples, seqlen=seqlen),
    )
    overlay(wanted, nested(settings or {}))
    recipe = build(**wanted)
    if not prunes(recipe):
        raise BadInput("--sparsity 0 prunes nothing; give the share of zeros, for instance 0.5")
    return recipe


def _activation_bits(abits: int | None, norm_abits: int | None, kv_bits: int | None) -> dict[str, int]:
    if abits is None:
        return given(norm_bits=norm_abits, kv_bits=kv_bits)
    if abits not in KV_BITS and kv_bits is None:
        stored = ", ".join(map(str, KV_BITS))
        raise BadInput(f"--abits {abits}: keys and values are stored at {stored} bits, so say which: add --kv-bits N")
    return {
        "bits": abits,
        "q_bits": abits,
        "kv_bits": abits if kv_bits is None else kv_bits,
        "norm_bits": max(8, abits) if norm_abits is None else norm_abits,
        "softmax_bits": max(8, abits),
    }


def given(**values: Any) -> dict[str, Any]:
    """The values that are not None."""
    return {key: value for key, value in values.items() if value is not None}


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"weights.damp": 0.05} as {"weights": {"damp": 0.05}}; a later key has the last word."""
    whole: dict[str, Any] = {}
    for key, value in settings.items():
        for name in reversed(key.split(".")):
            value = {name: value}
        overlay(whole, value)
    return whole


def overlay(base: dict[str, Any], top: Mapping[str, Any]) -> None:
    """Write `top` over `base`, mapping by mapping."""
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            overlay(base[key], value)
        else:
            base[key] = value
