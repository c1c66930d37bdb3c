#!/usr/bin/env python3
"""Time the native integer linears beside ggml's, ONNX Runtime's and PyTorch's, in one run.

usage: python scripts/bench_cpu.py [--channels 4096] [--rows 16384] [--tokens 1,16] [--threads 1,2] [--rounds 7] [--calls 3]
           [--peers FOLDER] [--out results/cpu]

Each library has a process of its own and takes turns, product by product; a turn is one call that is not timed and --calls that are, the
caches emptied before each, as a model's other layers do. All of what a call does is timed: quantization of activations, scales, zero
points. Every product is checked against float64 first. Aims are not judged if other processes took part of the machine meanwhile.
--peers: an environment with llama-cpp-python, onnx and onnxruntime; made with pip if there is none (llama.cpp may be compiled: minutes).
Without it they do not take part, and the page says so. Writes OUT.json and OUT.md. Use a machine that does nothing else. Exit 2: a library
failed, or there is no compiled library of ours.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import venv
from pathlib import Path
from statistics import median

from _bench import CannotMeasure, publish
from _cpu_turns import flushed_bytes
from _tables import describe_machine, markdown

PEERS = Path(__file__).parent / "peers"
PACKAGES = ("llama-cpp-python", "onnx", "onnxruntime", "numpy")
MOST_ERROR = 0.3  # 3 bits lie below; a product that is wrong does not
STREAM = "stream"
# Cores that others may take on average: a twentieth of the two that are timed here, less than what aims tell apart. Not less still, because
# the system counts in ticks, and does things of its own.
BUSY = 0.1
REST = 0.25  # seconds; threads of the library before go on looking for work for a while
FOUR_BITS = ("ggml Q4_0", "ggml Q4_0 repacked", "ggml Q4_1", "ggml Q4_K", "ggml Q4_K repacked") + tuple(
    f"onnxruntime 4 bits, blocks of {block}" for block in (32, 128)
)
# (tokens, threads, ours, theirs, at most so many times their time); None for any number of threads
TARGETS = (
    (1, 1, "ptq W4A8", FOUR_BITS, 0.75),
    (1, 2, "ptq W4A8", FOUR_BITS, 0.9),
    (1, 1, "ptq W4A8 symmetric", FOUR_BITS, 0.75),
    (1, 2, "ptq W4A8 symmetric", FOUR_BITS, 0.9),
    (1, None, "ptq W3A8", ("ggml Q3_K",), 0.75),
    (1, None, "ptq W8A8", ("torch qint8",), 1.0),
    (16, None, "ptq W4A8", FOUR_BITS, 0.75),
)


class Library:
    """A process that multiplies when it is its turn."""

    def __init__(self, python, script, args, threads):
        sizes = {"--channels": args.channels, "--rows": args.rows, "--threads": threads}
        words = [str(word) for pair in sizes.items() for word in pair]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.script, pipe = script, subprocess.PIPE
        command = [python, "-W", "ignore", str(PEERS / script), *words]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
        self.bytes = self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            said = self.process.stderr.read().strip().splitlines() or ["it said nothing"]
            raise CannotMeasure(f"{self.script} ended: {said[-1]}")
        return json.loads(line)

    def turn(self, name, tokens, calls):
        """What `_cpu_turns.timed` says of it, and its error."""
        self.process.stdin.write(json.dumps({"name": name, "tokens": tokens, "calls": calls}) + "\n")
        self.process.stdin.flush()
        found = self._answer()
        if found["error"] is not None and not found["error"] < MOST_ERROR:
            raise CannotMeasure(
                f"{name}, {tokens} tokens: relative error {found['error']:.2g} from the product in float64"
            )
        return found

    def end(self):
        self.process.kill()
        self.process.communicate()


def measure(args):
    python = None if args.peers is None else peer_python(args.peers)
    runs = [run for threads in args.threads for run in run_of(args, threads, python)]
    peers = [] if python is None else versions(python)
    sizes = {"channels": args.channels, "rows": args.rows, "rounds": args.rounds, "calls": args.calls}
    return sizes | {"flushed_bytes": flushed_bytes(), "peers": peers, "runs": runs}


def peer_python(folder):
    """The Python of the environment at `folder`, which is made if there is none."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        if subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES]).returncode:
            raise CannotMeasure(f"pip could not install {', '.join(PACKAGES)} in {folder}: see its message above")
    return str(python)


