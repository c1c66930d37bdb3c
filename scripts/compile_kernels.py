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
from collections import Counter
from pathlib import Path

from _tables import command, describe_machine, made_with, markdown, write, write_json

# (backend, architecture, threads of a warp), as Triton names them.
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# A family of `lowbit.triton.planar_linear.SHAPES` for each.
FAMILIES = {"sm_80": "sm_80", "sm_90": "sm_90", "sm_100": "sm_90", "gfx942": "hip"}

# One line of the table for each: the module and function, and what specializes it. A parameter with a type is passed when the
# kernel runs, one with a value is compiled in, all others are absent (None). Pointers and `aligned` are divisible by 16.
FLOATS, BYTES, CODES, SIZE = "*fp32", "*u8", "*i8", "i32"
SWEEP = {
    "module": "lowbit.triton.sweep",
    "function": "sweep_kernel",
    "types": dict.fromkeys(("W1", "steps", "values"), FLOATS) | dict.fromkeys(("b", "R", "steps_stride", "n"), SIZE),
    "values": {"GROUP": 0, "LANES": 2, "STEPS": 128, "ROWS": 16},
    "aligned": ("b", "R", "steps_stride"),
}
MASK = {"mask": BYTES}
QUANTIZE = dict.fromkeys(("scale", "low", "high"), FLOATS)
LAYER = {"N": 4096, "units": 32}  # 4096 rows of 4096 channels

# What bounds a kernel in the model below. (multiprocessors, clock Hz, bytes/s, int8 multiply-adds/s): the makers' data sheets.
GPUS = {
    "sm_80": ("A100 80 GB", 108, 1.41e9, 2.039e12, 312e12),
    "sm_90": ("H100 SXM", 132, 1.83e9, 3.35e12, 989.5e12),
}
ISSUED = 0.6  # instructions a cycle and scheduler: a guess


def sweep(types, keep_of=0):
    """The sweep's line with these optional tensors, choosing among groups of keep_of."""
    if not keep_of:
        return SWEEP | {"types": SWEEP["types"] | types}
    chosen = {"types": SWEEP["types"] | {"score": FLOATS, "kept": BYTES} | types}
    return SWEEP | chosen | {"values": SWEEP["values"] | {"GROUP": keep_of, "LANES": keep_of}}


def linear(bits, tokens, tile=64, *, dynamic, corrected=False):
    """The linear's line: `tokens` at most, grids of `tile` channels; corrected by zero points of the weight and shifts."""
    types = {"a": CODES, "plane": CODES if bits == 8 else BYTES} | dict.fromkeys(("M", "grid_stride", "per"), SIZE)
    types |= dict.fromkeys(("count", "scale", "bias", "y"), FLOATS)
    types |= {"signs": BYTES} if bits == 3 else {}
    types |= {"step": FLOATS} if dynamic else {}
    types |= dict.fromkeys(("shift", "total", "zero"), FLOATS) if corrected else {}
    return {
        "module": "lowbit.triton.planar_linear",
        "function": "linear_kernel",
        "types": types,
        "launch": {"T": tokens, "bits": bits, "tile": tile, "stepped": dynamic, "brief": dynamic},
        "values": LAYER | {"NARROW": False, "PER": 8 if tokens <= 16 else 0},
        "aligned": ("grid_stride",),
    }


def quantize(norm=0, types=(), **values):
    """The quantizer's line for 4096 channels of bfloat16."""
    half = {"x": "*bf16"} | {name: "*bf16" for name in types if name in ("residual", "summed", "weight", "bias")}
    other = {name: {"permutation": "*i32"}.get(name, FLOATS) for name in types if name not in half}
    always = {
        "bits": BYTES,
        "a": CODES,
        "count": FLOATS,
        "C": SIZE,
        "x_stride": SIZE,
        "eps": "fp32",
        "grid_stride": SIZE,
    }
    return {
        "module": "lowbit.triton.quantize",
        "function": "quantize_kernel",
        "types": always | half | other,
        "values": {"NORM": norm, "ROTATE": False, "TILES": 64 if norm else 16, "G": 64} | values,
        "options": {"num_warps": 8 if norm else 2},
        "aligned": ("C", "x_stride", "grid_stride"),
    }


