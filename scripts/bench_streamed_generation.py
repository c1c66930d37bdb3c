#!/usr/bin/env python3
"""Generating from a packed checkpoint of LLaMA-7B's shape that stays on disk: peak memory, and tokens a second by batch size.

usage: python scripts/bench_streamed_generation.py [--layers 32] [--batches 1,8,32] [--prefill 8] [--decode 4] [--threads N]
           [--folder build/streamed] [--keep] [--out results/streamed_generation]

Makes a **synthetic** checkpoint (random 4-bit codes; 4 GB for 32 layers), times `ptq bench --stream` on it for each batch size and, for
comparison, the model loaded whole at the first of them, and writes OUT.json and OUT.md. Random weights say nothing about accuracy; time
and memory do not depend on their values. Exit 2: not measured.
"""

import argparse
import os
import sys
from pathlib import Path

from _bench import in_scratch, ptq_bench, publish, run_apart
from _tables import describe_machine, markdown, write_json
from bench_streaming import FFN, HEADS, HIDDEN, VOCABULARY, byte_tokenizer

BITS, GROUP, KV_BITS = 4, 64, 4
SPREAD = 0.02  # LLaMA's initial standard deviation of a weight


def make_checkpoint(folder, layers):
    """Write a packed folder: 8-bit inputs a token, weights and cached keys and values of 4 bits, head of 4 bits, one shard a block."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from ptq.hf import FORMAT_VERSION, MODEL_TYPE_PREFIX, QUANT_METHOD

    torch.manual_seed(0)
    weight_map, specs = {}, {}

    def shard(number, tensors):
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for i in range(layers):
        modules = block_modules(f"model.layers.{i}")
        specs |= {name: module.spec() for name, module in modules.items()}
        shard(i, {f"{name}.{local}": t for name, module in modules.items() for local, t in module.state_dict().items()})
    head = random_linear(HIDDEN, VOCABULARY)
    specs["lm_head"] = head.spec()
    rest = {"model.embed_tokens.weight": torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16).normal_(0, 1)}
    rest["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    shard(layers, rest | {f"lm_head.{local}": t for local, t in head.state_dict().items()})
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    ).to_dict()
    packed = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "softmax_bits": 16, "kv_bits": KV_BITS}
    config |= {"model_type": MODEL_TYPE_PREFIX + "llama", "quantization_config": packed | {"modules": specs}}
    write_json(folder / "config.json", config)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    byte_tokenizer().save_pretrained(folder)


def block_modules(prefix):
    """The lowbit modules of one block by name."""
    import torch
    from lowbit import ActivationQuantizer, Norm

    def kv_grid():  # of outputs of spread SPREAD sqrt(HIDDEN), as normed inputs give
        step = torch.tensor([6 * SPREAD * HIDDEN**0.5 / 2**KV_BITS])
        sizes, bits = torch.tensor([HIDDEN]), torch.tensor([KV_BITS])
        return ActivationQuantizer.static(step, torch.tensor([2.0 ** (KV_BITS - 1)]), bits, sizes)

    made = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        made[f"self_attn.{name}"] = random_linear(HIDDEN, HIDDEN, output=kv_grid() if name[0] in "kv" else None)
    for name, (inside, outside) in {"gate": (HIDDEN, FFN), "up": (HIDDEN, FFN), "down": (FFN, HIDDEN)}.items():
        made[f"mlp.{name}_proj"] = random_linear(inside, outside)
    for name in ("input_layernorm", "post_attention_layernorm"):
        made[name] = Norm(HIDDEN, kind="rmsnorm", eps=1e-6)
        made[name].weight.fill_(1)
    return {f"{prefix}.{name}": module for name, module in made.items()}


def random_linear(channels, rows, output=None):
    """Codes of every value alike, about zero, whose weights have LLaMA's initial spread."""
    import torch
    from lowbit import ActivationQuantizer, Linear, pack

    groups = channels // GROUP
    inputs = ActivationQuantizer("token", token_bits=8)
    linear = Linear(
        channels, rows, bits=BITS, groups=groups, bias=False, input_quantizer=inputs, output_quantizer=output
    )
    linear.weight_packed.random_(0, 256)
    linear.weight_scale.fill_(SPREAD / (4**BITS / 12) ** 0.5)
    linear.weight_zero.copy_(pack(torch.full((rows, groups), 2 ** (BITS - 1), dtype=torch.uint8), BITS))
    linear.weight_groups.fill_(GROUP)
    return linear