def versions(python):
    code = "import importlib.metadata as m, sys; print(*(f'{p} {m.version(p)}' for p in sys.argv[1:]), sep='\\n')"
    done = subprocess.run([python, "-c", code, *PACKAGES[:3]], capture_output=True, text=True)
    if done.returncode:
        raise CannotMeasure(
            f"{done.stderr.strip().splitlines()[-1]}: install {', '.join(PACKAGES)} there, or remove the folder"
        )
    return done.stdout.split("\n")[:-1]


def run_of(args, threads, python):
    """One entry for each number of tokens: {"threads", "tokens"} and what `turns` returns."""
    scripts = [(sys.executable, "lowbit_linear.py")]
    if python:
        scripts += [(python, "ggml_mul_mat.py"), (python, "matmul_nbits.py")]
    libraries = []
    try:
        for one, script in scripts:
            libraries.append(Library(one, script, args, threads))
        return [{"threads": threads, "tokens": tokens} | turns(libraries, tokens, args) for tokens in args.tokens]
    finally:
        for library in libraries:
            library.end()


def turns(libraries, tokens, args):
    """{"cores_of_others", "contenders": name -> {"bytes", "error", "seconds"}}."""
    said = []
    found = {name: {"bytes": size, "seconds": []} for library in libraries for name, size in library.bytes.items()}
    for _ in range(args.rounds):
        for library in libraries:
            time.sleep(REST)
            for name in library.bytes:
                one = library.turn(name, tokens, args.calls)
                found[name]["error"] = one["error"]
                found[name]["seconds"] += one["seconds"]
                said.append(one)
    return {"cores_of_others": cores_of_others(said), "contenders": found}


def cores_of_others(said):
    """How many cores other processes took in these turns on average, None if that is not known."""
    if any(one["others"] is None for one in said):
        return None
    cores = sum(one["others"] for one in said) / sum(one["turn"] for one in said)
    # Less than nothing: the system counts something else, which says nothing of others.
    return None if cores < -BUSY else max(cores, 0.0)


def verdicts(runs):
    """What was aimed at and what was found, a line each, for the numbers of tokens and threads that were run."""
    return [
        f"- {ours}, {count(tokens, 'token')}, {count(run['threads'], 'thread')}: {verdict(run, ours, theirs, most)}."
        for tokens, threads, ours, theirs, most in TARGETS
        for run in runs
        if run["tokens"] == tokens and threads in (None, run["threads"])
    ]


def verdict(run, ours, theirs, most):
    """The ratio to the best of theirs by medians, that of the least times, and whether the first is as aimed at."""
    seconds = {name: one["seconds"] for name, one in run["contenders"].items()}
    there = [name for name in theirs if name in seconds]
    if not there:
        return f"at most {most} was aimed at: not known: no {' or '.join(theirs)} took part"
    best = min(there, key=lambda name: median(seconds[name]))
    ratio, least = (of(seconds[ours]) / of(seconds[best]) for of in (median, min))
    said = f"{ratio:.2f} times {best} (least times {least:.2f}); at most {most} was aimed at"
    return f"{said}: {judged(run, ratio <= most, [name for name in theirs if name not in seconds])}"


def judged(run, reached, missing):
    """Nothing is known while others are busy, nor that an aim is reached while one that may be faster is missing."""
    others = run["cores_of_others"]
    if others is None:
        return "not known: the system does not tell what other processes took"
    if others > BUSY:
        return f"not known: other processes took {others:.2f} cores"
    if reached and missing:
        return f"not known: {', '.join(missing)} did not take part"
    return "reached" if reached else "not reached"