def codes(function, types=(), **values):
    """The line of a quantizer of its own, for 4096 channels of bfloat16."""
    always = {"x": "*bf16", "a": CODES} | dict.fromkeys(("step", "count"), FLOATS)
    sizes = dict.fromkeys(("T", "C", "x_stride", "tiles", "grid_stride"), SIZE)
    return {
        "module": "lowbit.triton.quantize",
        "function": function,
        "types": always | sizes | dict(types),
        "values": {"TILES": 16} | values,
        "options": {"num_warps": 2},
        "aligned": ("C", "x_stride", "grid_stride"),
    }


def kv_append(bits, rotary_dim):
    """The line of one new token's keys and values, heads of 128 channels in bfloat16."""
    types = dict.fromkeys(("keys", "values"), "*bf16") | dict.fromkeys(("key_plane", "value_plane"), BYTES)
    types |= dict.fromkeys(("key_rest", "value_rest"), BYTES) if bits == 3 else {}
    types |= dict.fromkeys(("key_scale", "key_zero", "value_scale", "value_zero"), FLOATS)
    types |= dict.fromkeys(("cos", "sin"), "*bf16") if rotary_dim else {}
    strides = [f"{of}_{by}" for of in ("key", "value") for by in ("batch", "head", "token")]
    strides += ["angle_batch", "angle_token"]
    types |= dict.fromkeys(("T", "held", "capacity", "H", *strides), SIZE)
    values = {"D": 128, "R": rotary_dim, "BITS": bits, "INTERLEAVED": False, "HALF": 64, "TOKENS": 1}
    return {
        "module": "lowbit.triton.kv",
        "function": "append_kernel",
        "types": types,
        "values": values,
        "options": {"num_warps": 1, "enable_fp_fusion": False},
        "aligned": ("capacity", *strides),
    }


def attention(bits, rotary_dim, phase=0, group=4):
    """The line of one query a sequence over packed keys and values, heads of 128 channels, `group` of them to a KV head."""
    types = {"q": "*bf16"} | dict.fromkeys(("key_plane", "value_plane"), BYTES)
    types |= dict.fromkeys(("key_rest", "value_rest"), BYTES) if bits == 3 else {}
    types |= dict.fromkeys(("cos", "sin"), "*bf16") if rotary_dim else {}
    types |= dict.fromkeys(("key_scale", "key_zero", "products", "most", "sums"), FLOATS) | {"scaling": "fp32"}
    types |= dict.fromkeys(("known_most", "known_sum"), FLOATS) if phase == 2 else {}
    types |= dict.fromkeys(("T", "per", "capacity", "angle_batch", "angle_token", "mask_batch"), SIZE)
    return {
        "module": "lowbit.triton.kv",
        "function": "decode_kernel",
        "types": types,
        "launch": {"channels": 128, "group": group, "bits": bits, "rotary_dim": rotary_dim},
        "values": {"H": 8, "PHASE": phase, "LEVELS": 255 if phase == 2 else 0},
        "aligned": ("capacity", "angle_batch", "angle_token"),
    }


def sparse24(tokens, coded):
    """The line of a 2:4 weight in bfloat16, or in codes of 8 bits."""
    types = {"x": "*i64", "values": "*i16" if coded else "*i32", "places": BYTES} | dict.fromkeys(("bias", "y"), FLOATS)
    types |= dict.fromkeys(("scale", "zero"), FLOATS) if coded else {}
    return {
        "module": "lowbit.triton.sparse24",
        "function": "sparse24_kernel",
        "types": types | dict.fromkeys(("M", "per", "N", "units"), SIZE),
        "launch": {"T": tokens},
        "values": {"dtype": "bf16", "CODES": coded},
        "aligned": ("N", "units"),
    }


def group4(tokens):
    """The line of FlexGen's codec with bfloat16 activations."""
    types = {"x": "*bf16", "packed": BYTES} | dict.fromkeys(("scale", "minimum"), "*fp16")
    types |= dict.fromkeys(("bias", "y"), FLOATS)
    return {
        "module": "lowbit.triton.group4",
        "function": "group4_kernel",
        "types": types | dict.fromkeys(("M", "C", "N", "per", "x_stride", "octets", "groups"), SIZE),
        "launch": {"T": tokens},
        "values": {},
        "aligned": ("C", "N", "per", "x_stride", "octets", "groups"),
    }


