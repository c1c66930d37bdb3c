#!/usr/bin/env python3
"""One table of perplexities: every row is a recipe, all rows on one model under one protocol.

usage: python scripts/results.py --model DIR --name NAME [--calib bundled|FILE] [--text bundled|FILE] [--nsamples 16]
           [--seqlen 512] [--mode first|random] [--windows 24] [--rows NAME ...] [--plots DIR] [--keep DIR]
           [--out results]

Writes OUT/NAME.json and OUT/NAME.md after each row. A row that is there and was measured with the same recipe, model,
calibration tokens and evaluation windows is not measured again, so an interrupted table goes on where it stopped.
Everything runs on the CPU. Exit 2: bad input.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from _tables import command, describe_machine, made_with, markdown, write, write_json

EVERY_SITE_8 = {"bits": 8, "norm_bits": 8, "q_bits": 8, "kv_bits": 8, "softmax_bits": 8}
RAGGED, PAD_TO = "W4A8", (64, 128)


@dataclass(frozen=True)
class Row:
    """`recipe` holds the keywords of `ptq.recipe_build.build`; None is the model as it is."""

    name: str
    low_bit: str
    recipe: dict | None


def inputs(bits, norm_bits, **more):
    """Only the inputs of linears are quantized."""
    return {**more, "activations": {"bits": bits, "norm_bits": norm_bits, **more.get("activations", {})}}


def per_token(recipe):
    """The same bits on each token's own range."""
    return {**recipe, "activations": {**recipe.get("activations", {}), "grid": "token"}}


RTN_W4A8 = {"method": "rtn", "preset": "W4A8"}
SMOOTH_W4A8 = {"method": "smoothquant", "preset": "W4A8"}
SMOOTH_W8A8 = {"method": "smoothquant", "weights": {"bits": 8}, "activations": EVERY_SITE_8}

# In the order of what a reader asks first: a table that is cut short still answers something.
ROWS = (
    Row("full", "nothing: full precision", None),
    Row("W4A16", "RPTQ: weights 4", {"preset": "W4A16"}),
    Row("W4A8", "RPTQ: weights 4, all activations 8", {"preset": "W4A8"}),
    Row("W4A4", "RPTQ: weights 4, activations 4 but norm outputs and softmax 8", {"preset": "W4A4"}),
    Row("W4A4KV", "RPTQ: weights 4, keys and values 4", {"preset": "W4A4KV"}),
    Row("W4A3KV", "RPTQ: weights 4, keys and values 3", {"preset": "W4A3KV"}),
    Row("W3A3KV", "RPTQ: weights 3, keys and values 3", {"preset": "W3A3KV"}),
    Row("rtn-W4A8-tensor", "round to nearest: weights 4, all activations 8 per tensor", RTN_W4A8),
    Row("rtn-W4A8-token", "round to nearest: weights 4, all activations 8, inputs per token", per_token(RTN_W4A8)),
    Row("rtn-W4", "round to nearest: weights 4 per channel", {"method": "rtn", "weights": {"bits": 4}}),
    Row("gptq-W4", "GPTQ: weights 4 per channel", {"method": "gptq", "weights": {"bits": 4}}),
    Row("smooth-W8A8-tensor", "SmoothQuant: weights 8, all activations 8 per tensor", SMOOTH_W8A8),
    Row("smooth-W8A8-token", "SmoothQuant: weights 8, all activations 8, inputs per token", per_token(SMOOTH_W8A8)),
    Row("smooth-W4A8-tensor", "SmoothQuant: weights 4, all activations 8 per tensor", SMOOTH_W4A8),
    Row("smooth-W4A8-token", "SmoothQuant: weights 4, all activations 8, inputs per token", per_token(SMOOTH_W4A8)),
    Row("inputs-A8", "RPTQ clusters: inputs of linears 8", inputs(8, 8)),
    Row("inputs-A8-tensor", "per tensor: inputs of linears 8", inputs(8, 8, method="rtn")),
    Row("inputs-A8-token", "per token: inputs of linears 8", per_token(inputs(8, 8, method="rtn"))),
    Row("inputs-A4-norm-8", "RPTQ clusters: inputs of linears 4, norm outputs 8", inputs(4, 8)),
    Row("inputs-A4-norm-8-tensor", "per tensor: inputs of linears 4, norm outputs 8", inputs(4, 8, method="rtn")),
    Row("inputs-A4", "RPTQ clusters: inputs of linears 4", inputs(4, 4)),
    Row("inputs-A4-tensor", "per tensor: inputs of linears 4", inputs(4, 4, method="rtn")),
    Row("KV4", "RPTQ: keys and values 4", {"activations": {"kv_bits": 4}}),
    Row("head-8", "output head 8, groups of 64", {"method": "rtn", "weights": {"head": 8}}),
    Row("head-4", "output head 4, groups of 64", {"method": "rtn", "weights": {"head": 4}}),
    Row("W4A8-tile-64", "W4A8, clusters of whole tiles of 64", {"preset": "W4A8", "clusters": {"tile": 64}}),
    Row("W4A8-tile-128", "W4A8, clusters of whole tiles of 128", {"preset": "W4A8", "clusters": {"tile": 128}}),
    Row("gptq-W4-g64", "GPTQ: weights 4, groups of 64", {"method": "gptq", "weights": {"bits": 4, "groups": 64}}),
    Row("group4-W4", "FlexGen's codec: weights 4", {"method": "group4", "weights": {"bits": 4}}),
    Row(
        "group4-W4KV4",
        "FlexGen's codec: weights 4, keys and values 4",
        {"method": "group4", "weights": {"bits": 4}, "activations": {"kv_bits": 4}},
    ),
)


