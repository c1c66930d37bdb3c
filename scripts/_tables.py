"""What every measured table carries: the machine, the versions, the command; and how its files are written."""

import json
import os
import platform
import shlex
import sys
from pathlib import Path


def made_with(threads):
    """CPU model, cores, threads and versions, as plain JSON."""
    import torch
    import transformers

    import ptq

    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ptq": ptq.__version__,
    }


def cpu_model():
    """The CPU's own name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def describe_machine(facts):
    """`made_with` in one line."""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "transformers", "ptq"))
    return f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads; {versions}"


def command(words):
    """The calling script with these arguments, as a reader would type it: no folder outside the current one."""
    here = f"{Path.cwd()}{os.sep}"
    inside = [str(word).removeprefix(here) for word in words]
    shown = [Path(word).name if os.path.isabs(word) else word for word in inside]
    return shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *shown])


def markdown(rows, right=()):
    """Rows of text as a markdown table; the first is the heading, columns in `right` are aligned to the right."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    rule = ["-" * (w - 1) + ":" if i in right else "-" * w for i, w in enumerate(widths)]
    cells = [[c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], rule, *cells[1:]])


def write(path, text):
    """Write a text file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text, encoding="utf8")
    partial.replace(path)


def write_json(path, value):
    """JSON, whole or not at all."""
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