def count(n, what):
    return f"{n} {what}{'s' * (n != 1)}"


def table(run):
    contenders = run["contenders"]
    best = min((median(contenders[name]["seconds"]) for name in FOUR_BITS if name in contenders), default=None)
    stream = rate(contenders[STREAM])
    rows = [["", "MB", "median ms", "least ms", "x best 4-bit peer", "GB/s", "of stream", "error"]]
    for name, one in contenders.items():
        middle = median(one["seconds"])
        error = "-" if one["error"] is None else f"{one['error']:.4f}"
        ratio = "-" if best is None or name == STREAM else f"{middle / best:.2f}"
        read = rate(one)
        share = "" if name == STREAM else f"{read / stream:.0%}"
        times = f"{middle * 1e3:.2f}", f"{min(one['seconds']) * 1e3:.2f}"
        rows.append([name, f"{one['bytes'] / 1e6:.1f}", *times, ratio, f"{read / 1e9:.1f}", share, error])
    return markdown(rows, right=range(1, 8))


def busy(run):
    others = run["cores_of_others"]
    said = "an unknown share of the" if others is None else f"{others:.2f}"
    return f"Meanwhile other processes took {said} cores."


def rate(one):
    """Bytes of the weight a second."""
    return one["bytes"] / median(one["seconds"])


def page(found):
    parts = [f"# Linears on the CPU: {found['channels']} channels, {found['rows']} rows"]
    for run in found["runs"]:
        parts += [f"## {count(run['tokens'], 'token')}, {count(run['threads'], 'thread')}", table(run), busy(run)]
    parts += ["## Aims", "\n".join(verdicts(found["runs"]) or ["None is about these numbers of tokens and threads."])]
    peers = (
        f" Peers: {', '.join(found['peers'])}."
        if found["peers"]
        else " ggml and ONNX Runtime did not take part (--peers)."
    )
    parts.append(
        f"Each call quantizes its activations. {found['rounds']} rounds of {found['calls']} calls, every library in a process of its"
        f" own, one product at a time. Before every timed call {found['flushed_bytes'] >> 20} MiB of other memory are read to empty the"
        " caches; threads that sleep are woken within the call, as ONNX Runtime's always are"
        " (session.force_spinning_stop). An aim is held against medians, and not judged while other"
        f" processes and the hypervisor take more than {BUSY} cores. MB: the weight as the product reads it, scales and zero points"
        " included. GB/s: those bytes by the median; `stream` is a plain read of as many bytes as ptq W4A8 has: PyTorch's sum of 64-bit"
        " integers that lie in large pages where the system has them. Error: relative to the product with the unrounded weight."
        " ptq: 4 and 3 bits in groups of 128 with zero points (symmetric: without), activations at 8 bits, a grid for each token and 64"
        " channels; W8A8, like qint8, one scale a row, and a grid for each token." + peers
    )
    parts.append(f"Made by `{found['made_by']}` on {describe_machine(found['made_with'])}.")
    return "\n\n".join(parts) + "\n"


def numbers(text):
    return [int(part) for part in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=4096, help="in-channels, a multiple of 256 (4096)")
    parser.add_argument("--rows", type=int, default=16384, help="out-channels, a multiple of 256 (16384)")
    parser.add_argument("--tokens", type=numbers, default=[1, 16], help="of one product (1,16)")
    parser.add_argument("--threads", type=numbers, default=[1, 2], help="one run each (1,2)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each product (7)")
    parser.add_argument("--calls", type=int, default=3, help="timed calls of a turn (3)")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="environment with ggml and ONNX Runtime")
    parser.add_argument("--out", type=Path, default=Path("results/cpu"), help="stem of the .json and .md")
    args = parser.parse_args()
    if args.channels % 256 or args.rows % 256:
        parser.error(f"--channels {args.channels} --rows {args.rows}: both must be multiples of 256")
    return publish(lambda: measure(args), page, args.out, max(args.threads))


if __name__ == "__main__":
    sys.exit(main())
