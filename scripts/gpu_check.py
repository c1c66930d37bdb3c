#!/usr/bin/env python3
"""Check every Triton kernel of lowbit against float64 on this machine's GPU, and time it beside what else computes the same.

Tiny packed models whose linears, norms and decoding steps run on the kernels are checked too, against the reference operations on the CPU.

usage: python scripts/gpu_check.py --out results [--only "linear W4"]
       python scripts/gpu_check.py --out /tmp/check --interpret

Writes gpu.json and gpu.md into --out. Times are medians of the GPU's own, with cold caches, of calls captured in a graph, so that what
Python spends on a launch is left out. --interpret: no GPU; Triton's interpreter computes tiny problems on the CPU, nothing is timed.
Exit codes: 0 all within tolerance, 1 something is not or failed, 2 there is no GPU or no triton.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from _tables import command, describe_machine, made_with, markdown, write, write_json


def milliseconds(run):
    """Median on the GPU with a cold L2; a graph is replayed, so that no time goes into launching."""
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a graph is captured on a stream of its own, once everything is compiled
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return do_bench(graph.replay, return_mode="median")


def timed(run):
    """Milliseconds, or in words why there are none: a peer that fails must not end the run."""
    try:
        return round(milliseconds(run), 5)
    except Exception as error:
        return told(error)


def told(error):
    """An error in one short line."""
    return f"{type(error).__name__}: {str(error)[:200]}".splitlines()[0]


def measure(cases, device, *, times):
    """A row for each case."""
    rows = []
    for case in cases:
        row = {"kernel": case.kernel, "shape": case.shape}
        try:
            job = case.make(device)
            row["error"] = float(f"{job.check(job.run()):.3g}")
        except Exception as error:  # the others are still worth knowing
            row["failed"] = told(error)
        else:
            if times and job.moved:
                row["ms"] = {"ours": timed(job.run)} | {name: timed(run) for name, run in job.others.items()}
                if isinstance(row["ms"]["ours"], float):
                    row["GB/s"] = round(job.moved / row["ms"]["ours"] * 1e-6, 1)
        rows.append(row)
        print(row, file=sys.stderr)
    return rows


def page(result):
    """The rows as markdown."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row.get("ms", {})))
    table = [["kernel", "shape", "error", *names, *(["GB/s"] if names else [])]]
    for row in result["rows"]:
        times = [row.get("ms", {}).get(name, "") for name in names]
        cells = [f"{t:.4f}" if isinstance(t, float) else "failed" if t else "" for t in times]
        table.append(
            [
                row["kernel"],
                row["shape"],
                str(row.get("error", "failed")),
                *cells,
                *([str(row.get("GB/s", ""))] if names else []),
            ]
        )
    said = (
        "Milliseconds, medians with cold caches, launches not counted; GB/s: bytes of the inputs and outputs over our time."
        " gemlite and conch multiply the same codes with float16 activations; a column is missing where a package is."
        if names
        else "Triton's interpreter computed these on a CPU: checks of the arithmetic, no GPU took part and nothing was timed."
    )
    return "\n".join(
        [
            f"# The Triton kernels on {result['device']}",
            "",
            "Error: the largest, as a share of what float64 allows, or for a model's logits of what a code that falls to its other"
            f" side may cost; above 1 is a failure. {said}",
            "",
            markdown(table, right=range(2, len(table[0]))),
            "",
            f"Made by `{result['made_by']}` with triton {result['made_with']['triton']} on"
            f" {describe_machine(result['made_with'])}.",
            "",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json and gpu.md")
    parser.add_argument("--only", default="", help="the cases whose kernel's name begins so")
    parser.add_argument("--interpret", action="store_true", help="check tiny problems without a GPU, time nothing")
    args = parser.parse_args()
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    elif not torch.cuda.is_available():
        print("gpu_check: PyTorch sees no GPU here; --interpret checks the arithmetic without one", file=sys.stderr)
        return 2
    try:
        import triton
    except ImportError:
        print("gpu_check: triton is not installed: pip install 'ptq-toolkit[triton]'", file=sys.stderr)
        return 2
    from _gpu_cases import every_case, tiny_cases

    device = torch.device("cpu" if args.interpret else "cuda")
    cases = [case for case in (tiny_cases() if args.interpret else every_case()) if case.kernel.startswith(args.only)]
    result = {
        "device": "Triton's interpreter" if args.interpret else torch.cuda.get_device_name(),
        "rows": measure(cases, device, times=not args.interpret),
        "made_by": command(sys.argv[1:]),
        "made_with": made_with(torch.get_num_threads()) | {"triton": triton.__version__},
    }
    write_json(args.out / "gpu.json", result)
    write(args.out / "gpu.md", page(result))
    print(page(result), end="")
    wrong = [f"{row['kernel']} {row['shape']}" for row in result["rows"] if not row.get("error", 2) <= 1]
    if wrong:
        print(f"gpu_check: outside the tolerance, or failed: {'; '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
