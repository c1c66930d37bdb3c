#!/usr/bin/env python3
"""The SparseGPT paper's perplexity tables (arXiv 2301.00774, Tables 1, 3 and 4), and the same rows on any other model.

usage: python scripts/reproduce_sparsegpt.py [--model FOLDER|ID ...] [--rows NAME ...] [--seeds 0 1 2] [--calib c4|FILE]
           [--texts wikitext2 ptb c4|FILE ...] [--nsamples 128] [--seqlen 2048] [--windows N] [--device auto]
           [--keep DIR] [--name sparsegpt] [--out results]

Without --model: OPT from 125M to 66B, from the hub. Each row is one `ptq prune`, then one `ptq eval` a text, under protocol
`sparsegpt`. OUT/NAME.json and OUT/NAME.md are written after each row, and a row that is there is not measured again, so an
interrupted table goes on where it stopped. Pruned checkpoints lie in TMPDIR while they are measured. Exit 2: bad input, or
a model or text that cannot be had.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from _published import MODELS, PERPLEXITY
from _tables import command, describe_machine, made_with, markdown, write, write_json

BAD_INPUT = 2  # exit status of ptq: no other row of this model will do better


@dataclass(frozen=True)
class Row:
    """`options` are those of `ptq prune`; None is the model as it is. `seeded`: calibration decides, so seeds matter."""

    name: str
    title: str
    options: tuple[str, ...] | None
    seeded: bool = True


HALF, PLAIN = ("--sparsity", "0.5"), ("--method", "sparsegpt", "--refine", "none", "--set", "weights.asymmetric=0")
BEST = ("--method", "admm", "--refine", "pcg:15", "--set", "weights.asymmetric=0.5")
ROWS = (
    Row("full", "full precision", None, seeded=False),
    Row("magnitude-50", "magnitude 50%", (*HALF, "--method", "magnitude", "--refine", "none"), seeded=False),
    Row("wanda-50", "Wanda 50%", (*HALF, "--method", "wanda", "--refine", "none")),
    Row("sparsegpt-50", "SparseGPT 50%", (*HALF, *PLAIN)),
    Row("sparsegpt-4:8", "SparseGPT 4:8", ("--nm", "4:8", *PLAIN)),
    Row("sparsegpt-2:4", "SparseGPT 2:4", ("--nm", "2:4", *PLAIN)),
    Row("joint-50-w4", "SparseGPT 50% + 4-bit", (*HALF, "--wbits", "4", *PLAIN)),
    Row("best-50", "ADMM + PCG, asymmetric 50%", (*HALF, *BEST)),
    Row("best-4:8", "ADMM + PCG, asymmetric 4:8", ("--nm", "4:8", *BEST)),
    Row("best-2:4", "ADMM + PCG, asymmetric 2:4", ("--nm", "2:4", *BEST)),
)


class CannotGoOn(Exception):
    """One line: what, where, how to mend."""


def label(source):
    """The name of a text in the table's files: a local file carries its bytes' hash, so another file is another text."""
    path = Path(source)
    return f"{path.name}@{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}" if path.is_file() else source


def settings(args):
    """What all rows of a table share."""
    shared = {"protocol": "sparsegpt", "calib": label(args.calib), "nsamples": args.nsamples, "seqlen": args.seqlen}
    return {**shared, "windows": args.windows}


def key(record):
    """What makes a record the one of its cell."""
    return record["model"], record["row"], record["seed"]


def planned(rows, seeds):
    """(row, seed) in the order they are measured; a row that no calibration reaches is measured once."""
    return [(row, seed) for row in rows for seed in (seeds if row.seeded else [None])]


def still_hold(records, name, weights):
    """The records without those whose row has other options by now, or that were made from other weights of this model."""
    options = {row.name: listed(row) for row in ROWS}
    kept = {
        cell: record
        for cell, record in records.items()
        if record["row"] in options
        and record["options"] == options[record["row"]]
        and (record["model"] != name or record["weights"] == weights)
    }
    for model, row, seed in sorted(records.keys() - kept.keys(), key=str):
        say(f"{model}, {row}, seed {seed}: dropped, it was measured with other options or weights")
    return kept


def finished_texts(record):
    """Results by text that a cell already has; a failure is tried again."""
    return {} if record is None else {name: found for name, found in record["texts"].items() if "perplexity" in found}


def listed(row):
    """The row's options as JSON holds them."""
    return None if row.options is None else list(row.options)


def read_records(path, shared):
    """Records by key. Raises CannotGoOn for a table that was made with other settings."""
    if not path.is_file():
        return {}
    there = json.loads(path.read_text(encoding="utf8"))
    old = there["settings"]
    differ = [f"{name} {old.get(name)}, not {value}" for name, value in shared.items() if old.get(name) != value]
    if differ:
        raise CannotGoOn(f"{path} was made with {'; '.join(differ)}: give another --name")
    return {key(record): record for record in there["rows"]}