@dataclass(frozen=True)
class Table:
    """What all rows share. `shared` is what a finished row must agree with to be kept."""

    args: argparse.Namespace
    windows: object
    shared: dict


def open_table(args):
    """Read the model's bytes, the calibration tokens and the evaluation windows once.

    Raises ptq.errors.BadInput.
    """
    from ptq.calibration import calibration_windows
    from ptq.checkpoint import load_tokenizer
    from ptq.perplexity import windows_for
    from ptq.source import resolve
    from ptq.texts import read_text

    folder = resolve(str(args.model), offline=True)
    tokenizer = load_tokenizer(folder)
    spec = {"nsamples": args.nsamples, "seqlen": args.seqlen, "mode": args.mode}
    calibration = calibration_windows(tokenizer, args.calib, **spec, offline=True)
    windows = windows_for(tokenizer, read_text(args.text), protocol="plain", seqlen=args.seqlen, limit=args.windows)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                digest.update(chunk)
    shared = {
        "model_sha256": digest.hexdigest(),
        "calibration": {"text": Path(args.calib).name, **spec, "fingerprint": calibration.fingerprint},
        "evaluation": windows.protocol,
    }
    return Table(args, windows, shared)


def recipe_of(row, table):
    """The row's recipe, or None. Model and text stand in it by name, so that its fingerprint is the same everywhere."""
    from ptq.recipe_build import build

    if row.recipe is None:
        return None
    args = table.args
    spec = {"text": Path(args.calib).name, "nsamples": args.nsamples, "seqlen": args.seqlen, "mode": args.mode}
    return build(**row.recipe, model=args.name, calibration=spec)


def identity(row, table):
    """What a finished row was measured with."""
    from ptq.recipe import fingerprint

    recipe = recipe_of(row, table)
    return {**table.shared, "recipe": None if recipe is None else fingerprint(recipe)}


