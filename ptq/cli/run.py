"""`ptq run RECIPE.yaml --out DIR`: everything spelled out in a file."""

from __future__ import annotations

import argparse
from typing import Any

from ptq.cli.quantize import add_run_options, compress
from ptq.errors import BadInput
from ptq.recipe import Recipe
from ptq.recipe_build import load_yaml


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("run", help="run a recipe file", epilog="example: ptq run recipe.yaml --out opt-w4a8")
    parser.set_defaults(main=main, parser=parser)
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="for instance the recipe.yaml of a finished run")
    parser.add_argument("--out", required=True, metavar="DIR", help="the new folder; it appears whole or not at all")
    parser.add_argument("--trust-remote-code", action="store_true", help="needed beside a recipe that asks for it")
    add_run_options(parser)


def main(args: argparse.Namespace) -> None:
    """Run the verb."""
    compress(recipe_from_args(args), args)


def recipe_from_args(args: argparse.Namespace) -> Recipe:
    """The recipe in the file.

    Raises:
        BadInput: a bad file, no model in it, or a file that asks for remote code when the command line does not.
    """
    recipe = trusted(args)
    if not recipe.model:
        raise BadInput(f"recipe {args.recipe}: names no model; add `model: FOLDER or hub id`")
    return recipe


def trusted(args: argparse.Namespace) -> Recipe:
    """The recipe in the file, with or without a model. Raises BadInput as `recipe_from_args` does otherwise."""
    recipe = load_yaml(args.recipe)
    # a recipe is something one downloads; only the person at the keyboard may let a model run its own code
    if recipe.trust_remote_code and not args.trust_remote_code:
        raise BadInput(f"recipe {args.recipe}: asks to run the model's own code; to allow it add --trust-remote-code")
    return recipe
