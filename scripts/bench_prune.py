#!/usr/bin/env python3
"""Time and peak memory of pruning, beside the peers, in one run.

usage: python scripts/bench_prune.py MODEL --calib FILE --text FILE [--peers llm-compressor] [--ours sparsegpt ...]
           [--nsamples 16] [--seqlen 512] [--windows 24] [--no-eval] [--repeats 1] [--layer-repeats 3] [--threads N]
           [--peer-venv build/llm-compressor] [--only end-to-end|layers] [--out results/bench_prune]

End to end: MODEL, a full-precision folder, at 50% and 2:4, every contender in a process of its own on the same calibration
windows, the first of FILE. A peer is installed with pip into a virtual environment of its own, unless it is there.
Layers: one random layer with correlated inputs, the layer solver against SparseGPT's column loop (peers/column_loop.py).
Runs of one comparison alternate; numbers are medians. Writes OUT.json and OUT.md. Exit 2: not measured.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from _bench import CannotMeasure, publish
from _tables import describe_machine, markdown
from peers.column_loop import prune_by_columns

HERE = Path(__file__).resolve().parent
PATTERNS = {"50%": ("--sparsity", "0.5"), "2:4": ("--nm", "2:4")}
SOLVER_PATTERNS = {"50%": {"sparsity": 0.5}, "2:4": {"keep": (2, 4)}}
SYMMETRIC, ASYMMETRIC = ("--set", "weights.asymmetric=0"), ("--set", "weights.asymmetric=0.5")
OURS = {
    "magnitude": ("--method", "magnitude"),
    "wanda": ("--method", "wanda"),
    "sparsegpt": ("--method", "sparsegpt", "--refine", "none", *SYMMETRIC),
    "sparsegpt+pcg": ("--method", "sparsegpt", "--refine", "pcg:10", *SYMMETRIC),
    "sparsegpt+pcg, asymmetric": ("--method", "sparsegpt", "--refine", "pcg:10", *ASYMMETRIC),
    "admm+pcg": ("--method", "admm", "--refine", "pcg:15", *SYMMETRIC),
    "admm+pcg, asymmetric": ("--method", "admm", "--refine", "pcg:15", *ASYMMETRIC),
}
PEERS = {"llm-compressor": ("llmcompressor==0.14.*", HERE / "peers" / "llmcompressor_prune.py")}
SHAPES = ((4096, 4096), (768, 3072))
RSS_UNIT = 1 if sys.platform == "darwin" else 1024
# The kernel counts the memory of the process that starts a child as the child's own, so a small one stands between.
LAUNCHER = """
import json, os, sys
child = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(child, 0)
with open(sys.argv[1], "w") as file:
    json.dump({"status": os.waitstatus_to_exitcode(status), "maxrss": usage.ru_maxrss}, file)
"""


def run_child(words, args, scratch):
    """Run a command to its end; returns its wall-clock seconds and its peak resident bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    log, told = scratch / "log", scratch / "usage.json"
    launch = [sys.executable, "-S", "-c", LAUNCHER, told, *words]
    started = time.monotonic()
    with log.open("w", encoding="utf8") as sink:
        subprocess.run([str(word) for word in launch], env=environment, stdout=sink, stderr=sink, check=True)
    seconds = time.monotonic() - started
    usage = json.loads(told.read_text(encoding="utf8"))
    if usage["status"]:
        said = log.read_text(encoding="utf8", errors="replace").strip().splitlines() or ["it said nothing"]
        name = " ".join(Path(word).name for word in words[:4])
        raise CannotMeasure(f"{name} ... ended with status {usage['status']}: {said[-1]}")
    return {"seconds_process": seconds, "peak_resident_bytes": usage["maxrss"] * RSS_UNIT}


