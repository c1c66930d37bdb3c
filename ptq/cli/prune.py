"""`ptq prune MODEL --out DIR`: a share of zeros, or n of m; with --wbits quantized in the same solve."""

from __future__ import annotations

import argparse
import re
from typing import Any

from ptq.cli import options
from ptq.cli.quantize import add_run_options, add_source, compress, parse_groups, parse_settings
from ptq.errors import BadInput
from ptq.presets import PRUNING_METHODS
from ptq.recipe import ALLOCATIONS, STORAGES, Recipe
from ptq.recipe_options import prune_recipe

EPILOG = """\
--nm 2:4 keeps 2 of every 4 weights along a row. Without --wbits the result is an ordinary checkpoint with zeros in it, which
loads anywhere; --storage packed stores only what is kept, and `import ptq` loads it.

example: ptq prune facebook/opt-125m --out opt-125m-sparse --sparsity 0.5"""


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = verbs.add_parser("prune", help="prune a model", epilog=EPILOG, formatter_class=formatter)
    parser.set_defaults(main=main, parser=parser)
    parser.add_argument("model", metavar="MODEL", help="a local folder or a hub id")
    parser.add_argument("--out", required=True, metavar="DIR", help="the new folder; it appears whole or not at all")
    add_choices(parser)
    options.add_calibration(parser)
    add_source(parser)
    add_run_options(parser)


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Options that say what is pruned, and how; `ptq plan` has them too."""
    what = parser.add_argument_group("what")
    what.add_argument("--sparsity", type=float, metavar="S", help="share of zeros, 0 to 1")
    what.add_argument("--nm", metavar="N:M", help="keep N of every M")
    what.add_argument("--wbits", type=int, metavar="N", help="quantize what is kept, in the same solve")
    what.add_argument(
        "--groups", type=parse_groups, metavar="G", help="weight groups under --wbits: channel (default) or a size"
    )
    what.add_argument("--first", type=float, metavar="S", help="only this share of the blocks, from the first on")
    what.add_argument("--preserve", action="store_true", help="zeros that are there stay, and count")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--method", choices=PRUNING_METHODS, metavar="M", help=f"{', '.join(PRUNING_METHODS)} (default sparsegpt)"
    )
    how.add_argument("--refine", metavar="pcg:N|none", help="conjugate gradient steps on what is kept")
    how.add_argument(
        "--allocation", choices=ALLOCATIONS, metavar="A", help=f"sparsity over the linears: {', '.join(ALLOCATIONS)}"
    )
    how.add_argument("--storage", choices=STORAGES, metavar="S", help="dense (default, zeros included) or packed")
    how.add_argument("--on-failure", metavar="F", help="stop (default), or skip: leave a module whole when its H fails")
    how.add_argument("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="any recipe key; repeatable")


def main(args: argparse.Namespace) -> None:
    """Run the verb."""
    compress(recipe_from_args(args), args)


def recipe_from_args(args: argparse.Namespace) -> Recipe:
    """The recipe that the options ask for. Pure.

    Raises:
        BadInput: a bad --refine or --set, or what `recipe_options.prune_recipe` refuses.
    """
    how = options.keywords(args, prune_recipe) | {"refine": _refine(args.refine)}
    return prune_recipe(**how, settings=parse_settings(args.set))


def _refine(text: str | None) -> int | None:
    if text is None:
        return None
    if text == "none":
        return 0
    found = re.fullmatch(r"pcg:(\d{1,4})", text)
    if not found:
        raise BadInput(f"--refine {text}: expected pcg:N, for instance pcg:10, or none")
    return int(found[1])
