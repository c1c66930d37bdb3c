"""A table of perplexities, resumable cell by cell: each row is one verb of ptq, each text one `ptq eval`.

OUT/NAME.json and OUT/NAME.md are written after each cell, and a cell that is there is not measured again.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from _page import BITS, page
from _tables import command, made_with, write, write_json

BAD_INPUT = 2  # exit status of ptq: no other row of this model will do better


class CannotGoOn(Exception):
    """One line: what, where, how to mend."""


def parser_of(table, about, parents=()):
    """The parser of a table's command line; the first line of `about` is its description."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0], parents=parents)
    names = ", ".join(row.name for row in table.rows)
    parser.add_argument("--model", action="append", metavar="FOLDER|ID", help="repeatable (default: the table's own)")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help=f"only these of {names}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--calib", default=table.calib, metavar="NAME|FILE", help=f"calibration text ({table.calib})")
    parser.add_argument("--texts", nargs="+", default=list(table.texts), metavar="NAME|FILE")
    parser.add_argument("--nsamples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens a window, in calibration and evaluation")
    parser.set_defaults(mode=None)
    if table.modes:
        parser.add_argument("--mode", choices=table.modes, help="how calibration windows are drawn (random)")
    parser.add_argument("--windows", type=int, help="only the first N evaluation windows")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--offline", action="store_true", help="only local files and the hub's cache")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the compressed checkpoints in this folder")
    parser.add_argument("--name", default=table.name, help="the table's name")
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser


def parsed(table, parser, words=None):
    """The command line, with the table's own models and rows filled in."""
    args = parser.parse_args(words)
    args.model = args.model or list(table.models)
    names = [row.name for row in table.rows]
    unknown = sorted(set(args.rows or ()) - set(names))
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}; there are {', '.join(names)}")
    args.rows = args.rows or list(table.measured or names)
    called = [model_name(model) for model in args.model]
    if len(set(called)) < len(called):
        parser.error(f"two models are called {max(called, key=called.count)}: rename a folder")
    return args


