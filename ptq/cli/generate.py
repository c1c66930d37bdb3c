"""`ptq generate DIR --prompt TEXT`: greedy decoding, to see that a model speaks."""

from __future__ import annotations

import argparse
from typing import Any

from ptq.cli import options
from ptq.errors import BadInput
from ptq.folders import model_folder


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    example = 'example: ptq generate opt-125m-w4a8 --prompt "Once upon"'
    parser = verbs.add_parser("generate", help="continue a prompt, greedily", epilog=example)
    parser.set_defaults(main=main, parser=parser)
    parser.add_argument("folder", metavar="DIR", help="a model folder, compressed or full precision")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue")
    parser.add_argument("--max-new-tokens", type=options.whole, default=64, metavar="N", help="no more than (64)")
    options.add_stream(parser)
    options.add_device(parser)


def main(args: argparse.Namespace) -> None:
    """Run the verb."""
    folder = model_folder(args.folder)
    from ptq import checkpoint
    from ptq.pipeline import pick_device

    device = pick_device(args.device)
    tokenizer = checkpoint.load_tokenizer(folder)
    inputs = tokenizer(args.prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise BadInput("--prompt: makes no token; give some text")
    model = checkpoint.load(folder, device=device, stream=args.stream)
    length = inputs["input_ids"].shape[1] + args.max_new_tokens
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise BadInput(
            f"--prompt and --max-new-tokens make {length} tokens, the model has {limit} positions; shorten one"
        )
    # a mask, so that a pad token inside the prompt is not taken for padding
    tokens = model.generate(
        inputs["input_ids"].to(device),
        attention_mask=inputs["attention_mask"].to(device),
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
        num_beams=1,
    )
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
