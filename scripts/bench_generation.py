#!/usr/bin/env python3
"""Tokens a second of a compressed model beside transformers at float32 and bfloat16 and beside llama.cpp, in one run.

usage: python scripts/bench_generation.py DIR --against MODEL [--gguf FILE] [--threads 1,2] [--prefill 512] [--decode 128] [--rounds 3]
           [--out results/generation]

Runs `ptq bench` for each number of threads and writes OUT.json and OUT.md. llama.cpp takes part if --gguf names a file of the
same model and llama-cpp-python is installed. Use a machine that does nothing else. Exit 2: `ptq bench` refused.
"""

import argparse
import json
import sys
from pathlib import Path

from _bench import ptq_bench, publish
from _tables import describe_machine, markdown

NAMES = {
    "compressed": "ptq",
    "transformers_float32": "transformers, float32",
    "transformers_bfloat16": "transformers, bfloat16",
    "llama_cpp": "llama.cpp",
}


def measure(args):
    """Time each number of threads, and gather the numbers as plain JSON."""
    words = ["--against", str(args.against), *(["--gguf", str(args.gguf)] if args.gguf else [])]
    load = {"--prefill": args.prefill, "--decode": args.decode, "--rounds": args.rounds}
    return {
        "model": args.folder.name,
        "gguf": args.gguf and args.gguf.name,
        "bits": bits_of(args.folder),
        "prefill": args.prefill,
        "decode": args.decode,
        "rounds": args.rounds,
        "runs": [ptq_bench(args.folder, {"--threads": threads, **load}, *words) for threads in args.threads],
    }


def bits_of(folder):
    """What report.json says of the compressed model."""
    report = json.loads((folder / "report.json").read_text(encoding="utf8"))
    return report["bits"]


def table(found):
    rows = [["threads", "", "prefill tokens/s", "decode tokens/s", "peak MB", "file MB"]]
    for run in found["runs"]:
        for key, name in NAMES.items():
            if key in run:
                one = run[key]
                rates = (f"{one[f'{part}_tokens_per_second']:.1f}" for part in ("prefill", "decode"))
                sizes = (f"{one[f'{what}_bytes'] / 1e6:.0f}" for what in ("peak", "file"))
                rows.append([str(run["load"]["threads"]), name, *rates, *sizes])
    return markdown(rows, right=(0, 2, 3, 4, 5))


def page(found):
    bits = found["bits"]
    gguf = f" llama.cpp reads {found['gguf']}." if found["gguf"] else ""
    return "\n".join(
        [
            "# Generating, compressed and not",
            "",
            table(found),
            "",
            f"{found['model']}: {bits['weights_effective']:.2f} effective bits a weight, {bits['activations_effective']:.2f} an"
            " activation,"
            f" {bits['kv_bits_effective']:.2f} a cached value.{gguf} {found['prefill']} tokens read, then {found['decode']}"
            f" generated one by one, batch 1; medians of {found['rounds']} rounds, in which each takes its turn in a process of"
            " its own. Peak is resident memory as the kernel counts it, Python and PyTorch included, mapped pages of the file too.",
            "",
            f"Made by `{found['made_by']}` on {describe_machine(found['made_with'])}.",
            "",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="a compressed model folder")
    parser.add_argument("--against", type=Path, required=True, metavar="MODEL", help="the full-precision model folder")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="for llama.cpp")
    parser.add_argument(
        "--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2], help="one run each (1,2)"
    )
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt (512)")
    parser.add_argument("--decode", type=int, default=128, help="tokens generated (128)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (3)")
    parser.add_argument("--out", type=Path, default=Path("results/generation"), help="stem of the .json and .md")
    args = parser.parse_args()
    return publish(lambda: measure(args), page, args.out, max(args.threads))


if __name__ == "__main__":
    sys.exit(main())
