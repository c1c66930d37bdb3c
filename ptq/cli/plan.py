"""`ptq plan MODEL`: what a run would compress, what it would need and what would come out, before it runs."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from typing import Any

from ptq.cli import options, prune, quantize, run
from ptq.cli.memory import keep_freed_memory
from ptq.errors import BadInput
from ptq.presets import METHODS, PRUNING_METHODS
from ptq.recipe import Recipe

EPILOG = """\
The options are those of `ptq quantize`, or with --sparsity or --nm those of `ptq prune`; or --recipe alone. Weights are not read: config,
safetensors headers, tokenizer and calibration text tell. A hub id is fetched first, as by a run. Memory is a model of the run, decoding a
roofline over this machine's bandwidth, measured now; `ptq bench` measures the speed itself.

example: ptq plan facebook/opt-125m --preset W4A8 --batch 8 --context 2048"""

QUANTIZE_ONLY = ("preset", "abits", "norm_abits", "kv_bits", "act_grid", "tile")
PRUNE_ONLY = ("sparsity", "nm", "first", "preserve", "refine", "allocation", "storage", "on_failure")
SHARED = ("method", "wbits", "groups", "set", "calib", "nsamples", "seqlen", "seed", "revision")


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "plan",
        help="predict a run: modules, bits, disk, memory, speed",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",  # the verbs share some options
    )
    parser.set_defaults(main=main, parser=parser)
    parser.add_argument("model", metavar="MODEL", help="a local folder or a hub id")
    parser.add_argument("--recipe", metavar="FILE", help="a recipe file, in place of the options of quantize and prune")
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--batch", type=options.whole, default=1, metavar="N", help="sequences at once (1)")
    decoding.add_argument(
        "--context", type=options.whole, default=512, metavar="N", help="tokens that each holds (512)"
    )
    quantize.add_choices(parser)
    prune.add_choices(parser)
    both = METHODS | PRUNING_METHODS
    parser.add_argument("--method", choices=both, metavar="M", help="see `ptq list` (default rptq, or sparsegpt)")
    options.add_calibration(parser)
    quantize.add_source(parser)
    options.add_device(parser)
    options.add_offline(parser)
    options.add_json(parser)


def main(args: argparse.Namespace) -> None:
    """Run the verb."""
    recipe = recipe_from_args(args)
    from ptq.plan import plan

    keep_freed_memory()  # as the run will
    found = plan(recipe, device=args.device, offline=args.offline, batch=args.batch, context=args.context)
    if args.json:
        options.write_json(args.json, found)
    if args.json != "-":
        print(text(recipe, found))


def recipe_from_args(args: argparse.Namespace) -> Recipe:
    """The recipe that `ptq quantize`, `prune` or `run` would make of the options.

    Raises:
        BadInput: options of two of them together, or what they refuse.
    """
    if args.recipe is not None:
        _refuse(args, (*QUANTIZE_ONLY, *PRUNE_ONLY, *SHARED), "--recipe says it all")
        return replace(run.trusted(args), model=args.model)
    if args.sparsity is None and args.nm is None and args.method not in PRUNING_METHODS:
        _refuse(args, PRUNE_ONLY, "pruning needs --sparsity or --nm")
        return quantize.recipe_from_args(args)
    _refuse(args, QUANTIZE_ONLY, "`ptq prune` does not have it")
    if args.method not in (None, *PRUNING_METHODS):
        raise BadInput(f"--method {args.method}: does not prune; choose one of {', '.join(PRUNING_METHODS)}")
    return prune.recipe_from_args(args)


def _refuse(args: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(args, name) not in (None, False, []):
            raise BadInput(f"--{name.replace('_', '-')}: {why}; leave it out")


def text(recipe: Recipe, found: dict[str, Any]) -> str:
    """The plan for a terminal."""
    bits, decode = found["effective_bits"], found["decode"]
    lines = [options.table(_rows(found), right=(1, 3, 4, 5, 6)), ""]
    lines += [f"not compressed: {what}: {why}" for what, why in _grouped(found["skipped_modules"])]
    lines += [f"by budget: {note}" for note in found["by_budget"]]
    kinds = {
        "weights": bits["weights_effective"],
        "activations": bits["activations_effective"],
        "keys and values": bits["kv_bits_effective"],
    }
    said = ", ".join(f"{kind} {'16' if n is None else format(n, '.2f')}" for kind, n in kinds.items())
    lines.append(f"effective bits: {said}")
    source, disk, running = (found[key] / 1e6 for key in ("source_bytes", "disk_bytes", "disk_bytes_while_running"))
    lines.append(f"disk: {source:.1f} MB -> {disk:.1f} MB, {running:.1f} MB while it runs")
    peak, process = found["peak_bytes"] / 1e6, found["process_bytes"] / 1e6
    lines.append(
        f"memory: peak {peak:.0f} MB, {process:.0f} MB before the first tensor; highest in {found['peak_phase']}"
    )
    return "\n".join([*lines, *_speed(decode)])


def _rows(found: dict[str, Any]) -> list[list[str]]:
    """Modules that differ in their block's number alone make one row."""
    rows: dict[tuple, int] = {}
    for module in found["compressed_modules"]:
        zeros = "-" if module["sparsity"] is None else module["keep"] or f"{module['sparsity']:.0%}"
        shape = " x ".join(map(str, module["shape"]))
        bits, effective = str(module["bits"]), f"{module['effective_bits']:.2f}"
        key = (_pattern(module["name"]), shape, bits, str(module["groups"]), zeros, effective)
        rows[key] = rows.get(key, 0) + 1
    heading = ["linear", "count", "shape", "bits", "groups", "zeros", "effective bits"]
    return [heading, *([name, str(count), *rest] for (name, *rest), count in rows.items())]


def _grouped(skipped: list[dict[str, str]]) -> list[tuple[str, str]]:
    counts: dict[tuple[str, str], int] = {}
    for one in skipped:
        key = (_pattern(one["name"]), one["reason"])
        counts[key] = counts.get(key, 0) + 1
    return [(f"{name} ({count})" if count > 1 else name, why) for (name, why), count in counts.items()]


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _speed(decode: dict[str, Any]) -> list[str]:
    ours, full = decode["compressed"], decode["full_precision"]
    at = f"batch {decode['batch']}, context {decode['context']}"
    rate = f"{ours['tokens_per_second']:.1f} tokens a second, full precision {full['tokens_per_second']:.1f}"
    read = ", ".join(f"{name} {share:.0%}" for name, share in ours["shares"].items())
    gigabytes = sum(ours[name] for name in ("weights", "keys_values", "activations")) / 1e9
    measured = f"{decode['bandwidth'] / 1e9:.1f} GB/s and {decode['arithmetic'] / 1e9:.0f} G multiplications/s measured"
    return [
        f"decoding, a roofline model at {at}: at most {rate} ({measured})",
        f"  a step reads {gigabytes:.3f} GB: {read}; {ours['pays']}",
    ]