def peer_python(name, venv):
    """The python of a virtual environment that holds the peer, made if there is none."""
    python = venv / "bin" / "python"
    if not python.exists():
        requirement, _ = PEERS[name]
        pip = [python, "-m", "pip", "install", "--quiet", "--constraint", HERE / "constraints.txt", requirement]
        for words in ([sys.executable, "-m", "venv", venv], pip):
            if subprocess.run(words).returncode:
                shutil.rmtree(venv, ignore_errors=True)
                raise CannotMeasure(f"{requirement} could not be installed into {venv}: see pip's message above")
    return python


def write_windows(args, path):
    """Write the calibration windows [N, T] for the peers; returns their fingerprint."""
    from safetensors.torch import save_file

    from ptq.calibration import calibration_windows
    from ptq.checkpoint import load_tokenizer

    sizes = {"nsamples": args.nsamples, "seqlen": args.seqlen}
    windows = calibration_windows(load_tokenizer(args.model), str(args.calib), **sizes, mode="first", offline=True)
    save_file({"tokens": windows.tokens.contiguous()}, path)
    return windows.fingerprint


def prune_ours(name, pattern, args, scratch, fingerprint):
    """`ptq prune` in a process of its own; returns the checkpoint's folder and what was measured."""
    out = scratch / "out"
    words = [sys.executable, "-m", "ptq", "prune", args.model, "--out", out, *PATTERNS[pattern], *OURS[name]]
    words += ["--calib", args.calib, "--nsamples", args.nsamples, "--seqlen", args.seqlen]
    words += ["--set", "calibration.mode=first", "--device", "cpu", "--offline", "-q"]
    found = run_child(words, args, scratch)
    report = json.loads((out / "report.json").read_text(encoding="utf8"))
    if report["calibration"]["fingerprint"] != fingerprint:
        raise CannotMeasure(f"ptq prune calibrated on other windows than the first {args.nsamples} of {args.calib}")
    return out, found | {"seconds_compress": report["seconds"]}


def prune_peer(name, python, pattern, args, scratch):
    """The peer's driver in a process of its own; returns the checkpoint's folder and what was measured."""
    out, told = scratch / "out", scratch / "peer.json"
    words = [python, PEERS[name][1], args.model, out, "--windows", scratch / "windows.safetensors"]
    found = run_child([*words, *PATTERNS[pattern], "--json", told], args, scratch)
    report = json.loads(told.read_text(encoding="utf8"))
    return out, found | {"seconds_compress": report["seconds"], "versions": report["versions"]}


def count_zeros(folder):
    """How many weights hold zeros, and which share of their entries."""
    from safetensors import safe_open

    sparse, zeros, entries = 0, 0, 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                here = tensor.numel() - int(tensor.count_nonzero())
                if tensor.ndim == 2 and here > 0.25 * tensor.numel():  # embeddings may have a few of their own
                    sparse, zeros, entries = sparse + 1, zeros + here, entries + tensor.numel()
    return {"pruned_weights": sparse, "zeros": zeros / entries if entries else 0.0}


def perplexity(folder, args, scratch):
    """`ptq eval` in a process of its own."""
    told = scratch / "eval.json"
    words = [sys.executable, "-m", "ptq", "eval", folder, "--text", args.text, "--protocol", "plain", "--json", told]
    words += ["--seqlen", args.seqlen, "--windows", args.windows, "--device", "cpu", "--offline"]
    run_child(words, args, scratch)
    return json.loads(told.read_text(encoding="utf8"))