STEPPED, JOINED = ("step", "shift"), ("residual", "summed", "weight", "permutation")
KERNELS = {
    "sweep: prune by a mask": sweep(MASK),
    "sweep: choose 2 of 4": sweep({}, 4),
    "sweep: choose 16 of 32": sweep({}, 32),
    "sweep: quantize": sweep(QUANTIZE),
    "sweep: quantize, prune by a mask": sweep(QUANTIZE | MASK),
    "sweep: quantize, choose 2 of 4, mask": sweep(QUANTIZE | MASK, 4),
    "linear W4: 8 tokens, static": linear(4, 8, dynamic=False),
    "linear W4: 8 tokens, dynamic": linear(4, 8, dynamic=True),
    "linear W4: 16 tokens, static": linear(4, 16, dynamic=False),
    "linear W4: 16 tokens, dynamic": linear(4, 16, dynamic=True),
    "linear W4: 16 tokens, dynamic, zero points, shifts": linear(4, 16, dynamic=True, corrected=True),
    "linear W4: 16 tokens, static, tiles of 128": linear(4, 16, 128, dynamic=False),
    "linear W4: 16 tokens, dynamic, tiles of 128": linear(4, 16, 128, dynamic=True),
    "linear W4: 16 tokens, dynamic, one grid": linear(4, 16, 0, dynamic=True),
    "linear W4: 32 tokens, dynamic, zero points, shifts": linear(4, 32, dynamic=True, corrected=True),
    "linear W4: 64 tokens, dynamic, zero points, shifts": linear(4, 64, dynamic=True, corrected=True),
    "linear W4: 2048 tokens, static": linear(4, 2048, dynamic=False),
    "linear W4: 2048 tokens, dynamic, zero points, shifts": linear(4, 2048, dynamic=True, corrected=True),
    "linear W4: 2048 tokens, static, tiles of 128": linear(4, 2048, 128, dynamic=False),
    "linear W4: 2048 tokens, dynamic, one grid": linear(4, 2048, 0, dynamic=True),
}
for bits in (8, 3, 2):
    KERNELS |= {
        f"linear W{bits}: 8 tokens, dynamic": linear(bits, 8, dynamic=True),
        f"linear W{bits}: 16 tokens, static": linear(bits, 16, dynamic=False),
        f"linear W{bits}: 64 tokens, dynamic, zero points, shifts": linear(bits, 64, dynamic=True, corrected=True),
        f"linear W{bits}: 2048 tokens, dynamic, zero points, shifts": linear(bits, 2048, dynamic=True, corrected=True),
        f"linear W{bits}: 2048 tokens, dynamic, one grid": linear(bits, 2048, 0, dynamic=True),
    }
KERNELS |= {
    "linear: sum of the parts": {
        "module": "lowbit.triton.planar_linear",
        "function": "sum_kernel",
        "types": dict.fromkeys(("parts", "bias", "y"), FLOATS) | dict.fromkeys(("size", "N"), SIZE),
        "values": {"SPLIT": 8, "BLOCK": 1024},
        "options": {"num_warps": 4},
        "aligned": ("size", "N"),
    },
    "quantize: tiles": quantize(types=STEPPED),
    "quantize: clusters": codes("clusters_kernel", {"ends": "*i64", "bits": BYTES, "shift": FLOATS}, BRIEF=True),
    "quantize: two codes a number": codes("exact_kernel", G=64, TERMS=2),
    "quantize: residual, RMSNorm, gather, tiles": quantize(2, STEPPED + JOINED),
    "quantize: residual, RMSNorm, gather, rotate, tiles": quantize(2, STEPPED + JOINED, ROTATE=True),
    "quantize: residual, LayerNorm, gather, static": quantize(1, ("scale", "zero", "bias", *JOINED)),
}
for bits in (8, 4, 3, 2):
    KERNELS |= {
        f"kv_append KV{bits}: turned back": kv_append(bits, 128),
        f"attention_decode KV{bits}": attention(bits, 0),
        f"attention_decode KV{bits}: rotary": attention(bits, 128),
    }
