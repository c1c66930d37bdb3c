"""`ptq bench DIR`: tokens a second and peak memory, compressed and full precision in turn."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ptq.cli import options
from ptq.errors import BadInput
from ptq.folders import model_folder, read_json


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "bench",
        help="time prefill and decoding beside other ways to run the model",
        epilog="example: ptq bench opt-125m-w4a8 --against opt-125m --prefill 512 --decode 128",
    )
    parser.set_defaults(main=main, parser=parser)
    parser.add_argument("folder", metavar="DIR", help="a model folder, compressed or full precision")
    parser.add_argument(
        "--against", metavar="DIR", help="full-precision model: transformers runs it at float32 and bfloat16"
    )
    parser.add_argument("--gguf", metavar="FILE", help="llama.cpp runs it, if llama-cpp-python is installed")
    parser.add_argument("--prefill", type=options.whole, default=512, metavar="N", help="tokens of the prompt (512)")
    parser.add_argument(
        "--decode", type=options.whole, default=128, metavar="N", help="tokens to generate, from 2 (128)"
    )
    parser.add_argument("--batch-size", type=options.whole, default=1, metavar="N", help="sequences at once (1)")
    parser.add_argument(
        "--threads", type=options.whole, metavar="N", help="CPU threads (all that this process may use)"
    )
    parser.add_argument(
        "--rounds", type=options.whole, default=3, metavar="N", help="turns of each; medians are shown (3)"
    )
    options.add_stream(parser)
    options.add_device(parser)
    options.add_json(parser)


def main(args: argparse.Namespace) -> None:
    """Run the verb."""
    folder = model_folder(args.folder)
    against = model_folder(args.against) if args.against else None
    gguf = Path(args.gguf) if args.gguf else None
    if gguf is not None and not gguf.is_file():
        raise BadInput(f"--gguf: {gguf}: no such file")
    if args.decode < 2:
        raise BadInput("--decode: the first new token comes with the prefill; give at least 2")
    if gguf is not None and args.batch_size > 1:
        raise BadInput("--gguf: llama.cpp is timed on one sequence; leave --batch-size 1")
    from ptq import bench
    from ptq.pipeline import pick_device

    threads = args.threads or len(os.sched_getaffinity(0))
    load = bench.Load(args.prefill, args.decode, args.batch_size, threads, str(pick_device(args.device)))
    _check_length(folder, load)
    say = (lambda text: None) if args.json == "-" else print
    found = bench.bench(bench.contenders(folder, against, gguf, stream=args.stream), load, rounds=args.rounds, say=say)
    if args.json:
        options.write_json(args.json, {**found, "load": vars(load), "rounds": args.rounds, "stream": args.stream})
    if args.json != "-":
        print(table(found, load))


def _check_length(folder: Path, load: Any) -> None:
    limit = read_json(folder / "config.json").get("max_position_embeddings")
    if isinstance(limit, int) and load.prefill + load.decode > limit:
        total = load.prefill + load.decode
        raise BadInput(f"--prefill and --decode make {total} tokens, the model has {limit} positions; shorten one")


def table(found: dict[str, dict[str, Any]], load: Any) -> str:
    """The result for a terminal."""
    head = f"{'':24}{'prefill':>10}{'decode':>10}{'both':>10}{'peak MB':>10}{'file MB':>10}"
    rows = [
        f"{name:24}{one['prefill_tokens_per_second']:10.1f}{one['decode_tokens_per_second']:10.1f}"
        f"{one['generation_tokens_per_second']:10.1f}{one['peak_bytes'] / 1e6:10.0f}{one['file_bytes'] / 1e6:10.1f}"
        for name, one in found.items()
    ]
    what = f"tokens a second: {load.prefill} read, {load.decode} generated, batch {load.batch}, {load.threads} threads"
    return "\n".join([head, *rows, f"{what}, {load.device}; both: generated over the time of prefill and decoding"])
