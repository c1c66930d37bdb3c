"""argparse with one-line errors that suggest the nearest name."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from ptq.recipe_build import suggest


class Parser(argparse.ArgumentParser):
    """Errors are one line, `ptq: error: ...`, exit 2. Options must be spelled out, so that new ones break no script."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"unknown {value!r}{suggest(value, action.choices)}")

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":  # once, of all the processes that torchrun starts
            print(f"ptq: error: {message}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> Parser:
    """The whole command line. Imports nothing heavy, so that `ptq --help` is instant."""
    from ptq.cli import bench, eval, export, generate, inspect, list, plan, prune, quantize, run

    parser = Parser(
        prog="ptq",
        description="Compress a language model after training and run the packed low-bit result.",
        epilog="exit codes: 0 ok; 2 bad input; 3 unsupported model; 4 numerical failure; 130 Ctrl-C or SIGTERM",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in (plan, quantize, prune, run, eval, generate, export, bench, inspect, list):
        module.add(verbs)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse `argv`; an option that the verb does not have is an error that names the nearest one."""
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        word = unknown[0].split("=")[0]
        hint = suggest(word, args.parser._option_string_actions) if word.startswith("-") else ""
        args.parser.error(f"unrecognized argument {unknown[0]!r}{hint}")
    return args