def weights_of(folder):
    """What tells a model's weights apart: the commit of a hub snapshot, else a hash of the files."""
    from ptq.source import commit_of

    commit = commit_of(folder)
    if commit is not None:
        return commit
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                digest.update(chunk)
    return digest.hexdigest()


def run(words, args):
    """Run one verb of ptq; returns (exit status, its last line on stderr)."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    words = [sys.executable, "-m", "ptq", *map(str, words), "--device", args.device]
    words += ["--offline"] if args.offline else []
    done = subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return done.returncode, (done.stderr.strip().splitlines() or ["it said nothing"])[-1]


def prune(folder, out, row, seed, args):
    """Make the row's checkpoint; returns why it could not be made, or None. Raises CannotGoOn for bad input."""
    words = ["prune", folder, "--out", out, *row.options, "--calib", args.calib, "--seed", seed or 0, "-q"]
    status, said = run([*words, "--nsamples", args.nsamples, "--seqlen", args.seqlen], args)
    if status == BAD_INPUT:
        raise CannotGoOn(f"{row.name}: {said}")
    return f"prune: exit {status}: {said}" if status else None


def evaluate(folder, source, args, scratch):
    """One text's result; {"failed": why} where there is none. Raises CannotGoOn for bad input."""
    told = scratch / "eval.json"
    words = ["eval", folder, "--text", source, "--protocol", "sparsegpt", "--seqlen", args.seqlen, "--json", told]
    status, said = run([*words, *(("--windows", args.windows) if args.windows else ())], args)
    if status == BAD_INPUT:
        raise CannotGoOn(f"{source}: {said}")
    return {"failed": f"eval: exit {status}: {said}"} if status else json.loads(told.read_text(encoding="utf8"))


def measure(model, folder, row, seed, sources, args):
    """Prune if there is something to prune, evaluate `sources` (label -> text); returns label -> result and the seconds."""
    with tempfile.TemporaryDirectory(prefix="ptq-sparsegpt-") as temporary:
        scratch, facts = Path(temporary), {}
        out = folder if row.options is None else scratch / "out"
        if row.options is not None:
            why = prune(folder, out, row, seed, args)
            if why is not None:
                return {name: {"failed": why} for name in sources}, facts
            facts["seconds_prune"] = json.loads((out / "report.json").read_text(encoding="utf8"))["seconds"]
        found = {name: evaluate(out, source, args, scratch) for name, source in sources.items()}
        if args.keep and row.options is not None:
            kept = args.keep / f"{Path(model).name}-{row.name.replace(':', 'of')}-seed{seed or 0}"
            args.keep.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(kept, ignore_errors=True)
            shutil.move(out, kept)
    return found, facts


def measure_all(args, path):
    """Fill the table's file cell by cell."""
    from ptq.errors import PtqError
    from ptq.source import resolve
    from ptq.texts import read_text

    shared = settings(args)
    records = read_records(path, shared)
    sources = {label(source): source for source in args.texts}
    rows = [row for row in ROWS if not args.rows or row.name in args.rows]
    try:
        for source in args.texts:  # before hours of pruning, not after
            read_text(source, protocol="sparsegpt", offline=args.offline)
        for model in args.model:
            folder = resolve(model, offline=args.offline)
            weights, name = weights_of(folder), model_name(model)
            records = still_hold(records, name, weights)
            for row, seed in planned(rows, args.seeds):
                what = f"{name}, {row.title}" + ("" if seed is None else f", seed {seed}")
                done = finished_texts(records.get((name, row.name, seed)))
                missing = {text: source for text, source in sources.items() if text not in done}
                if not missing:
                    say(f"{what}: there already")
                    continue
                say(f"{what}: {', '.join(missing)} ...")
                found, facts = measure(name, folder, row, seed, missing, args)
                record = {"model": name, "row": row.name, "seed": seed, "weights": weights, "options": listed(row)}
                record |= {**facts, "made_with": machine(args), "texts": done | found}
                records[key(record)] = record
                save(path, args, shared, records)
    except PtqError as err:
        raise CannotGoOn(str(err)) from err
    return save(path, args, shared, records)


