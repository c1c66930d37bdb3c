"""`ptq inspect DIR`: what is in a model folder, module by module.

Bits and errors come from its JSON files. What they say of zeros is not taken on trust: the tensors are read and counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ptq.cli import options
from ptq.errors import BadInput
from ptq.folders import model_folder, read_json
from ptq.hf import QUANT_METHOD

COLUMNS = {
    "name": "module",
    "shape": "shape",
    "bits": "bits",
    "groups": "groups",
    "effective_bits": "effective bits",
    "relative_error": "relative error",
}
PRUNED_COLUMNS = {
    "sparsity": "zeros",
    "keep": "keep",
    "stored_bytes": "bytes",
    "dense_bytes": "dense bytes",
}


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("inspect", help="what is in a model folder: bits, zeros and error by module")
    parser.set_defaults(main=main, parser=parser)
    parser.add_argument("folder", metavar="DIR", help="a model folder, compressed or full precision")
    parser.add_argument("--plots", metavar="DIR2", help="draw channel ranges, before and after, into this folder")
    parser.add_argument("--html", metavar="FILE", help="write the whole report as one page that needs nothing else")
    parser.add_argument("--eval", metavar="FILE", help="what `ptq eval --json FILE` wrote, for that page")
    options.add_json(parser)


def main(args: argparse.Namespace) -> None:
    """Run the verb."""
    folder = model_folder(args.folder)
    evaluation = _evaluation(args)
    found = contents(folder)
    if args.plots:
        from ptq.plots import draw_ranges

        found["plots"] = [str(path) for path in draw_ranges(folder, Path(args.plots))]
    if args.html:
        from ptq.html import write_page

        write_page(folder, Path(args.html), _report(folder), evaluation)
        found["html"] = args.html
    if args.json:
        options.write_json(args.json, found)
    if args.json != "-":
        print(_text(folder, found))


def _evaluation(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.eval is None:
        return None
    if args.html is None:
        raise BadInput("--eval goes onto the page of --html; name that too")
    if not Path(args.eval).is_file():
        raise BadInput(f"--eval {args.eval}: no such file")
    return read_json(Path(args.eval))


def _report(folder: Path) -> dict[str, Any]:
    """report.json, empty where there is none."""
    return read_json(folder / "report.json") if (folder / "report.json").is_file() else {}


def contents(folder: Path) -> dict[str, Any]:
    """What the folder's config.json and report.json say, as one plain dict.

    `modules` joins the linears of the config's `quantization_config.modules` with the report's measurements; in a folder of the
    source's own layout it is the report's rows if linears were pruned. Pruned ones also say `weights`, `zeros`, `stored_bytes` and
    `dense_bytes`, counted in the tensors. It is empty for a model that this tool did not compress; `quant_method` is None for one
    that loads without it.
    Raises BadInput for a file that is not a JSON object, and for tensors that are not what the report says.
    """
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config") or {}
    report = _report(folder)
    modules = _modules(quantization, report.get("modules", []))
    pruned = [module for module in modules if _is_pruned(module)]
    if pruned:
        from ptq.zeros import count_zeros

        counted = count_zeros(folder, pruned)
        modules = [module | counted.get(module["name"], {}) for module in modules]
    return {
        "model_type": config.get("model_type"),
        "quant_method": quantization.get("quant_method"),
        "safetensors_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "modules": modules,
        **{key: report.get(key) for key in ("base_model", "bits", "sizes", "coverage", "warnings")},
    }


def _modules(quantization: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not quantization:
        return rows if any(map(_is_pruned, rows)) else []
    if quantization.get("quant_method") != QUANT_METHOD:
        return []
    measured = {row["name"]: row for row in rows}
    linears = {name: how for name, how in quantization["modules"].items() if how["kind"] == "linear"}
    return [{"name": name, "keep": _keep(how), **how, **measured.get(name, {})} for name, how in linears.items()]


def _keep(how: dict[str, Any]) -> str | None:
    """Such as "2:4", of a linear that is stored in slots."""
    slots = (how.get("sparse") or {}).get("keep")
    return None if slots is None else ":".join(map(str, slots))


def _is_pruned(module: dict[str, Any]) -> bool:
    """Whether the report or the config claims zeros; a report of a run that prunes nothing may lack the keys."""
    return any(module.get(key) is not None for key in ("sparsity", "keep", "sparse"))


def _text(folder: Path, found: dict[str, Any]) -> str:
    weights = f"{found['safetensors_bytes'] / 1e6:.1f} MB of safetensors"
    head = f"{folder}: {found['model_type'] or 'unknown model type'}, {weights}"
    if found["modules"]:
        lines = [_table(found["modules"]), "", f"{head}, {_counts(found)}", *_pruned(found["modules"])]
    elif found["quant_method"] is None:
        lines = [f"{head}, full precision: nothing in it is compressed"]
    else:
        lines = [f"{head}, quantized by {found['quant_method']!r}, which `ptq inspect` does not read further"]
    lines += _measured(found)
    lines += [f"wrote {path}" for path in (*found.get("plots", []), found.get("html")) if path]
    return "\n".join(lines)


def _table(modules: list[dict[str, Any]]) -> str:
    columns = COLUMNS | (PRUNED_COLUMNS if any(map(_is_pruned, modules)) else {})
    rows = [list(columns.values()), *([_cell(module.get(key)) for key in columns] for module in modules)]
    return options.table(rows, right=tuple(range(2, len(columns))))


def _counts(found: dict[str, Any]) -> str:
    modules = found["modules"]
    if found["quant_method"] is None:
        return f"{sum(map(_is_pruned, modules))} of {len(modules)} linears pruned, zeros stored like other weights"
    compressed = sum(module["bits"] < 16 or module.get("sparse") is not None for module in modules)
    return f"{compressed} of {len(modules)} linears compressed"


def _pruned(modules: list[dict[str, Any]]) -> list[str]:
    """What was counted in the tensors of pruned linears, if there are any."""
    counted = [module for module in modules if _is_pruned(module)]
    if not counted:
        return []
    zeros, stored, dense = (sum(module[key] for module in counted) for key in ("zeros", "stored_bytes", "dense_bytes"))
    weights = sum(module["weights"] for module in counted)
    share = f"{zeros:,} of {weights:,} weights are zero ({zeros / max(1, weights):.2%})"
    lines = [f"{len(counted)} pruned linears counted: {share}"]
    patterns = sorted({module["keep"] for module in counted if module.get("keep")})
    lines += [f"every group checked: {', '.join(patterns)}"] if patterns else []
    return [*lines, f"these weights take {stored / 1e6:.2f} MB on disk, {dense / 1e6:.2f} MB dense"]


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
