"""`ptq export DIR --format F --out DIR2`: the same model in another engine's format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ptq.cli import options
from ptq.export import FORMATS, export, parse
from ptq.folders import model_folder


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    width = max(map(len, FORMATS))
    notes = [f"  {name:<{width}}  {f.note}{_variants(f.variants)}" for name, f in FORMATS.items()]
    example = "example: ptq export opt-125m-w4 --format compressed-tensors --out opt-125m-w4-ct"
    parser = verbs.add_parser(
        "export",
        help="write a model in another engine's format",
        epilog="\n".join(["formats (NAME, or NAME:VARIANT):", *notes, "", example]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(main=main, parser=parser)
    parser.add_argument("folder", metavar="DIR", help="a folder that ptq wrote; for gguf also a full-precision one")
    parser.add_argument("--format", required=True, metavar="F", help=f"{', '.join(FORMATS)}; see below")
    parser.add_argument("--out", required=True, metavar="DIR2", help="the new folder; it appears whole or not at all")
    parser.add_argument(
        "--weights-only", action="store_true", help="leave out how activations, keys and values are rounded"
    )
    options.add_json(parser)


def main(args: argparse.Namespace) -> None:
    """Run the verb."""
    parse(args.format)  # a misspelt format is told before anything is read
    report = export(model_folder(args.folder), Path(args.out), args.format, weights_only=args.weights_only)
    if args.json:
        options.write_json(args.json, report)
    if args.json != "-":
        print(summary(Path(args.out), report))


def summary(out: Path, report: dict[str, Any]) -> str:
    """What was written, how far it is from the source, and what it lacks."""
    rows = report["modules"]
    kept = sum(row["stored"] == "codes" for row in rows)
    again = sum(row["stored"] == "rounded" for row in rows)
    lines = [f"{out}: {report['format']} {report['variant']}, {len(rows)} linears" + _kinds(kept, again)]
    worst = max(rows, key=lambda row: row["largest_difference"])
    if worst["largest_difference"] == 0:
        lines.append("every weight equals the source's")
    else:
        where = f"{worst['largest_difference']:.2e} in {worst['name']}, whose largest is {worst['largest_weight']:.2e}"
        most = max(row["relative_difference"] for row in rows)
        lines.append(
            f"largest difference of a weight from the source's: {where}; at most {most:.2%} of a linear's norm"
        )
    lines += [f"left out, as asked: {line}" for line in report["left_out"]]
    lines += [f"note: {note}" for note in report["notes"]]
    return "\n".join([*lines, f"every linear's difference: {out / 'export.json'}"])


def _kinds(kept: int, again: int) -> str:
    parts = [f"{kept} with their codes"] if kept else []
    parts += [f"{again} rounded again"] if again else []
    return f" ({', '.join(parts)})" if parts else ""


def _variants(variants: tuple[str, ...]) -> str:
    return f"; variants {', '.join(variants)}" if variants else ""