def measure_end_to_end(args, scratch):
    """All contenders at all patterns; returns plain JSON."""
    fingerprint = write_windows(args, scratch / "windows.safetensors")
    pythons = {name: peer_python(name, args.peer_venv) for name in args.peers}
    found = {"fingerprint": fingerprint, "nsamples": args.nsamples, "seqlen": args.seqlen, "rows": []}
    if not args.no_eval:
        say("full precision: perplexity ...")
        found["full"] = perplexity(args.model, args, scratch)
    runs = {(pattern, name): [] for pattern in PATTERNS for name in (*args.ours, *args.peers)}
    facts = {key: {} for key in runs}
    for repeat in range(args.repeats):
        for pattern, name in runs:
            say(f"{pattern}, {name}: run {repeat + 1} of {args.repeats} ...")
            if name in OURS:
                out, run = prune_ours(name, pattern, args, scratch, fingerprint)
            else:
                out, run = prune_peer(name, pythons[name], pattern, args, scratch)
            facts[pattern, name] |= {"versions": run.pop("versions")} if "versions" in run else {}
            runs[pattern, name].append(run)
            if repeat == 0:
                facts[pattern, name] |= count_zeros(out)
                facts[pattern, name] |= {} if args.no_eval else {"evaluation": perplexity(out, args, scratch)}
            shutil.rmtree(out)
    for (pattern, name), each in runs.items():
        medians = {key: median(run[key] for run in each) for key in each[0]}
        found["rows"].append({"pattern": pattern, "name": name, **medians, **facts[pattern, name], "runs": each})
    return found


