"""`ptq list`: what there is to choose from."""

from __future__ import annotations

import argparse
from typing import Any

from ptq.cli.options import table
from ptq.presets import METHOD_NOTES, PRESETS

HEADING = ["preset", "weights", "norm outputs", "queries", "keys, values", "o and down inputs", "softmax"]
SITES = ("norm_bits", "q_bits", "kv_bits", "bits", "softmax_bits")


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("list", help="architectures, presets, methods and formats")
    parser.set_defaults(main=main, parser=parser)


def main(args: argparse.Namespace) -> None:
    """Run the verb."""
    from ptq.architectures import FAMILIES
    from ptq.export import FORMATS

    print(f"architectures (model_type)\n  {', '.join(sorted(FAMILIES))}\n")
    print("presets: bits per site (- is full precision: embeddings, head, norms and the residual stream always are)")
    print(_indent(table(preset_rows(), right=tuple(range(1, len(HEADING))))) + "\n")
    print("methods (ptq quantize, then ptq prune)")
    print(_indent("\n".join(f"{name:<12} {note}" for name, note in METHOD_NOTES.items())) + "\n")
    print("formats (ptq export)")
    print(_indent("\n".join(f"{name:<18} {form.note}" for name, form in FORMATS.items())))


def preset_rows() -> list[list[str]]:
    """The presets as a table with a heading."""
    rows = [HEADING]
    for name, preset in PRESETS.items():
        bits = [preset["weights"]["bits"], *(preset["activations"][site] for site in SITES)]
        rows.append([name, *("-" if b == 16 else str(b) for b in bits)])
    return rows


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