def machine(args):
    """The CPU and versions, and the accelerator if one does the work."""
    import torch

    from ptq.pipeline import pick_device

    device = torch.device(pick_device(args.device))
    name = {"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return made_with(args.threads) | name


def model_name(model):
    """A hub id as it is, a folder by its last part."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def save(path, args, shared, records):
    """Write OUT/NAME.json and OUT/NAME.md; returns the page."""
    order = {row.name: i for i, row in enumerate(ROWS)}
    models = list(dict.fromkeys([*map(model_name, args.model), *(model for model, _, _ in records)]))
    rows = sorted(records.values(), key=lambda r: (models.index(r["model"]), order[r["row"]], r["seed"] or 0))
    write_json(path, {"command": command_of(args), "settings": shared, "rows": rows})
    text = page(rows, shared, command_of(args))
    write(path.with_suffix(".md"), text)
    return text


def command_of(args):
    """The command line of the latest call, but for its choice of rows."""
    words = [word for model in args.model if model not in MODELS for word in ("--model", model)]
    words += ["--texts", *args.texts, "--seeds", *args.seeds]
    names = ("calib", "nsamples", "seqlen", "windows", "name", "device", "threads")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    words += [word for name, value in given.items() for word in (f"--{name}", value)]
    return command(words)


def page(records, shared, made_by):
    """One table a text: a line for each row, and below it what the paper printed for the same row, if anything."""
    models = list(dict.fromkeys(record["model"] for record in records))
    texts = list(dict.fromkeys(name for record in records for name in record["texts"]))
    windows = f"the first {shared['windows']} windows" if shared["windows"] else "all windows of the protocol"
    machines = sorted({describe(record["made_with"]) for record in records})
    failures = [
        f"{record['row']} of {record['model']}, seed {record['seed']}, {text}: {result['failed']}"
        for record in records
        for text, result in record["texts"].items()
        if "failed" in result
    ]
    parts = ["# SparseGPT's tables"]
    for text in texts:
        parts += [f"## {text}", markdown(table(records, text, models), right=range(1, len(models) + 1))]
    parts.append(
        f"Perplexity, protocol {shared['protocol']}, {windows}, {shared['seqlen']} tokens each. Calibrated on"
        f" {shared['nsamples']} x {shared['seqlen']} tokens of {shared['calib']}. ± is the standard deviation over as many"
        " seeds as the brackets say; a number without brackets is one run. 4:8 keeps 4 of every 8, 2:4 keeps 2 of every 4."
    )
    if any(record["model"] in MODELS for record in records):
        held = "the settings" if comparable(shared) else "not the settings"
        parts.append(
            "Lines marked (paper) are arXiv 2301.00774, Tables 1, 3 and 4, as printed: calibrated on 128 x 2048 tokens of"
            f" C4, evaluated on all windows, {held} of this table."
        )
    parts += [f"n/a: {failure}." for failure in failures]
    parts.append(f"Made by `{made_by}` on {'; '.join(machines)}.")
    return "\n\n".join(parts) + "\n"


def comparable(shared):
    """Whether the paper's numbers were measured with these settings."""
    paper = {"calib": "c4", "nsamples": 128, "seqlen": 2048, "windows": None}
    return all(shared[name] == value for name, value in paper.items())


def describe(facts):
    return (f"{facts['device']}; " if "device" in facts else "") + describe_machine(facts)


def table(records, text, models):
    """The cells of one text, heading first."""
    lines = [["row", *models]]
    for row in ROWS:
        found = [cell(records, text, model, row.name) for model in models]
        if any(one != "-" for one in found):
            lines.append([row.title, *found])
        printed = [published(text, row.name, model) for model in models]
        if any(one != "-" for one in printed):
            lines.append([f"{row.title} (paper)", *printed])
    return lines


def published(text, row, model):
    """The paper's number as printed, "-" if it has none."""
    line = PERPLEXITY.get(text, {}).get(row)
    return "-" if line is None or model not in MODELS else line.split()[MODELS.index(model)]


def cell(records, text, model, row):
    """Mean and standard deviation over the seeds that were measured, as text."""
    results = [r["texts"][text] for r in records if r["model"] == model and r["row"] == row and text in r["texts"]]
    values = [result["perplexity"] for result in results if "perplexity" in result]
    if not values:
        return "n/a" if results else "-"
    spread = f" ± {statistics.stdev(values):.2f} ({len(values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def say(text):
    print(text, file=sys.stderr, flush=True)


def parse(words=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = ", ".join(row.name for row in ROWS)
    parser.add_argument("--model", action="append", metavar="FOLDER|ID", help="repeatable (default: the paper's OPT)")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help=f"only these of {names}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--calib", default="c4", metavar="NAME|FILE", help="calibration text (default c4)")
    parser.add_argument("--texts", nargs="+", default=["wikitext2", "ptb", "c4"], metavar="NAME|FILE")
    parser.add_argument("--nsamples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens a window, in calibration and evaluation")
    parser.add_argument("--windows", type=int, help="only the first N evaluation windows")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--offline", action="store_true", help="only local files and the hub's cache")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the pruned checkpoints in this folder")
    parser.add_argument("--name", default="sparsegpt", help="the table's name")
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args(words)
    args.model = args.model or list(MODELS)
    unknown = sorted(set(args.rows or ()) - {row.name for row in ROWS})
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}; there are {names}")
    called = [model_name(model) for model in args.model]
    if len(set(called)) < len(called):
        parser.error(f"two models are called {max(called, key=called.count)}: rename a folder")
    return args


def main():
    args = parse()
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        text = measure_all(args, args.out / f"{args.name}.json")
    except CannotGoOn as err:
        print(f"reproduce_sparsegpt: {err}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
