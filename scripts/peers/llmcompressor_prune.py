#!/usr/bin/env python3
"""Prune a checkpoint with llm-compressor's SparseGPT, on the CPU in float32.

usage: python scripts/peers/llmcompressor_prune.py MODEL OUT --windows FILE (--sparsity S | --nm N:M) --json FILE

Runs in an environment that has llm-compressor and not necessarily ptq. FILE of --windows is a safetensors file whose
tensor `tokens`, int64 [windows, tokens], is calibrated on, one window at a time. OUT is an ordinary checkpoint with
zeros in it. The FILE of --json tells the seconds of the compression call alone and the versions.
"""

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

DISTRIBUTIONS = ("llmcompressor", "compressed-tensors", "torch", "transformers")


def prune(folder, tokens, *, sparsity=None, nm=None):
    """Load, prune every linear but the head with the library's defaults; returns (model, seconds of the call)."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    windows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]  # each [T]
    if nm is None:
        pattern = {"sparsity": sparsity}
    else:
        keep, group = (int(part) for part in nm.split(":"))
        pattern = {"sparsity": 1 - keep / group, "mask_structure": f"{group - keep}:{group}"}  # it counts the zeros
    recipe = SparseGPTModifier(targets=["Linear"], ignore=["re:.*lm_head"], **pattern)
    started = time.monotonic()
    oneshot(
        model=model,
        dataset=DataLoader(windows, batch_size=1),
        num_calibration_samples=len(windows),
        max_seq_length=tokens.shape[1],
        recipe=recipe,
    )
    return model, time.monotonic() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=Path, required=True)
    pattern = parser.add_mutually_exclusive_group(required=True)
    pattern.add_argument("--sparsity", type=float)
    pattern.add_argument("--nm", metavar="N:M", help="keep N of every M")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    tokens = load_file(args.windows)["tokens"]
    model, seconds = prune(args.model, tokens, sparsity=args.sparsity, nm=args.nm)
    model.save_pretrained(args.out, save_compressed=False)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    found = {"seconds": seconds, "versions": {name: version(name) for name in DISTRIBUTIONS}}
    args.json.write_text(json.dumps(found) + "\n", encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
