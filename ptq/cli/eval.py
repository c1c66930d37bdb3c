"""`ptq eval DIR`: perplexity under a named protocol, and how far a model is from a reference."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ptq.cli import options
from ptq.errors import BadInput

KEYS = ("perplexity", "perplexity_stderr", "kl", "top1_agreement", "protocol", "tokens")


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "eval",
        help="measure perplexity, and the distance to a reference model",
        epilog="example: ptq eval opt-125m-w4a8 --text wikitext2 --protocol rptq --against opt-125m",
    )
    parser.set_defaults(main=main, parser=parser)
    parser.add_argument("folder", metavar="DIR", help="a model folder, compressed or full precision")
    parser.add_argument(
        "--text", default="bundled", metavar="NAME|PATH", help="bundled (the default), wikitext2, ptb, c4, or file"
    )
    parser.add_argument("--protocol", default="plain", metavar="P", help="plain (default), rptq or sparsegpt")
    parser.add_argument(
        "--seqlen", type=options.whole, metavar="N", help="tokens a window (default 2048, or all that the model takes)"
    )
    parser.add_argument("--windows", type=options.whole, metavar="N", help="only the first N windows")
    parser.add_argument("--batch-size", type=options.whole, default=4, metavar="N", help="windows at a time (4)")
    parser.add_argument("--against", metavar="DIR", help="reference model: adds KL divergence and top-1 agreement")
    options.add_device(parser)
    options.add_offline(parser)
    options.add_json(parser)


def main(args: argparse.Namespace) -> None:
    """Run the verb."""
    folder = options.model_folder(args.folder)
    against = options.model_folder(args.against) if args.against else None
    from ptq import checkpoint
    from ptq.evaluate import describe, evaluate, windows_for
    from ptq.pipeline import pick_device
    from ptq.texts import read_text

    device = pick_device(args.device)
    text = read_text(args.text, protocol=args.protocol, offline=args.offline)
    tokenizer = checkpoint.load_tokenizer(folder)
    if against and checkpoint.load_tokenizer(against).get_vocab() != tokenizer.get_vocab():
        raise BadInput(
            f"--against {against}: its vocabulary is not that of {folder}; give a model with the same tokens"
        )
    seqlen = args.seqlen or default_seqlen(folder)
    windows = windows_for(tokenizer, text, protocol=args.protocol, seqlen=seqlen, limit=args.windows)
    model = checkpoint.load(folder, device=device)
    reference = checkpoint.load(against, device=device) if against else None
    result = evaluate(model, windows, batch_size=args.batch_size, reference_model=reference)
    if args.json:
        options.write_json(args.json, {key: result[key] for key in KEYS if key in result})
    if args.json != "-":
        print(describe(result))


def default_seqlen(folder: Path) -> int:
    """2048, as in both papers, or `max_position_embeddings` where that is less; the protocol line says which."""
    limit = options.read_json(folder / "config.json").get("max_position_embeddings")
    return min(2048, limit) if isinstance(limit, int) and limit > 1 else 2048
