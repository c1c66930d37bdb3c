"""`ptq eval DIR`: perplexity under a named protocol, how far a model is from a reference, and zero-shot accuracy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ptq.cli import options
from ptq.errors import BadInput
from ptq.tasks import TASKS, Questions, read_task

KEYS = ("perplexity", "perplexity_stderr", "kl", "top1_agreement", "protocol", "tokens")


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
    folder = options.model_folder(args.folder)
    against = options.model_folder(args.against) if args.against else None
    tasks = _tasks(args)
    from ptq import checkpoint
    from ptq.evaluate import describe, evaluate
    from ptq.pipeline import pick_device
    from ptq.zero_shot import describe as describe_task
    from ptq.zero_shot import score_task

    device = pick_device(args.device)
    tokenizer = checkpoint.load_tokenizer(folder)
    windows = _windows(args, folder, tokenizer) if args.text is not None or not tasks else None
    if against and checkpoint.load_tokenizer(against).get_vocab() != tokenizer.get_vocab():
        raise BadInput(
            f"--against {against}: its vocabulary is not that of {folder}; give a model with the same tokens"
        )
    model = checkpoint.load(folder, device=device)
    written, lines = {}, []
    if windows is not None:
        reference = checkpoint.load(against, device=device) if against else None
        result = evaluate(model, windows, batch_size=args.batch_size, reference_model=reference)
        written |= {key: result[key] for key in KEYS if key in result}
        lines.append(describe(result))
    if tasks:
        results = [score_task(model, tokenizer, questions, batch_size=args.batch_size) for questions in tasks]
        written["tasks"] = {result["task"]: result for result in results}
        lines += [describe_task(result) for result in results]
    if args.json:
        options.write_json(args.json, written)
    if args.json != "-":
        print("\n".join(lines))


def _tasks(args: argparse.Namespace) -> list[Questions]:
    """The items of each task, read before any model is loaded. Raises BadInput for options that would do nothing."""
    if args.tasks is None:
        for name in ("task_files", "limit"):
            if getattr(args, name) is not None:
                raise BadInput(f"--{name.replace('_', '-')} is about tasks; add --tasks {','.join(TASKS)}")
        return []
    for name in ("protocol", "seqlen", "windows", "against"):
        if args.text is None and getattr(args, name) is not None:
            raise BadInput(f"--{name} is about a text, and --tasks alone evaluates none; add --text NAME|PATH")
    where = {"folder": args.task_files, "limit": args.limit, "offline": args.offline}
    return [read_task(name.strip(), **where) for name in dict.fromkeys(args.tasks.split(","))]


def _windows(args: argparse.Namespace, folder: Path, tokenizer: Any) -> Any:
    from ptq.evaluate import windows_for
    from ptq.texts import read_text

    protocol = "plain" if args.protocol is None else args.protocol
    text = read_text("bundled" if args.text is None else args.text, protocol=protocol, offline=args.offline)
    seqlen = args.seqlen or default_seqlen(folder)
    return windows_for(tokenizer, text, protocol=protocol, seqlen=seqlen, limit=args.windows)


def default_seqlen(folder: Path) -> int:
    """2048, as in both papers, or `max_position_embeddings` where that is less; the protocol line says which."""
    limit = options.read_json(folder / "config.json").get("max_position_embeddings")
    return min(2048, limit) if isinstance(limit, int) and limit > 1 else 2048