KERNELS |= {
    "attention_decode KV4: rotary, sums": attention(4, 128, 1),
    "attention_decode KV4: rotary, probabilities of 8 bits": attention(4, 128, 2),
    "attention_decode: join": {
        "module": "lowbit.triton.kv",
        "function": "join_kernel",
        "types": dict.fromkeys(("products", "most", "sums", "value_scale", "value_zero"), FLOATS) | {"y": "*bf16"},
        "values": {"GROUP": 4, "H": 8, "D": 128, "PARTS": 64, "LEVELS": 0, "WIDE": 128},
        "options": {"num_warps": 4},
        "aligned": (),
    },
    "sparse_linear 2:4: 16 tokens": sparse24(16, False),
    "sparse_linear 2:4: 64 tokens": sparse24(64, False),
    "sparse_linear 2:4 of 8 bits: 16 tokens": sparse24(16, True),
    "FlexGen's codec: 16 tokens": group4(16),
    "FlexGen's codec: 64 tokens": group4(64),
}


def compile_kernel(kernel, label):
    """(the compiled kernel, the values compiled in); nothing is loaded on any device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(kernel["module"])
    function = getattr(module, kernel["function"])
    launch = module.launch_options(FAMILIES[label], **kernel["launch"]) if "launch" in kernel else {}
    options = getattr(module, "OPTIONS", {}) | kernel.get("options", {})
    options |= {name: launch[name] for name in ("num_warps", "num_stages") if name in launch}
    values = kernel["values"] | launch
    names = function.arg_names
    signature = {name: kernel["types"].get(name, "constexpr") for name in names}
    constants = {name: values.get(name) for name in names if signature[name] == "constexpr"}
    if "dtype" in constants:
        constants["dtype"] = triton.language.str_to_ty(constants["dtype"], None)
    sixteen = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in kernel["aligned"]]
    attributes = {(i,): [["tt.divisibility", 16]] for i in sixteen}
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[label]), options=options), values


def nvidia_report(compiled):
    """(registers, bytes of stack, instructions, (first, last) of each loop) from the cubin, by the tools that come with Triton."""
    import triton

    tools = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = [
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        ]
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said[0])}
    instructions, labels, loops = [], {}, []
    for label, instruction in re.findall(r"^\s*(?:(\.L_\w+):|/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;)", said[1], re.M):
        if label:
            labels[label] = len(instructions)
        else:
            instructions.append(instruction)
    for i, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction)
        if target and labels.get(target[1], i + 1) <= i:
            loops.append((labels[target[1]], i))
    return found["REG"], found["STACK"] + found["LOCAL"], instructions, loops


def operation(instruction):
    """Its name without predicate: "LDG.E.128"."""
    return re.sub(r"^@!?U?P[T\d]+\s+", "", instruction).split()[0]


def main_loop(instructions, loops):
    """Operations of the loop with the most integer products, [] where none has any."""
    bodies = [[operation(i) for i in instructions[first : last + 1]] for first, last in loops]
    return max(bodies, key=products, default=[]) if any(map(products, bodies)) else []


def products(operations):
    return sum(name.startswith(("IMMA", "IGMMA", "QGMMA", "UTCIMMA")) for name in operations)


def amd_report(compiled):
    """(registers, bytes of stack, products named in the whole program) from the assembly."""
    text = compiled.asm["amdgcn"]
    found = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\n", text)}
    kinds = Counter(re.findall(r"\bv_mfma_i32_\w+", text))
    return found["vgpr_count"] + found.get("agpr_count", 0), found["private_segment_fixed_size"], kinds


def loop_facts(body, values, warps):
    """What the main loop of a linear costs for one unit of 128 channels."""
    BM, BN = values["BM"], values["BN"]
    wide = any(name.startswith("IGMMA") for name in body)
    a_unit = 4 * (BN // 64) // (warps // 4) if wide else 4 * (BN // 16) * (BM // 8) // warps  # products of one warp
    units = products(body) / a_unit
    return {
        "mma_in_loop": products(body),
        "units_in_loop": units,
        "instructions_per_unit": round(len(body) / units, 1),
        "instructions_per_mma": round(len(body) / products(body), 2),
        "weight_bytes_per_instruction": round(16 * BN * values["BITS"] * units / (len(body) * warps), 1),
        "loads": dict(Counter(name for name in body if name.startswith(("LDG", "LDGSTS", "LDS", "STS", "LDL", "STL")))),
    }


def model(facts, values, tokens, warps, gpu):
    """Microseconds of an 8192 x 8192 layer bound by memory, by products and by instructions; not a measurement."""
    _, processors, clock, bandwidth, peak = gpu
    K = R = 8192
    blocks = -(-R // values["BN"]) * -(-tokens // values["BM"])
    grids = 0 if values["TILE"] == 0 else 4 * R * K // values["TILE"]
    moved = R * K * values["BITS"] / 8 + grids + tokens * (K + 4 * R)
    issued = blocks * warps * (K // 128) * facts["instructions_per_unit"]
    return {
        "memory": round(moved / bandwidth * 1e6, 1),
        "products": round(blocks * values["BM"] * values["BN"] * K / peak * 1e6, 1),
        "instructions": round(issued / (4 * processors * clock * ISSUED) * 1e6, 1),
    }


def report(kernel, label):
    """All that is known of one kernel on one family."""
    compiled, values = compile_kernel(kernel, label)
    warps = compiled.metadata.num_warps
    found = {"warps": warps, "shared_bytes": compiled.metadata.shared}
    if TARGETS[label][0] == "hip":
        found["registers"], found["stack_bytes"], kinds = amd_report(compiled)
        return found | ({"mma": sorted(kinds)} if kernel["function"] == "linear_kernel" else {})
    found["registers"], found["stack_bytes"], instructions, loops = nvidia_report(compiled)
    if kernel["function"] == "linear_kernel":
        found["tile"] = [values["BM"], values["BN"]]
        found["mma"] = sorted({name for name in map(operation, instructions) if products([name])})
        if label in GPUS:
            found |= loop_facts(main_loop(instructions, loops), values, warps)
            found["model_us"] = model(found, values, kernel["launch"]["T"], warps, GPUS[label])
    return found


def measure():
    """{kernel: {target: report}}."""
    found = {}
    for name, kernel in KERNELS.items():
        found[name] = {}
        for label in TARGETS:
            found[name][label] = report(kernel, label)
            print(f"{name} for {label}: {found[name][label]}", file=sys.stderr)
    return found


def loops_table(kernels):
    rows = [
        [
            "linear kernel",
            "family",
            "tile",
            "warps",
            "mma",
            "per unit",
            "per mma",
            "bytes",
            "memory / products / instructions",
        ]
    ]
    for name, by_target in kernels.items():
        for label in GPUS:
            r = by_target[label]
            if "model_us" in r:
                kind = ", ".join(r["mma"])
                numbers = r["instructions_per_unit"], r["instructions_per_mma"], r["weight_bytes_per_instruction"]
                shape = " x ".join(map(str, r["tile"]))
                bound = " / ".join(map(str, r["model_us"].values()))
                rows.append(
                    [name.removeprefix("linear "), label, shape, str(r["warps"]), kind, *map(str, numbers), bound]
                )
    return markdown(rows, right=(3, 5, 6, 7, 8))


def page(result):
    """The numbers as markdown."""
    rows = [["kernel", *TARGETS]]
    for name, by_target in result["kernels"].items():
        cells = [f"{r['registers']} / {r['stack_bytes']} / {r['shared_bytes']}" for r in by_target.values()]
        rows.append([name, *cells])
    gpus = ", ".join(f"{label} as {gpu[0]}" for label, gpu in GPUS.items())
    return "\n".join(
        [
            "# What the Triton kernels need of a GPU",
            "",
            "Compiled ahead of time, not run: no GPU took part, and nothing here is a speed. Each cell: registers a thread /"
            " bytes of stack a thread / bytes of shared memory a program. Any stack at all means that registers were spilled.",
            "",
            markdown(rows, right=range(1, len(rows[0]))),
            "",
            "## Main loops of the linears",
            "",
            "Tile: tokens x rows of one program. Per unit: instructions of one warp for 128 channels of its tile; per mma: for each"
            " tensor-core instruction, all counted; bytes: of weights for each instruction that a warp issues."
            f" The last column is a **model**, not a measurement: microseconds of an 8192 x 8192 layer if only memory, products or"
            f" instructions ({ISSUED} a cycle and scheduler, a guess) took time, with {gpus}. gfx942 is compiled without inline"
            " assembly, and its loops are not counted; nor are those of sm_100, whose larger tiles go through tensor memory.",
            "",
            loops_table(result["kernels"]),
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