def bench(model, batch, args, *, stream):
    """What `ptq bench` measures of one batch size."""
    numbers = {"--prefill": args.prefill, "--decode": args.decode, "--batch-size": batch, "--threads": args.threads}
    words = ["--rounds", "1", *["--stream"] * stream]
    return {"batch": batch, "stream": stream, **ptq_bench(model, numbers, *words)["compressed"]}


def measure(args):
    """Make the checkpoint, time it, and gather the numbers as plain JSON."""
    model = args.folder / "model"
    model.mkdir()
    made = run_apart(make_checkpoint, model, args.layers)
    runs = [bench(model, args.batches[0], args, stream=False)]
    runs += [bench(model, batch, args, stream=True) for batch in args.batches]
    return {
        "synthetic": True,
        "layers": args.layers,
        "hidden": HIDDEN,
        "ffn": FFN,
        "vocabulary": VOCABULARY,
        "prefill": args.prefill,
        "decode": args.decode,
        "checkpoint_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "block_bytes": (model / f"model-00001-of-{args.layers + 1:05d}.safetensors").stat().st_size,
        "resident_bytes_beside_blocks": (4 + BITS / 8) * VOCABULARY * HIDDEN,
        "seconds_make_checkpoint": made,
        "runs": runs,
    }


def page(found):
    """The numbers as markdown."""
    size = found["checkpoint_bytes"]
    rows = [["", "batch", "prefill tokens/s", "decode tokens/s", "generated/s of both", "peak GB", "of the checkpoint"]]
    for run in found["runs"]:
        rates = (run[f"{what}_tokens_per_second"] for what in ("prefill", "decode", "generation"))
        name = "streamed" if run["stream"] else "loaded whole"
        peak = run["peak_bytes"]
        cells = [name, str(run["batch"]), *(f"{rate:.2f}" for rate in rates), f"{peak / 1e9:.2f}", f"{peak / size:.2f}"]
        rows.append(cells)
    return "\n".join(
        [
            "# Generating from a checkpoint that stays on disk",
            "",
            markdown(rows, right=range(1, 7)),
            "",
            f"A **synthetic** packed checkpoint of {size / 1e9:.2f} GB: random {BITS}-bit weights in {found['layers']} layers"
            f" of LLaMA-7B's shapes, {found['block_bytes'] / 1e6:.0f} MB a block; 8-bit inputs, {KV_BITS}-bit keys and values."
            f" {found['prefill']} tokens read, {found['decode']} generated for each sequence by `ptq bench --stream`, each line in a"
            " process of its own. *Generated/s of both*: tokens generated over the time of prefill and decoding, as FlexGen reports it."
            " Peak is the process's high-water mark of resident memory as the kernel counts it, mapped pages of the checkpoint"
            f" included; about {found['resident_bytes_beside_blocks'] / 1e9:.1f} GB of it are embeddings and head."
            " From the second pass on the file comes from the page cache where memory has room for it, so these rates say nothing"
            " of the disk. The reading thread is one more beside those counted below.",
            "",
            f"Made by `{found['made_by']}` on {describe_machine(found['made_with'])}.",
            "",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick check (default 32)")
    parser.add_argument(
        "--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32], help="sequences (1,8,32)"
    )
    parser.add_argument("--prefill", type=int, default=8, help="tokens of each prompt (8)")
    parser.add_argument("--decode", type=int, default=4, help="tokens generated for each prompt, from 2 (4)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the computing process")
    parser.add_argument("--folder", type=Path, default=Path("build/streamed"), help="scratch, must not exist yet")
    parser.add_argument("--keep", action="store_true", help="leave the scratch folder")
    parser.add_argument("--out", type=Path, default=Path("results/streamed_generation"), help="stem of the .json and .md")
    args = parser.parse_args()

    def measured():
        return in_scratch(args.folder, args.keep, lambda: measure(args))

    return publish(measured, page, args.out, args.threads)


if __name__ == "__main__":
    sys.exit(main())