def compress_row(row, table, folder):
    """Make the row's checkpoint; returns the part of the result that its report tells."""
    from ptq.pipeline import compress
    from ptq.progress import Progress

    named = recipe_of(row, table)
    calibration = replace(named.calibration, text=table.args.calib)
    recipe = replace(named, model=str(table.args.model), calibration=calibration)
    report = compress(recipe, out=folder, device="cpu", offline=True, progress=Progress(quiet=True))
    facts = {
        "weights_effective_bits": report["bits"]["weights_effective"],
        "bytes": report["sizes"]["compressed_bytes"],
        "seconds_compress": report["seconds"],
        "warnings": report["warnings"],
    }
    return facts | ({"padding": padding(folder)} if row.name == RAGGED else {})


def padding(folder):
    """Share of channels that padding the ragged clusters of R1, R4 and R5 to whole tiles would add, by tile."""
    import torch
    from safetensors.torch import load_file

    import rptq

    ranges = load_file(folder / "channel_ranges.safetensors")
    sizes = [t for name, t in ranges.items() if name.endswith((".R1.sizes", ".R4.sizes", ".R5.sizes"))]
    return {str(tile): rptq.padding_cost(torch.cat(sizes), tile) for tile in PAD_TO}  # L x [G] -> [sum G]


def measure(row, table):
    """Compress if there is something to compress, load through transformers, evaluate; returns the finished row.

    A recipe that does not fit the model, or breaks it, is a result too: its row says why.
    """
    from ptq.checkpoint import load
    from ptq.errors import PtqError
    from ptq.perplexity import evaluate

    args = table.args
    done = {"name": row.name, "low_bit": row.low_bit, "identity": identity(row, table)}
    done["made_with"] = made_with(args.threads)
    with tempfile.TemporaryDirectory(prefix="ptq-results-") as scratch:
        folder = args.model if row.recipe is None else Path(scratch) / row.name
        try:
            if row.recipe is None:
                done["bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            else:
                done |= compress_row(row, table, folder)
                if row.name == RAGGED and args.plots:
                    from ptq.plots import draw_ranges

                    draw_ranges(folder, args.plots)
            started = time.monotonic()
            found = evaluate(load(folder), table.windows)
            done |= {key: found[key] for key in ("perplexity", "perplexity_stderr", "tokens")}
            done["seconds_evaluate"] = time.monotonic() - started
        except PtqError as err:
            done["failed"] = f"{type(err).__name__}: {str(err).splitlines()[0]}"
        if args.keep and folder.is_dir() and row.recipe is not None:
            args.keep.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(args.keep / row.name, ignore_errors=True)
            shutil.move(folder, args.keep / row.name)
    return done


def finished_rows(path, table):
    """Rows by name that are in the table's file and still hold for this model and protocol."""
    if not path.is_file():
        return {}
    there = {row["name"]: row for row in json.loads(path.read_text(encoding="utf8"))["rows"]}
    known = {row.name: identity(row, table) for row in ROWS}
    kept = {name: row for name, row in there.items() if row["identity"] == known.get(name)}
    for name in sorted(there.keys() - kept.keys()):
        say(f"{name}: dropped, it was measured with another recipe, model, calibration or evaluation")
    return kept


def save(path, table, done):
    """Write OUT/NAME.json and OUT/NAME.md; returns the page."""
    rows = [done[row.name] for row in ROWS if row.name in done]
    write_json(path, {"table": table.args.name, "command": command_of(table.args), **table.shared, "rows": rows})
    text = page(table, rows)
    write(path.with_suffix(".md"), text)
    return text


def command_of(args):
    """The command line of the whole table; which rows of it one call made is of no interest."""
    names = ("model", "name", "calib", "text", "nsamples", "seqlen", "mode", "windows", "threads")
    return command([word for name in names for word in (f"--{name}", getattr(args, name))])


def page(table, rows):
    """The table and what a reader needs to judge it, as markdown."""
    full = next((row for row in rows if row["name"] == "full"), {}).get("perplexity")
    cells = [["row", "what is low-bit", "weight bits", "MB", "perplexity", "x full", "s"]]
    cells += [cells_of(row, full) for row in rows]
    p, c = table.shared["evaluation"], table.shared["calibration"]
    machines = sorted({describe_machine(row["made_with"]) for row in rows})
    notes = [
        f"Evaluated on {p['windows']} windows of {p['seqlen']} tokens of {p['text']} (sha256 {p['sha256'][:12]}), protocol"
        f" {p['protocol']}, no BOS in the windows; ± is the standard error over windows. Calibrated on {c['nsamples']} x"
        f" {c['seqlen']} tokens of {c['text']}, windows: {c['mode']}.",
        "Weight bits are effective bits of the linears in the blocks, and of a packed head: codes, scales, zero points, group sizes and"
        " permutations. MB is all safetensors, embeddings included. s is compressing plus evaluating, by the clock,"
        " whatever else the machine did.",
        *padding_note(rows),
        *(f"{row['name']}: n/a: {row['failed']}." for row in rows if "failed" in row),
        *(f"{row['name']}: {warning}" for row in rows for warning in row.get("warnings", [])),
        f"Made by `{command_of(table.args)}` on {'; '.join(machines)}. Model weights sha256 {table.shared['model_sha256'][:12]}.",
    ]
    return "\n\n".join([f"# {table.args.name}", markdown(cells, right=(2, 3, 5, 6)), *notes]) + "\n"


def cells_of(row, full):
    """One row as text."""
    bits = f"{row['weights_effective_bits']:.2f}" if "weights_effective_bits" in row else "-"
    size = f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "-"
    seconds = f"{row.get('seconds_compress', 0) + row.get('seconds_evaluate', 0):.0f}"
    if "failed" in row:
        return [row["name"], row["low_bit"], bits, size, "n/a, see below", "-", seconds]
    spread = "" if row["perplexity_stderr"] is None else f" ± {row['perplexity_stderr']:.2f}"
    ratio = "-" if full is None else f"{row['perplexity'] / full:.3f}"
    return [row["name"], row["low_bit"], bits, size, f"{row['perplexity']:.2f}{spread}", ratio, seconds]


def padding_note(rows):
    """What padding the ragged clusters would cost instead of aligning them."""
    found = next((row.get("padding") for row in rows if row["name"] == RAGGED), None)
    if found is None:
        return []
    costs = ", ".join(f"{share:.0%} for tiles of {tile}" for tile, share in found.items())
    return [f"Padding {RAGGED}'s clusters to whole tiles instead of aligning them would add channels: {costs}."]


def say(text):
    print(text, file=sys.stderr, flush=True)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="full-precision model folder")
    parser.add_argument("--name", required=True, help="the table's name")
    parser.add_argument("--calib", default="bundled", help="calibration text: bundled or a file")
    parser.add_argument("--text", default="bundled", help="evaluation text: bundled or a file")
    parser.add_argument("--nsamples", type=int, default=16, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens a window, in calibration and evaluation")
    parser.add_argument("--mode", choices=("first", "random"), default="random", help="how calibration windows are cut")
    parser.add_argument("--windows", type=int, default=24, help="evaluation windows")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--plots", type=Path, help=f"draw the channel ranges of row {RAGGED} into this folder")
    parser.add_argument("--keep", type=Path, help="leave the compressed checkpoints in this folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args()
    unknown = sorted(set(args.rows or ()) - {row.name for row in ROWS})
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}; there are {', '.join(row.name for row in ROWS)}")
    return args


def main():
    args = parse()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers.utils.logging import disable_progress_bar

    from ptq.errors import PtqError

    torch.set_num_threads(args.threads)
    disable_progress_bar()
    try:
        table = open_table(args)
    except PtqError as err:
        say(f"results: {err}")
        return err.exit_code
    path = args.out / f"{args.name}.json"
    done = finished_rows(path, table)
    for row in ROWS:
        if args.rows and row.name not in args.rows:
            continue
        if row.name in done and "failed" not in done[row.name]:
            say(f"{row.name}: there already")
            continue
        say(f"{row.name}: {row.low_bit} ...")
        done[row.name] = measure(row, table)
        save(path, table, done)
    print(save(path, table, done), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
