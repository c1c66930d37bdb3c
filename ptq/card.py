"""The model card: README.md of a compressed folder, made from its report and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

SITES = (
    ("weights", "weights", "bits", "decoder linears"),
    ("norm outputs", "activations", "norm_bits", "inputs of query, key, value, up (R1, R4)"),
    ("queries", "activations", "q_bits", "R2"),
    ("keys and values", "activations", "kv_bits", "R2, R3; the KV cache"),
    ("other inputs", "activations", "bits", "inputs of output and down projections (R3, R5)"),
    ("softmax", "activations", "softmax_bits", "attention probabilities"),
)


def model_card(report: dict[str, Any]) -> str:
    """README.md with a Hugging Face YAML header. `report` is report.json, schema version 1 (docs/report.md).

    An `evaluation` in it (what `ptq eval --json` writes) is printed with its protocol. What is not known is left out.
    """
    parts = [_header(report), _loading(report), _bits(report), _sizes(report), _calibration(report)]
    if report.get("evaluation"):
        parts.append(_evaluation(report["evaluation"]))
    return "\n\n".join([*parts, _limits(report), _versions(report)]) + "\n"


def _base_name(report: dict[str, Any]) -> str:
    """A hub id as it is; of a local folder only the last name: a card is published, the path is nobody's business."""
    base = report["base_model"]
    return base["source"] if base["revision"] else base["source"].rstrip("/\\").replace("\\", "/").split("/")[-1]


def title(report: dict[str, Any]) -> str:
    """The base model, what was done to it, and the method."""
    recipe = report["recipe"]
    return f"{_base_name(report)}, {', '.join(_what(recipe))}, {recipe['method']}"


def _what(recipe: dict[str, Any]) -> list[str]:
    """What was done, in the fewest words: the preset or the bits, and the sparsity."""
    p, a = recipe["pruning"], recipe["activations"]
    found = []
    if recipe["preset"] or min(recipe["weights"]["bits"], *(v for k, v in a.items() if k.endswith("bits"))) < 16:
        found.append(recipe["preset"] or _bits_name(recipe))
    if p["keep"] or p["sparsity"]:
        found.append(p["keep"] or f"{p['sparsity']:.0%} sparse")
    return found


def _bits_name(recipe: dict[str, Any]) -> str:
    w, a = recipe["weights"]["bits"], recipe["activations"]
    kv_only = a["bits"] == 16 and a["kv_bits"] < 16
    return f"W{w}A{a['kv_bits']}KV" if kv_only else f"W{w}A{a['bits']}"


def _header(report: dict[str, Any]) -> str:
    import yaml

    base, recipe = report["base_model"], report["recipe"]
    what = [word.lower().replace(" ", "-") for word in _what(recipe)]
    tags = ["ptq", "quantized" if _packed(report) else "pruned", recipe["method"], *what]
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    # a local folder has no id on the hub to point to
    if base["revision"]:
        header |= {"base_model": base["source"], "base_model_relation": "quantized" if _packed(report) else "finetune"}
    if base["license"]:
        header["license"] = base["license"]
    header["tags"] = list(dict.fromkeys(tags))
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---"


def _packed(report: dict[str, Any]) -> bool:
    """Whether the folder is in the packed format, which only `import ptq` loads."""
    return any(row["storage"] == "packed" for row in report["modules"]) or report["sparsity"] is None


def _loading(report: dict[str, Any]) -> str:
    note = (
        "The weights are packed: without `import ptq` (from `ptq-toolkit`) transformers stops at an unknown model type."
    )
    if not _packed(report):
        note = "An ordinary checkpoint: pruned weights are stored as zeros."
    first = "import ptq  # registers the packed format\n" if _packed(report) else ""
    return f"""\
```python
{first}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

# {title(report)}

{note}"""


def _bits(report: dict[str, Any]) -> str:
    recipe = report["recipe"]
    rows = ["| site | bits | where |", "|---|---|---|"]
    for name, part, key, where in SITES:
        bits = site_bits(report, part, key)
        rows.append(f"| {name} | {'16 (full precision)' if bits == 16 else bits} | {where} |")
    bits = report["bits"]
    kv, inputs = bits["kv_bits_effective"], bits["activations_effective"]
    effective = f"{bits['weights_effective']:.3f} a compressed weight"
    effective += "" if inputs in (None, 16) else f", {inputs:.3f} a value that enters a linear"
    effective += "" if kv is None else f", {kv:.3f} a cached key or value"
    text = f"Effective bits (scales, zero points and permutations are counted): {effective}."
    if bits["sinks"]:
        text += f" Full precision, and not counted: the first {bits['sinks']} of a sequence's tokens, here and in the cache."
    text += _run_time(report["run_time"])
    grids = f"Activation grid: {recipe['activations']['grid']}. Weight groups: {recipe['weights']['groups']}."
    lines = ["## Bits", "", *rows, "", text, f"{grids} Weight solver: {recipe['weights']['solver']}."]
    p = recipe["pruning"]
    if report["sparsity"] is not None:
        asked = f"keep {p['keep']}" if p["keep"] else f"sparsity {p['sparsity']}, allocation {p['allocation']}"
        lines += [
            "",
            f"Zeros among the decoder linears' weights: {report['sparsity']:.2%} ({asked}, method {p['method']}).",
        ]
    return "\n".join(lines)


