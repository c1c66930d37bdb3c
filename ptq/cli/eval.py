"""`ptq eval DIR`: perplexity under a named protocol, how far a model is from a reference, and zero-shot accuracy."""

from __future__ import annotations

import argparse
from typing import Any

from ptq.cli import options
from ptq.folders import model_folder
from ptq.tasks import TASKS


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "eval",
        help="measure perplexity, the distance to a reference model, and zero-shot accuracy",
        epilog="example: ptq eval opt-125m-w4a8 --text wikitext2 --protocol rptq --against opt-125m",
    )
    parser.set_defaults(main=main, parser=parser)
    parser.add_argument("folder", metavar="DIR", help="a model folder, compressed or full precision")
    parser.add_argument(
        "--text",
        metavar="NAME|PATH",
        help="bundled (the default, but none beside --tasks), wikitext2, ptb, c4, or file",
    )
    parser.add_argument("--protocol", metavar="P", help="plain (default), rptq or sparsegpt")
    parser.add_argument(
        "--seqlen", type=options.whole, metavar="N", help="tokens a window (default 2048, or all that the model takes)"
    )
    parser.add_argument("--windows", type=options.whole, metavar="N", help="only the first N windows")
    parser.add_argument(
        "--batch-size", type=options.whole, default=4, metavar="N", help="windows, or choices of tasks, at a time (4)"
    )
    parser.add_argument("--against", metavar="DIR", help="reference model: adds KL divergence and top-1 agreement")
    parser.add_argument("--tasks", metavar="A,B", help=f"zero-shot tasks: {', '.join(TASKS)}")
    parser.add_argument("--task-files", metavar="FOLDER", help="their items, in files NAME*.jsonl (default: the hub)")
    parser.add_argument("--limit", type=options.whole, metavar="N", help="only the first N items of each task")
    options.add_device(parser)
    options.add_offline(parser)
    options.add_json(parser)


def main(args: argparse.Namespace) -> None:
    """Run the verb."""
    folder = model_folder(args.folder)  # before torch is imported, which takes seconds
    from ptq.evaluation import describe, evaluate

    tasks = None if args.tasks is None else [name.strip() for name in args.tasks.split(",")]
    found = evaluate(folder, **options.keywords(args, evaluate) | {"tasks": tasks})
    if args.json:
        options.write_json(args.json, found)
    if args.json != "-":
        print(describe(found))
