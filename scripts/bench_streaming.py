#!/usr/bin/env python3
"""Peak memory of quantizing a checkpoint of LLaMA-7B's shape, which streams through block by block.

usage: python scripts/bench_streaming.py [--layers 32] [--folder build/streaming] [--keep] [--threads N]
           [--out results/streaming]

Makes a checkpoint of random bfloat16 weights (13 GB for 32 layers), quantizes it with `--preset W4A8` in a process of
its own, and writes OUT.json and OUT.md. Random weights say nothing about accuracy; memory, time and disk do not depend
on their values. Needs about 19 GB of free disk for 32 layers. Exit 2: not measured.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from _bench import CannotMeasure, in_scratch, publish, run_apart
from _tables import describe_machine, markdown, write_json

HIDDEN, FFN, HEADS, VOCABULARY = 4096, 11008, 32, 32000
NSAMPLES, SEQLEN = 4, 64
RUN = ["--preset", "W4A8", "--nsamples", str(NSAMPLES), "--seqlen", str(SEQLEN), "--device", "cpu", "--offline", "-q"]


def source_bytes(layers):
    """Bytes of the checkpoint's weights."""
    block = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN + 2 * HIDDEN
    return 2 * (layers * block + 2 * VOCABULARY * HIDDEN + HIDDEN)


def make_checkpoint(folder, layers):
    """Write config, tokenizer and one shard a block; never more than one shard's tensors in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for i in range(layers + 1):
        prefix = f"model.layers.{i}."
        inside = [n for n in shapes if n.startswith(prefix)] or [n for n in shapes if not n.startswith("model.layers.")]
        tensors = {name: random_weight(shapes[name], generator) for name in inside}
        file = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": source_bytes(layers)}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def random_weight(shape, generator):
    """bfloat16: ones for a norm, else normal with LLaMA's initial spread."""
    import torch

    weight = torch.ones(shape, dtype=torch.bfloat16)
    return weight if len(shape) == 1 else weight.normal_(0, 0.02, generator=generator)


def byte_tokenizer():
    """One token a byte: enough to turn any text into ids below the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def quantize(model, out, threads):
    """Quantize in a child process; returns (its peak resident bytes, its seconds)."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    child = subprocess.Popen([sys.executable, "-m", "ptq", "quantize", model, "--out", out, *RUN], env=environment)
    # wait4 tells what this child used; the sum over all children would mix in the one that made the checkpoint
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise CannotMeasure(f"ptq quantize ended with status {os.waitstatus_to_exitcode(status)}: see its message")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), time.monotonic() - started


def measure(folder, layers, threads):
    """Make, quantize, and gather the numbers as plain JSON."""
    need = int(1.4 * source_bytes(layers))
    free = shutil.disk_usage(folder).free
    if free < need:
        raise CannotMeasure(
            f"{folder}: {free / 1e9:.1f} GB free, {layers} layers need {need / 1e9:.1f}: give a roomier --folder"
        )
    model, out = folder / "model", folder / "out"
    model.mkdir()
    made = run_apart(make_checkpoint, model, layers)
    peak, seconds = quantize(model, out, threads)
    report = json.loads((out / "report.json").read_text(encoding="utf8"))
    return {
        "layers": layers,
        "hidden": HIDDEN,
        "ffn": FFN,
        "vocabulary": VOCABULARY,
        "calibration_tokens": NSAMPLES * SEQLEN,
        "command": "ptq quantize " + " ".join(["MODEL", "--out", "OUT", *RUN]),
        "source_bytes": report["sizes"]["source_bytes"],
        "compressed_bytes": report["sizes"]["compressed_bytes"],
        "weights_effective_bits": report["bits"]["weights_effective"],
        "peak_resident_bytes": peak,
        "peak_bytes_in_report": report["peak_bytes"],
        "seconds_quantize": seconds,
        "seconds_make_checkpoint": made,
        "warnings": report["warnings"],
    }


def page(found):
    """The numbers as markdown."""
    peak, source = found["peak_resident_bytes"], found["source_bytes"]
    rows = [
        ["what", "measured"],
        ["checkpoint", f"{found['layers']} layers, hidden {HIDDEN}, FFN {FFN}, bfloat16, {source / 1e9:.2f} GB"],
        ["peak resident memory", f"{peak / 1e9:.2f} GB ({peak / source:.2f} of the checkpoint)"],
        ["time", f"{found['seconds_quantize']:.0f} s ({found['seconds_quantize'] / found['layers']:.0f} s a layer)"],
        ["result on disk", f"{found['compressed_bytes'] / 1e9:.2f} GB"],
        ["weights", f"{found['weights_effective_bits']:.2f} effective bits"],
    ]
    return "\n".join(
        [
            "# Quantizing a checkpoint larger than memory",
            "",
            markdown(rows),
            "",
            f"`{found['command']}` in a process of its own, {found['calibration_tokens']} calibration tokens. The weights"
            " are random with LLaMA-7B's shapes, so there is no accuracy to report. Resident memory is the process's"
            " high-water mark as the kernel counts it, mapped pages of the checkpoint included.",
            "",
            f"Made by `{found['made_by']}` on {describe_machine(found['made_with'])}.",
            "",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick check (default 32)")
    parser.add_argument("--folder", type=Path, default=Path("build/streaming"), help="scratch, must not exist yet")
    parser.add_argument("--keep", action="store_true", help="leave the scratch folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the quantizing process")
    parser.add_argument("--out", type=Path, default=Path("results/streaming"), help="stem of the .json and .md")
    args = parser.parse_args()
    if args.layers < 1 or args.threads < 1:
        parser.error("--layers and --threads must be at least 1")

    def measured():
        return in_scratch(args.folder, args.keep, lambda: measure(args.folder, args.layers, args.threads))

    return publish(measured, page, args.out, args.threads)


if __name__ == "__main__":
    sys.exit(main())