def _run_time(cost: dict[str, int]) -> str:
    """What the method costs at run time beside the products, if anything."""
    found = []
    if cost["hadamard_additions"]:
        share = cost["hadamard_additions"] / cost["multiplications"]
        found.append(f"{share:.2%} as many additions for Hadamard matrices as the linears have multiplications")
    if cost["dynamic_channels"]:
        found.append(f"the ranges of {cost['dynamic_channels']} values")
    return f" What a token costs at run time beside the products: {' and '.join(found)}." if found else ""


def site_bits(report: dict[str, Any], part: str, key: str) -> int:
    """What the recipe asks for, except that some families keep softmax in full precision whatever it asks."""
    return report["bits"]["softmax"] if key == "softmax_bits" else report["recipe"][part][key]


def _sizes(report: dict[str, Any]) -> str:
    sizes = report["sizes"]
    source, compressed = sizes["source_bytes"], sizes["compressed_bytes"]
    ratio = source / max(1, compressed)
    errors = [m["relative_error"] for m in report["modules"] if m["relative_error"] is not None]
    lines = ["## Size and error", "", f"{source:,} bytes of weights became {compressed:,} ({ratio:.2f} times smaller)."]
    if errors:
        middle, worst = sorted(errors)[len(errors) // 2], max(errors)
        lines.append(
            f"Relative output error of a module on the calibration tokens: median {middle:.2e}, worst {worst:.2e}; "
            "`report.json` has every module."
        )
    return "\n".join(lines)


def _calibration(report: dict[str, Any]) -> str:
    c = report["calibration"]
    dropped = f", {c['dropped']} dropped" if c["dropped"] else ""
    windows = f"{c['used']} of {c['requested']} windows of {c['seqlen']} tokens ({c['tokens']:,} tokens{dropped})"
    return f"""\
## Calibration

{windows} from {text_name(c["source"])}; sha256 of the token ids {c["fingerprint"][:16]}."""


def text_name(source: str) -> str:
    """Names of the texts of a mix, without the folders they lay in."""
    return ", ".join(part.strip().replace("\\", "/").split("/")[-1] for part in source.split(","))


def _evaluation(e: dict[str, Any]) -> str:
    p = e["protocol"]
    spread = "" if e["perplexity_stderr"] is None else f" ± {e['perplexity_stderr']:.4f}"
    lines = ["## Evaluation", "", f"Perplexity {e['perplexity']:.4f}{spread} over {e['tokens']:,} tokens."]
    if "kl" in e:
        same = f"same first choice {e['top1_agreement']:.2%}"
        lines.append(f"Against the reference model: KL {e['kl']:.5f} nats a token, {same}.")
    protocol = ", ".join(f"{key} {value!r}" for key, value in p.items())
    return "\n".join([*lines, f"Protocol: {protocol}. Perplexities compare only under one protocol."])


def _limits(report: dict[str, Any]) -> str:
    coverage = report["coverage"]
    total = coverage["compressed_parameters"] + coverage["other_parameters"]
    share = coverage["other_parameters"] / max(1, total)
    lines = [
        "## What is not low-bit",
        "",
        f"- {coverage['other_parameters']:,} of {total:,} parameters ({share:.1%}) are stored in full precision: "
        "embeddings, the language-model head, norms, biases and whatever is listed below.",
        "- The residual stream between blocks is always full precision.",
    ]
    for name, part, key, where in SITES:
        bits = site_bits(report, part, key)
        if bits >= 8:
            lines.append(f"- {name}, {where}: {'full precision' if bits == 16 else f'{bits} bits'}.")
    lines += [f"- not compressed: `{skipped['name']}`: {skipped['reason']}." for skipped in coverage["skipped"]]
    # the same note on every block is one line
    notes = Counter((site["site"], site["note"]) for site in report["sites"] if site["note"])
    lines += [
        f"- site {site}, {count} {'block' if count == 1 else 'blocks'}: {note}."
        for (site, note), count in notes.items()
    ]
    lines += [f"- warning: {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


def _versions(report: dict[str, Any]) -> str:
    made = ", ".join(f"{name} {version}" for name, version in report["tool"].items())
    return f"""\
## Made with

{made}, seed {report["recipe"]["seed"]}; `recipe.yaml` is the whole recipe, `report.json` the whole report."""
