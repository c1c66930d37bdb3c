"""Write a model in another engine's format: `ptq export`. One file a format; this one knows their names and nothing heavy."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq.errors import BadInput
from ptq.recipe_build import suggest


@dataclass(frozen=True)
class Format:
    """One foreign format.

    Args:
        module: the file here that writes it, with a function write(source, folder, variant) -> facts for the report.
        variants: what may follow the name after a colon; without one the writer chooses.
        codes: whether it holds quantized weights, so that a folder without any has nothing to put in it.
        note: one line for `ptq list` and `--help`.
    """

    module: str
    variants: tuple[str, ...]
    codes: bool
    note: str


FORMATS: dict[str, Format] = {
    "dense": Format(
        "dense",
        ("float32", "bfloat16", "float16"),
        False,
        "plain safetensors, dequantized or pruned, in the source's dtype or the one named; any engine",
    ),
    "compressed-tensors": Format(
        "compressed_tensors",
        ("symmetric",),
        True,
        "pack-quantized, or int-quantized where inputs have 8 bits too; vLLM, SGLang, transformers",
    ),
    "gptq": Format(
        "gptq",
        ("v1", "v2"),
        True,
        "AutoGPTQ's layout (v1) or GPTQModel's (v2, chosen where v1 cannot be read safely); SGLang, GPTQModel",
    ),
    "gguf": Format(
        "gguf",
        ("q4_0", "q4_1", "q8_0", "f16", "f32"),
        False,
        "one file with its tokenizer, the closest of Q4_0, Q4_1 and Q8_0, or the type named; llama.cpp",
    ),
}


def parse(text: str) -> tuple[str, str | None]:
    """(name, variant) of NAME or NAME:VARIANT. Raises BadInput with the nearest name."""
    name, colon, variant = text.partition(":")
    if name not in FORMATS:
        raise BadInput(f"--format {text}: unknown format {name!r}{suggest(name, FORMATS)}")
    allowed = FORMATS[name].variants
    if colon and variant not in allowed:
        raise BadInput(
            f"--format {text}: {name} has no variant {variant!r}{suggest(variant, allowed) if allowed else ''}"
        )
    return name, variant or None


def export(folder: Path, out: Path, wanted: str, *, weights_only: bool = False) -> dict[str, Any]:
    """Write the model in `folder` as `wanted` (NAME or NAME:VARIANT) into the new folder `out`; returns export.json.

    Args:
        weights_only: leave out what the format cannot say of activations, keys and values.

    Raises:
        BadInput, UnsupportedModel: see their messages; `out` is then not there.
    """
    name, variant = parse(wanted)
    from ptq.export.activations import leave_out
    from ptq.export.folder import finish, new_folder
    from ptq.export.grids import quantized
    from ptq.export.source import open_source
    from ptq.ledger import refuse_existing

    refuse_existing(out)
    writer = importlib.import_module(f"ptq.export.{FORMATS[name].module}")
    source = open_source(folder)
    if FORMATS[name].codes and not (source.packed and any(quantized(source))):
        raise BadInput(f"{folder}: holds no quantized weights, which {name} is for; use --format dense or gguf")
    left_out = leave_out(source, name, getattr(writer, "takes", None), weights_only=weights_only)
    partial = new_folder(out)
    try:
        report = finish(source, partial, name, writer.write(source, partial, variant), left_out)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return report
