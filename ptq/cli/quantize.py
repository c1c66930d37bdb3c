"""`ptq quantize MODEL --out DIR`: bits per site from a preset or from options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ptq.cli import options
from ptq.cli.memory import keep_freed_memory
from ptq.errors import BadInput
from ptq.presets import METHODS, PRESETS
from ptq.progress import Progress
from ptq.recipe import KV_BITS, Recipe
from ptq.recipe_build import build

EPILOG = """\
bits without a preset: --abits N sets inputs of the output and down projections, queries, keys and values to N,
norm outputs and softmax to max(8, N); --norm-abits and --kv-bits set theirs alone; what is not set stays at 16
(full precision). Options given beside a preset win. `ptq list` shows what each preset does per site.

example: ptq quantize facebook/opt-125m --out opt-125m-w4a8 --preset W4A8"""


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = verbs.add_parser("quantize", help="quantize a model", epilog=EPILOG, formatter_class=formatter)
    parser.set_defaults(main=main, parser=parser)
    parser.add_argument("model", metavar="MODEL", help="a local folder or a hub id")
    parser.add_argument("--out", required=True, metavar="DIR", help="the new folder; it appears whole or not at all")
    bits = parser.add_argument_group("bits")
    bits.add_argument("--preset", choices=PRESETS, metavar="NAME", help=", ".join(PRESETS))
    bits.add_argument("--wbits", type=int, metavar="N", help="weights")
    bits.add_argument("--abits", type=int, metavar="N", help="activations, see below")
    bits.add_argument("--norm-abits", type=int, metavar="N", help="norm outputs")
    bits.add_argument("--kv-bits", type=int, metavar="N", help="keys and values")
    how = parser.add_argument_group("how")
    how.add_argument("--method", choices=METHODS, metavar="M", help=f"{', '.join(METHODS)} (default rptq)")
    how.add_argument("--act-grid", metavar="GRID", help="activation grids: cluster, tensor or token (dynamic)")
    how.add_argument("--groups", type=parse_groups, metavar="G", help="weight groups: auto, cluster, channel or a size")
    how.add_argument("--tile", type=int, metavar="N", help="R1, R4, R5 in whole tiles of N channels: 32, 64 or 128")
    how.add_argument("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="any recipe key; repeatable")
    options.add_calibration(parser)
    add_source(parser)
    add_run_options(parser)


def add_source(parser: argparse.ArgumentParser) -> None:
    """Options that say which model is meant."""
    source = parser.add_argument_group("model source")
    source.add_argument("--revision", metavar="R", help="hub branch, tag or commit")
    source.add_argument("--trust-remote-code", action="store_true", help="run code that ships with the model (off)")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of a run that do not change its result; `ptq run` has them too."""
    parser.add_argument("--resume", action="store_true", help="continue the interrupted run beside DIR")
    options.add_device(parser)
    options.add_offline(parser)
    options.add_json(parser)
    options.add_loudness(parser)


def main(args: argparse.Namespace) -> None:
    """Run the verb."""
    compress(recipe_from_args(args), args)


def compress(recipe: Recipe, args: argparse.Namespace) -> None:
    """Run `recipe` with the options of `add_run_options`; print a summary, or the report under --json."""
    from ptq import distributed, pipeline

    keep_freed_memory()
    out, first = Path(args.out), distributed.rank() == 0
    progress = Progress(quiet=args.quiet or not first, verbose=args.verbose)
    report = pipeline.compress(
        recipe, out=out, device=args.device, resume=args.resume, offline=args.offline, progress=progress
    )
    if not first:
        return
    if args.json:
        options.write_json(args.json, report)
    if args.json != "-":
        print(summary(out, report))


def summary(out: Path, report: dict[str, Any]) -> str:
    """One line on a finished run."""
    sizes, seconds = report["sizes"], report["seconds"]
    ratio = sizes["source_bytes"] / max(1, sizes["compressed_bytes"])
    bits = f"{report['bits']['weights_effective']:.2f} effective bits a compressed weight"
    if report["sparsity"] is not None:
        bits = f"{report['sparsity']:.2%} zeros, {bits}"
    size = f"{sizes['source_bytes'] / 1e6:.1f} MB -> {sizes['compressed_bytes'] / 1e6:.1f} MB ({ratio:.2f}x smaller)"
    return f"{out}: {len(report['modules'])} modules, {bits}, {size}, {seconds:.0f} s"


def recipe_from_args(args: argparse.Namespace) -> Recipe:
    """The recipe that the options ask for. Pure.

    Raises:
        BadInput: no bits chosen, a bad --set, or a value that `recipe_build.build` refuses.
    """
    wanted = given(
        model=args.model,
        method=args.method,
        preset=args.preset,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code or None,
        seed=args.seed,
        weights=given(bits=args.wbits, groups=args.groups),
        activations={**_activation_bits(args), **given(grid=args.act_grid)},
        clusters=given(tile=args.tile),
        calibration=given(text=args.calib, nsamples=args.nsamples, seqlen=args.seqlen),
    )
    for setting in args.set:
        overlay(wanted, parse_setting(setting))
    recipe = build(**wanted)
    sites = [key for key in wanted["activations"] if key.endswith("bits")]
    if recipe.preset is None and "bits" not in wanted["weights"] and not sites:
        choices = f"--preset ({', '.join(PRESETS)}) or --wbits, --abits, --norm-abits, --kv-bits"
        raise BadInput(f"no bits chosen: give {choices}")
    return recipe


def _activation_bits(args: argparse.Namespace) -> dict[str, int]:
    n = args.abits
    if n is None:
        return given(norm_bits=args.norm_abits, kv_bits=args.kv_bits)
    if n not in KV_BITS and args.kv_bits is None:
        stored = ", ".join(map(str, KV_BITS))
        raise BadInput(f"--abits {n}: keys and values are stored at {stored} bits, so say which: add --kv-bits N")
    return {
        "bits": n,
        "q_bits": n,
        "kv_bits": n if args.kv_bits is None else args.kv_bits,
        "norm_bits": max(8, n) if args.norm_abits is None else args.norm_abits,
        "softmax_bits": max(8, n),
    }


def parse_groups(text: str) -> str | int:
    """A name, or a size in channels."""
    return int(text) if text.isdigit() else text


def given(**values: Any) -> dict[str, Any]:
    """The values that are not None."""
    return {key: value for key, value in values.items() if value is not None}


def parse_setting(text: str) -> dict[str, Any]:
    """Turn `weights.damp=0.05` into {"weights": {"damp": 0.05}}; the value is read as YAML."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise BadInput(f"--set {text}: expected KEY.SUB=VALUE, for instance --set weights.damp=0.05")
    try:
        nested = yaml.safe_load(value)
    except yaml.YAMLError as err:
        raise BadInput(f"--set {text}: the value is not YAML: {' '.join(str(err).split())}") from err
    for name in reversed(key.split(".")):
        nested = {name: nested}
    return nested


def overlay(base: dict[str, Any], top: dict[str, Any]) -> None:
    """Write `top` over `base`, mapping by mapping."""
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            overlay(base[key], value)
        else:
            base[key] = value
