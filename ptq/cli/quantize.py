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
from ptq.recipe import Recipe
from ptq.recipe_options import nested, overlay, quantize_recipe

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
    add_choices(parser)
    options.add_calibration(parser)
    add_source(parser)
    add_run_options(parser)


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Options that say what is quantized, and how; `ptq plan` has them too."""
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
        BadInput: a bad --set, or what `recipe_options.quantize_recipe` refuses.
    """
    return quantize_recipe(**options.keywords(args, quantize_recipe), settings=parse_settings(args.set))


def parse_groups(text: str) -> str | int:
    """A name, or a size in channels."""
    return int(text) if text.isdigit() else text


def parse_settings(texts: list[str]) -> dict[str, Any]:
    """Turn ["weights.damp=0.05"] into {"weights": {"damp": 0.05}}; values are read as YAML, a later one has the last word."""
    import yaml

    whole: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise BadInput(f"--set {text}: expected KEY.SUB=VALUE, for instance --set weights.damp=0.05")
        try:
            overlay(whole, nested({key: yaml.safe_load(value)}))
        except yaml.YAMLError as err:
            raise BadInput(f"--set {text}: the value is not YAML: {' '.join(str(err).split())}") from err
    return whole