def random_layer(R, C, seed=0):
    """W float32 [R, C] and the H [C, C] of inputs with 256 shared directions of falling energy over noise of their own."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    W = 0.02 * torch.randn(R, C, generator=generator)
    directions = torch.randn(C, min(256, C), generator=generator)
    energy = 1 / torch.arange(1, directions.shape[1] + 1)
    noise = torch.rand(C, generator=generator) + 0.05
    return W, (directions * energy) @ directions.T + torch.diag(noise)


def solve_ours(W, H, pattern):
    """The layer solver with its fastest kernel; returns the weight and the seconds of its two steps."""
    import lowbit

    import sparsegpt

    started = time.monotonic()
    factor = sparsegpt.factor(H)
    factored = time.monotonic()
    pattern, kernels = sparsegpt.Pattern(**SOLVER_PATTERNS[pattern]), {"sweep": lowbit.sweep, "lowest": lowbit.lowest}
    found = sparsegpt.solve(W, factor, pattern=pattern, **kernels)
    steps = {"seconds_factor": factored - started, "seconds_solve": time.monotonic() - factored}
    return found.weight, {"seconds": sum(steps.values()), **steps}


def solve_by_columns(W, H, pattern):
    """The column loop; returns the weight and its seconds."""
    started = time.monotonic()
    weight = prune_by_columns(W, H, **SOLVER_PATTERNS[pattern])
    return weight, {"seconds": time.monotonic() - started}


SOLVERS = {"ours": solve_ours, "column_loop": solve_by_columns}


def measure_layer(R, C, pattern, threads, repeats):
    """One layer, solvers in turn; returns plain JSON."""
    import torch

    torch.set_num_threads(threads)
    W, H = random_layer(R, C)
    times, weights = {name: [] for name in SOLVERS}, {}
    for _ in range(repeats):
        for name, solver in SOLVERS.items():
            weights[name], seconds = solver(W, H, pattern)
            times[name].append(seconds)
    loss = {name: float((((W - weight) @ H) * (W - weight)).sum()) for name, weight in weights.items()}
    return {
        "shape": [R, C],
        "pattern": pattern,
        "threads": threads,
        "repeats": repeats,
        **{name: {key: median(one[key] for one in each) for key in each[0]} for name, each in times.items()},
        "loss_of_ours_over_column_loop": loss["ours"] / loss["column_loop"],
        "mask_agreement": float(((weights["ours"] == 0) == (weights["column_loop"] == 0)).float().mean()),
    }


def measure_layers(args):
    """Every shape, pattern and thread count; returns plain JSON."""
    for pattern in SOLVER_PATTERNS:
        measure_layer(64, 256, pattern, args.threads, 1)  # builds or loads kernels, so that no timed run does
    found = []
    for threads in sorted({1, args.threads}):
        for R, C in SHAPES:
            for pattern in SOLVER_PATTERNS:
                say(f"layer {R} x {C}, {pattern}, {threads} threads ...")
                found.append(measure_layer(R, C, pattern, threads, args.layer_repeats))
    return found


def page(found):
    """The numbers as markdown, ratios first."""
    parts = ["# Pruning beside the peers"]
    if "end_to_end" in found:
        parts += end_to_end_page(found["end_to_end"], found)
    if "layers" in found:
        parts += layers_page(found["layers"], found["native_kernel"])
    machine = describe_machine(found["made_with"])
    parts.append(f"Made by `{found['made_by']}` on {machine}.")
    return "\n\n".join(parts) + "\n"


def end_to_end_page(part, found):
    """Two tables: peers over ours, then what they come from."""
    rows = part["rows"]
    pairs = [
        (ours, peer)
        for ours in rows
        for peer in rows
        if ours["name"] in OURS and peer["name"] in PEERS and ours["pattern"] == peer["pattern"]
    ]
    keys = ("seconds_process", "seconds_compress", "peak_resident_bytes")
    ratios = [["pattern", "peer / ours", "whole process", "compression call", "peak memory", "perplexity"]]
    for ours, peer in pairs:
        cells = [f"{peer[key] / ours[key]:.2f}" for key in keys]
        evaluated = "evaluation" in ours and "evaluation" in peer
        cells.append(f"{ppl(peer) / ppl(ours):.3f}" if evaluated else "-")
        ratios.append([ours["pattern"], f"{peer['name']} / {ours['name']}", *cells])
    numbers = [["pattern", "contender", "process s", "call s", "peak GB", "weights pruned", "zeros", "perplexity"]]
    if "full" in part:
        numbers.append(["none", "full precision", "-", "-", "-", "-", "-", with_spread(part["full"])])
    numbers += [cells_of(row) for row in rows]
    versions = {name: version for row in rows for name, version in row.get("versions", {}).items()}
    notes = [
        f"{found['model']}, float32 on the CPU, threads: {found['made_with']['threads']}, calibrated on the first"
        f" {part['nsamples']} x {part['seqlen']} tokens of {found['calib']}, median of {len(rows[0]['runs'])}."
        " Whole process: start to exit, reading and writing the checkpoint included. Compression call: of ours, the"
        " seconds in report.json, which include reading and writing; of a peer, its compression call alone, the"
        " checkpoint being loaded and the text tokenized before it. Peak memory is resident, as the kernel counts it,"
        " mapped pages of the checkpoint included.",
    ]
    if "full" in part:
        p = part["full"]["protocol"]
        notes.append(
            f"Perplexity on {p['windows']} x {p['seqlen']} tokens of {p['text']} (sha256 {p['sha256'][:12]}), protocol"
            f" {p['protocol']}; ± is the standard error over windows."
        )
    if versions:
        notes.append("Peers: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    head = [markdown(ratios, right=(2, 3, 4, 5))] if pairs else []
    return ["## End to end", *head, markdown(numbers, right=(2, 3, 4, 5, 6)), *notes]


def cells_of(row):
    """One contender as text."""
    times = [f"{row[key]:.1f}" for key in ("seconds_process", "seconds_compress")]
    times.append(f"{row['peak_resident_bytes'] / 1e9:.2f}")
    found = with_spread(row["evaluation"]) if "evaluation" in row else "-"
    return [row["pattern"], row["name"], *times, str(row["pruned_weights"]), f"{row['zeros']:.2%}", found]


def ppl(row):
    return row["evaluation"]["perplexity"]


def with_spread(evaluation):
    stderr = evaluation["perplexity_stderr"]
    return f"{evaluation['perplexity']:.2f}" + ("" if stderr is None else f" ± {stderr:.2f}")


def layers_page(layers, native_kernel):
    """One table."""
    cells = [
        ["R x C", "pattern", "threads", "loop / ours", "ours s", "factor s", "loop s", "loss ours / loop", "same mask"]
    ]
    for row in layers:
        ours, loop = row["ours"], row["column_loop"]
        times = [f"{loop['seconds'] / ours['seconds']:.2f}", f"{ours['seconds']:.2f}", f"{ours['seconds_factor']:.2f}"]
        shape = " x ".join(str(size) for size in row["shape"])
        quality = [f"{row['loss_of_ours_over_column_loop']:.4f}", f"{row['mask_agreement']:.2%}"]
        cells.append([shape, row["pattern"], str(row["threads"]), *times, f"{loop['seconds']:.2f}", *quality])
    kernel = "the compiled kernel" if native_kernel else "the plain torch loop, no compiled kernel being there"
    note = (
        f"A random layer, R rows and C inputs that are correlated, float32, median of {layers[0]['repeats']}, solvers in"
        " turn. Loop is SparseGPT as its formulas read, in torch: Cholesky, inverse, Cholesky, then a column at a time in"
        f" blocks of 128. Ours is one factorization, whose share is told, and one sweep, by {kernel}. Both start from H."
        " Beside the factorization ours makes R C^2 / 2 multiply-adds in matrix products, which at the speed of the BLAS"
        " leave little more to gain for any exact solver."
    )
    return ["## One layer", markdown(cells, right=(2, 3, 4, 5, 6, 7, 8)), note]


def say(text):
    print(text, file=sys.stderr, flush=True)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL", help="full-precision folder")
    parser.add_argument("--calib", type=Path, help="calibration text, a file")
    parser.add_argument("--text", type=Path, help="evaluation text, a file")
    parser.add_argument("--ours", nargs="+", choices=OURS, default=["sparsegpt"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[])
    parser.add_argument("--peer-venv", type=Path, default=Path("build/llm-compressor"), help="made if it is not there")
    parser.add_argument("--nsamples", type=int, default=16, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens a window, in calibration and evaluation")
    parser.add_argument("--windows", type=int, default=24, help="evaluation windows")
    parser.add_argument("--no-eval", action="store_true", help="times and memory only")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each contender, end to end")
    parser.add_argument("--layer-repeats", type=int, default=3, help="runs of each solver on each layer")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="layers are measured with 1 as well")
    parser.add_argument("--only", choices=("end-to-end", "layers"), help="one part alone")
    parser.add_argument("--out", type=Path, default=Path("results/bench_prune"), help="stem of the .json and .md")
    args = parser.parse_args()
    if min(args.repeats, args.layer_repeats, args.threads) < 1:
        parser.error("--repeats, --layer-repeats and --threads must be at least 1")
    return args


def check_inputs(args):
    """Raises CannotMeasure for a missing model or text."""
    if args.model is None or not (args.model / "config.json").is_file():
        raise CannotMeasure(f"MODEL {args.model}: not a model folder; make one with scripts/fetch_smollm2.py")
    needed = {"calib": args.calib} | ({} if args.no_eval else {"text": args.text})
    for option, path in needed.items():
        if path is None or not path.is_file():
            raise CannotMeasure(f"--{option} {path}: no such file; give a text file")


def measure(args):
    """The parts asked for, as plain JSON."""
    from lowbit.cpu import native

    from ptq.errors import PtqError

    found = {}
    if args.only != "layers":
        check_inputs(args)
        found |= {"model": args.model.name, "calib": args.calib.name}
        try:
            with tempfile.TemporaryDirectory(prefix="bench-prune-") as scratch:
                found["end_to_end"] = measure_end_to_end(args, Path(scratch))
        except PtqError as err:
            raise CannotMeasure(str(err)) from err
    if args.only != "end-to-end":
        found |= {"layers": measure_layers(args), "native_kernel": native.library() is not None}
    return found


def main():
    args = parse()
    os.environ["HF_HUB_OFFLINE"] = "1"
    return publish(lambda: measure(args), page, args.out, args.threads)


if __name__ == "__main__":
    sys.exit(main())
