#!/usr/bin/env python3
"""Compile every Triton kernel for every GPU family named here, without a GPU, and record what the compilers say of it.

python scripts/compile_kernels.py [--out results/kernels]
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from _tables import command, describe_machine, made_with, markdown, write, write_json

# (backend, architecture, threads of a warp), as Triton names them.
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

# One line of the table for each: the module and function, and what specializes it. A parameter with a type is passed when the
# kernel runs, one with a value is compiled in, all others are absent (None). Pointers and `aligned` are divisible by 16.
FLOATS, BYTES, SIZE = "*fp32", "*u8", "i32"
SWEEP = {
    "module": "lowbit.triton.sweep",
    "function": "sweep_kernel",
    "types": dict.fromkeys(("W1", "steps", "values"), FLOATS) | dict.fromkeys(("b", "R", "steps_stride", "n"), SIZE),
    "values": {"GROUP": 0, "LANES": 2, "STEPS": 128, "ROWS": 16},
    "aligned": ("b", "R", "steps_stride"),
}
MASK = {"mask": BYTES}
QUANTIZE = dict.fromkeys(("scale", "low", "high"), FLOATS)


def sweep(types, keep_of=0):
    """The sweep's line with these optional tensors, choosing among groups of keep_of."""
    if not keep_of:
        return SWEEP | {"types": SWEEP["types"] | types}
    chosen = {"types": SWEEP["types"] | {"score": FLOATS, "kept": BYTES} | types}
    return SWEEP | chosen | {"values": SWEEP["values"] | {"GROUP": keep_of, "LANES": keep_of}}


KERNELS = {
    "sweep: prune by a mask": sweep(MASK),
    "sweep: choose 2 of 4": sweep({}, 4),
    "sweep: choose 16 of 32": sweep({}, 32),
    "sweep: quantize": sweep(QUANTIZE),
    "sweep: quantize, prune by a mask": sweep(QUANTIZE | MASK),
    "sweep: quantize, choose 2 of 4, mask": sweep(QUANTIZE | MASK, 4),
}


def compile_kernel(kernel, target):
    """The compiled kernel; nothing is loaded on any device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(kernel["module"])
    function = getattr(module, kernel["function"])
    names = function.arg_names
    signature = {name: kernel["types"].get(name, "constexpr") for name in names}
    constants = {name: kernel["values"].get(name) for name in names if signature[name] == "constexpr"}
    sixteen = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in kernel["aligned"]]
    attributes = {(i,): [["tt.divisibility", 16]] for i in sixteen}
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*target), options=module.OPTIONS)


def nvidia_resources(compiled):
    """From the cubin, by the tool that comes with Triton."""
    import triton

    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def amd_resources(compiled):
    """From the metadata in the assembly."""
    found = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\n", compiled.asm["amdgcn"])}
    return found["vgpr_count"] + found.get("agpr_count", 0), found["private_segment_fixed_size"]


def measure():
    """{kernel: {target: resources}}."""
    found = {}
    for name, kernel in KERNELS.items():
        found[name] = {}
        for label, target in TARGETS.items():
            compiled = compile_kernel(kernel, target)
            registers, stack = (amd_resources if target[0] == "hip" else nvidia_resources)(compiled)
            found[name][label] = {
                "registers": registers,
                "stack_bytes": stack,
                "shared_bytes": compiled.metadata.shared,
                "warps": compiled.metadata.num_warps,
            }
            print(f"{name} for {label}: {found[name][label]}", file=sys.stderr)
    return found


def page(result):
    """The numbers as markdown."""
    rows = [["kernel", *TARGETS]]
    for name, by_target in result["kernels"].items():
        cells = [f"{r['registers']} / {r['stack_bytes']} / {r['shared_bytes']}" for r in by_target.values()]
        rows.append([name, *cells])
    return "\n".join(
        [
            "# What the Triton kernels need of a GPU",
            "",
            "Compiled ahead of time, not run: no GPU took part, and nothing here is a speed. Each cell: registers a thread /"
            " bytes of stack a thread / bytes of shared memory a program. Any stack at all means that registers were spilled.",
            "",
            markdown(rows, right=range(1, len(rows[0]))),
            "",
            f"Made by `{result['made_by']}` with triton {result['made_with']['triton']} on"
            f" {describe_machine(result['made_with'])}.",
            "",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/kernels"), help="stem of the .json and .md")
    args = parser.parse_args()
    try:
        import triton
    except ImportError:
        print("compile_kernels: triton is not installed: pip install 'ptq-toolkit[triton]'", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        kernels = measure()
    result = {
        "what": "ahead-of-time compilation, not a run",
        "kernels": kernels,
        "made_by": command(sys.argv[1:]),
        "made_with": made_with(1) | {"triton": triton.__version__},
    }
    write_json(args.out.with_suffix(".json"), result)
    write(args.out.with_suffix(".md"), page(result))
    print(page(result), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
