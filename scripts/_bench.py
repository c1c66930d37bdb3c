"""What benchmarks share: a scratch folder, `ptq bench` in a process of its own, and pages of what was measured."""

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path

from _tables import command, made_with, write, write_json


class CannotMeasure(Exception):
    """One line: what, where, how to mend."""


def run_apart(make, *arguments):
    """Call `make` in a process of its own; returns the seconds it took."""
    started = time.monotonic()
    process = multiprocessing.get_context("spawn").Process(target=make, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise CannotMeasure(f"{make.__name__} ended with status {process.exitcode}: see its message above")
    return time.monotonic() - started


def ptq_bench(folder, options, *words):
    """What `ptq bench --json` says of a model folder; options: {"--threads": 2, ...}, words: further ones."""
    numbers = [str(word) for pair in options.items() for word in pair]
    run = [sys.executable, "-m", "ptq", "bench", str(folder), *numbers, *words, "--device", "cpu", "--json", "-"]
    done = subprocess.run(run, capture_output=True, text=True)
    if done.returncode:
        raise CannotMeasure((done.stderr.strip().splitlines() or ["ptq bench said nothing"])[-1])
    return json.loads(done.stdout)


def in_scratch(folder, keep, measure):
    """measure() while `folder`, which must not exist yet, does; then it goes, unless it is kept."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise CannotMeasure(f"{folder} exists: remove it or pass another --folder") from None
    try:
        return measure()
    finally:
        if not keep:
            shutil.rmtree(folder)


def publish(measure, page, out, threads):
    """Write what measure() finds to OUT.json and page() of it to OUT.md, and print that; the exit code, 2 if it cannot measure."""
    try:
        found = measure()
    except CannotMeasure as err:
        print(f"{Path(sys.argv[0]).stem}: {err}", file=sys.stderr)
        return 2
    found |= {"made_by": command(sys.argv[1:]), "made_with": made_with(threads)}
    write_json(out.with_suffix(".json"), found)
    write(out.with_suffix(".md"), page(found))
    print(page(found), end="")
    return 0
