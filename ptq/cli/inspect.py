"""`ptq inspect DIR`: what is in a model folder, module by module, from its JSON files alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ptq.cli import options
from ptq.hf import QUANT_METHOD

COLUMNS = {
    "name": "module",
    "shape": "shape",
    "bits": "bits",
    "groups": "groups",
    "effective_bits": "effective bits",
    "relative_error": "relative error",
}


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("inspect", help="what is in a model folder: bits and error, module by module")
    parser.set_defaults(main=main, parser=parser)
    parser.add_argument("folder", metavar="DIR", help="a model folder, compressed or full precision")
    parser.add_argument("--plots", metavar="DIR2", help="draw channel ranges, before and after, into this folder")
    options.add_json(parser)


def main(args: argparse.Namespace) -> None:
    """Run the verb."""
    folder = options.model_folder(args.folder)
    found = contents(folder)
    if args.plots:
        from ptq.plots import draw_ranges

        found["plots"] = [str(path) for path in draw_ranges(folder, Path(args.plots))]
    if args.json:
        options.write_json(args.json, found)
    if args.json != "-":
        print(_text(folder, found))


def contents(folder: Path) -> dict[str, Any]:
    """What the folder's config.json and report.json say, as one plain dict.

    `modules` joins the linears of the config's `quantization_config.modules` with the report's measurements. It is
    empty for a model that this tool did not compress; `quant_method` is None for one in full precision.
    Raises BadInput for a file that is not a JSON object.
    """
    config = options.read_json(folder / "config.json")
    quantization = config.get("quantization_config") or {}
    report = options.read_json(folder / "report.json") if (folder / "report.json").is_file() else {}
    measured = {module["name"]: module for module in report.get("modules", [])}
    ours = quantization.get("quant_method") == QUANT_METHOD
    stored = {name: how for name, how in quantization["modules"].items() if how["kind"] == "linear"} if ours else {}
    return {
        "model_type": config.get("model_type"),
        "quant_method": quantization.get("quant_method"),
        "safetensors_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "modules": [{"name": name, **how, **measured.get(name, {})} for name, how in stored.items()],
        **{key: report.get(key) for key in ("base_model", "bits", "sizes", "coverage", "warnings")},
    }


def _text(folder: Path, found: dict[str, Any]) -> str:
    weights = f"{found['safetensors_bytes'] / 1e6:.1f} MB of safetensors"
    head = f"{folder}: {found['model_type'] or 'unknown model type'}, {weights}"
    if found["quant_method"] is None:
        lines = [f"{head}, full precision: nothing in it is compressed"]
    elif not found["modules"]:
        lines = [f"{head}, quantized by {found['quant_method']!r}, which `ptq inspect` does not read further"]
    else:
        rows = [list(COLUMNS.values()), *([_cell(module.get(key)) for key in COLUMNS] for module in found["modules"])]
        packed = sum(module["bits"] < 16 for module in found["modules"])
        lines = [options.table(rows, right=(2, 3, 4, 5)), "", f"{head}, {packed} of {len(rows) - 1} linears compressed"]
    lines += _measured(found)
    lines += [f"wrote {path}" for path in found.get("plots", [])]
    return "\n".join(lines)


def _measured(found: dict[str, Any]) -> list[str]:
    """What only report.json knows; a folder without one has no such lines."""
    lines = []
    if found["base_model"]:
        base = found["base_model"]
        lines.append(f"made from {base['source']}" + (f", revision {base['revision']}" if base["revision"] else ""))
    if found["bits"]:
        kv = found["bits"]["kv_bits_effective"]
        cache = "full precision" if kv is None else f"{kv:.2f} effective bits"
        lines.append(f"weights {found['bits']['weights_effective']:.2f} effective bits, keys and values {cache}")
    if found["sizes"]:
        source, compressed = found["sizes"]["source_bytes"], found["sizes"]["compressed_bytes"]
        lines.append(f"{source / 1e6:.1f} MB -> {compressed / 1e6:.1f} MB, {source / max(1, compressed):.2f}x smaller")
    if found["coverage"]:
        c = found["coverage"]
        rest = f"{c['other_parameters']:,} in full precision"
        lines.append(f"{c['compressed_parameters']:,} parameters compressed, {rest}")
        lines += [f"not compressed: {skipped['name']}: {skipped['reason']}" for skipped in c["skipped"]]
    return lines + [f"warning: {warning}" for warning in found["warnings"] or []]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3e}" if 0 < abs(value) < 0.01 else f"{value:.3f}"
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return str(value)