def main(table, args):
    """Measure what is missing and print the page; returns the exit status."""
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        text = measure_all(table, args, args.out / f"{args.name}.json")
    except CannotGoOn as err:
        print(f"{Path(sys.argv[0]).stem}: {err}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


def measure_all(table, args, path):
    """Fill the table's file cell by cell; returns the page."""
    from ptq.errors import PtqError
    from ptq.texts import read_text

    shared = settings(table, args)
    records = read_records(path, shared)
    try:
        for source in args.texts:  # before hours of compression, not after
            read_text(source, protocol=table.protocol, offline=args.offline)
        for model in args.model:
            records = measure_model(table, args, path, shared, records, model)
    except PtqError as err:
        raise CannotGoOn(str(err)) from err
    return save(table, path, args, shared, records)


def measure_model(table, args, path, shared, records, model):
    """Measure and save the cells of one model that are missing; returns all records."""
    from ptq.source import resolve

    folder = resolve(model, offline=args.offline)
    weights, name = weights_of(folder), model_name(model)
    records = still_hold(table, records, name, weights)
    sources = {label(source): source for source in args.texts}
    for row, seed in planned([row for row in table.rows if row.name in args.rows], args.seeds):
        what = f"{name}, {row.title}" + ("" if seed is None else f", seed {seed}")
        done = finished_texts(records.get((name, row.name, seed)))
        missing = {text: source for text, source in sources.items() if text not in done}
        if not missing:
            say(f"{what}: there already")
            continue
        say(f"{what}: {', '.join(missing)} ...")
        found, facts = measure(table, name, folder, row, seed, missing, args)
        record = {"model": name, "row": row.name, "seed": seed, "weights": weights}
        record |= {"options": listed(row), "recipe": recipe_of(table, row)}
        record |= {**facts, "made_with": machine(args), "texts": done | found}
        records[key(record)] = record
        save(table, path, args, shared, records)
    return records


def measure(table, model, folder, row, seed, sources, args):
    """Make the row's checkpoint and evaluate `sources` (label -> text).

    Returns label -> result, and facts on the checkpoint.
    """
    with tempfile.TemporaryDirectory(prefix=f"ptq-{table.protocol}-") as temporary:
        scratch, out = Path(temporary), Path(temporary) / "out"
        if row.options is None:
            return evaluate_all(table, folder, sources, args, scratch), {}
        why = compress(table, folder, out, row, seed, args)
        if why is not None:
            return {name: {"failed": why} for name in sources}, {}
        facts = facts_of(table, json.loads((out / "report.json").read_text(encoding="utf8")))
        found = evaluate_all(table, out, sources, args, scratch)
        if args.keep:
            kept = args.keep / f"{Path(model).name}-{row.name.replace(':', 'of')}-seed{seed or 0}"
            args.keep.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(kept, ignore_errors=True)
            shutil.move(out, kept)
    return found, facts


def compress(table, folder, out, row, seed, args):
    """Make the row's checkpoint; returns why it could not be made, or None. Raises CannotGoOn for bad input."""
    words = [table.verb, folder, "--out", out, *row.options, "--calib", args.calib, "--seed", seed or 0, "-q"]
    words += ["--set", f"calibration.mode={args.mode}"] if args.mode else []
    status, said = run([*words, "--nsamples", args.nsamples, "--seqlen", args.seqlen], args)
    if status == BAD_INPUT:
        raise CannotGoOn(f"{row.name}: {said}")
    return f"{table.verb}: exit {status}: {said}" if status else None


def facts_of(table, report):
    """What a record keeps of report.json."""
    facts = {f"seconds_{table.verb}": report["seconds"]}
    return facts | ({"bits": {name: report["bits"][name] for name in BITS}} if table.detailed else {})


def evaluate_all(table, folder, sources, args, scratch):
    """Label -> result."""
    return {name: evaluate(table, folder, source, args, scratch) for name, source in sources.items()}


def evaluate(table, folder, source, args, scratch):
    """One text's result; {"failed": why} where there is none. Raises CannotGoOn for bad input."""
    told = scratch / "eval.json"
    words = ["eval", folder, "--text", source, "--protocol", table.protocol, "--seqlen", args.seqlen, "--json", told]
    status, said = run([*words, *(("--windows", args.windows) if args.windows else ())], args)
    if status == BAD_INPUT:
        raise CannotGoOn(f"{source}: {said}")
    return {"failed": f"eval: exit {status}: {said}"} if status else json.loads(told.read_text(encoding="utf8"))


def run(words, args):
    """Run one verb of ptq; returns (exit status, its last line on stderr)."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    words = [sys.executable, "-m", "ptq", *map(str, words), "--device", args.device]
    words += ["--offline"] if args.offline else []
    done = subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return done.returncode, (done.stderr.strip().splitlines() or ["it said nothing"])[-1]


def mixed(source):
    """The texts of a mix "a,b,c", as `ptq` reads it; any other source is its own only one."""
    return [source] if Path(source).exists() else [name.strip() for name in source.split(",")]


def label(source):
    """The name of a text in the table's files: a file carries its bytes' hash, so another file is another text."""
    return ",".join(map(label_of_one, mixed(source)))


def label_of_one(source):
    """The label of a text that is no mix."""
    path = Path(source)
    return f"{path.name}@{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}" if path.is_file() else source


def settings(table, args):
    """What all rows of a table share."""
    shared = {"protocol": table.protocol, "calib": label(args.calib), "nsamples": args.nsamples, "seqlen": args.seqlen}
    return {**shared, "windows": args.windows, **({"mode": args.mode} if args.mode else {})}


def key(record):
    """What makes a record the one of its cell."""
    return record["model"], record["row"], record["seed"]


def planned(rows, seeds):
    """(row, seed) in the order they are measured; a row that no calibration reaches is measured once."""
    return [(row, seed) for row in rows for seed in (seeds if row.seeded else [None])]


def still_hold(table, records, name, weights):
    """The records but for those of a row whose options mean another recipe by now, or of other weights of this model."""
    recipes = {row.name: recipe_of(table, row) for row in table.rows}
    kept = {
        cell: record
        for cell, record in records.items()
        if record["row"] in recipes
        and record.get("recipe") == recipes[record["row"]]
        and (record["model"] != name or record["weights"] == weights)
    }
    for model, row, seed in sorted(records.keys() - kept.keys(), key=str):
        say(f"{model}, {row}, seed {seed}: dropped, it was measured with another recipe or other weights")
    return kept


def finished_texts(record):
    """Results by text that a cell already has; a failure is tried again."""
    return {} if record is None else {name: found for name, found in record["texts"].items() if "perplexity" in found}


def recipe_of(table, row):
    """The fingerprint of what the row's options ask of the verb today, defaults included; None for the model as it is."""
    from ptq import cli
    from ptq.cli.parser import parse
    from ptq.recipe import fingerprint

    if row.options is None:
        return None
    args = parse([table.verb, "MODEL", "--out", "DIR", *row.options])
    return fingerprint(getattr(cli, table.verb).recipe_from_args(args))


def listed(row):
    """The row's options as JSON holds them."""
    return None if row.options is None else list(row.options)


def read_records(path, shared):
    """Records by key. Raises CannotGoOn for a table that was made with other settings."""
    if not path.is_file():
        return {}
    there = json.loads(path.read_text(encoding="utf8"))
    old = there["settings"]
    names = [name for name in {**shared, **old} if old.get(name) != shared.get(name)]
    if names:
        differ = "; ".join(f"{name} {old.get(name)}, not {shared.get(name)}" for name in names)
        raise CannotGoOn(f"{path} was made with {differ}: give another --name")
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


def save(table, path, args, shared, records):
    """Write OUT/NAME.json and OUT/NAME.md; returns the page."""
    order = {row.name: i for i, row in enumerate(table.rows)}
    models = list(dict.fromkeys([*map(model_name, args.model), *(model for model, _, _ in records)]))
    rows = sorted(records.values(), key=lambda r: (models.index(r["model"]), order[r["row"]], r["seed"] or 0))
    made_by = command_of(table, args)
    write_json(path, {"command": made_by, "settings": shared, "rows": rows})
    text = page(table, rows, shared, made_by)
    write(path.with_suffix(".md"), text)
    return text


def command_of(table, args):
    """The command line of the latest call, but for its choice of rows."""
    words = [*table.chosen_by, *(word for m in args.model if m not in table.models for word in ("--model", m))]
    words += ["--texts", *args.texts, "--seeds", *args.seeds]
    names = ("calib", "nsamples", "seqlen", "mode", "windows", "name", "device", "threads")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given["calib"] = shown(args.calib)
    words += [word for name, value in given.items() for word in (f"--{name}", value)]
    return command(words)


def shown(source):
    """A mix without the folders of its files; `command` sees to any other source."""
    names = mixed(source)
    return source if len(names) == 1 else ",".join(Path(name).name for name in names)


def say(text):
    """Progress goes to stderr, the page to stdout."""
    print(text, file=sys.stderr, flush=True)
