"""Options and small steps that several verbs share. Nothing heavy at the top: `ptq --help` reads this file."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptq.errors import BadInput


def whole(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """--calib, --nsamples, --seqlen and --seed."""
    data = parser.add_argument_group("calibration")
    data.add_argument(
        "--calib", metavar="NAME|PATH", help="bundled (default), wikitext2, ptb, c4, file, or several: a,b"
    )
    data.add_argument("--nsamples", type=whole, metavar="N", help="windows")
    data.add_argument("--seqlen", type=whole, metavar="N", help="tokens a window")
    data.add_argument("--seed", type=int, metavar="N", help="seed of everything random (default 0)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:N")


def add_stream(parser: argparse.ArgumentParser) -> None:
    """--stream."""
    what = (
        "read blocks from disk while the model runs, two in memory at a time: for a compressed DIR larger than memory"
    )
    parser.add_argument("--stream", action="store_true", help=what)


def add_offline(parser: argparse.ArgumentParser) -> None:
    """--offline."""
    parser.add_argument("--offline", action="store_true", help="no network: only local files and the hub's cache")


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", metavar="FILE|-", help="write the result as JSON to a file, or to stdout with -")


def add_loudness(parser: argparse.ArgumentParser) -> None:
    """-v and -q."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("-v", "--verbose", action="store_true", help="say more")
    either.add_argument("-q", "--quiet", action="store_true", help="say nothing but the result and errors")


def keywords(args: argparse.Namespace, function: Callable) -> dict[str, Any]:
    """The options of a command line that `function` takes, by name."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in vars(args).items() if name in names}


def set_environment(args: argparse.Namespace) -> None:
    """Switches that the Hugging Face libraries read when they are imported, so before any of them is."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # otherwise loading a .bin repository asks an online bot to convert it
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    if getattr(args, "quiet", False) or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if getattr(args, "offline", False):
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["TRANSFORMERS_OFFLINE"] = "1"


def write_json(target: str, value: Any) -> None:
    """Write `value` to the file `target`, or to stdout when `target` is "-"."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if target == "-":
        print(text)
        return
    try:
        Path(target).write_text(text + "\n", encoding="utf8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as err:
        raise BadInput(f"--json {target}: cannot be written: {err.strerror}") from err


def table(rows: list[list[str]], *, right: tuple[int, ...] = ()) -> str:
    """Rows as aligned text; the first is the heading. Columns in `right` are aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = ([c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in cells)
