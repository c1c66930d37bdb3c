"""The page's sections, each made from report.json (docs/report.md); a section with nothing to say is None."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ptq import card
from ptq.html import charts
from ptq.html.markup import Markup, el, join, table


def section(heading: str, *parts: str) -> Markup:
    """A heading and what is under it."""
    return el("section", el("h2", heading), *parts)


def head(report: dict[str, Any]) -> Markup:
    """What was made of which model, and its numbers at a glance."""
    recipe, bits, sizes = report["recipe"], report["bits"], report["sizes"]
    worst = max((m["relative_error"] for m in report["modules"] if m["relative_error"] is not None), default=None)
    facts = {
        "times smaller": f"{sizes['source_bytes'] / max(1, sizes['compressed_bytes']):.2f}",
        "bits a compressed weight": f"{bits['weights_effective']:.3f}",
        "bits a value that enters a linear": _known(bits["activations_effective"], ".3f"),
        "bits a cached key or value": _known(bits["kv_bits_effective"], ".3f"),
        "zeros among the weights": _known(report["sparsity"], ".2%"),
        "worst relative error": _known(worst, ".2e"),
    }
    tiles = [el("div", el("dd", value), el("dt", name)) for name, value in facts.items() if value != "-"]
    preset = f", preset {recipe['preset']}" if recipe["preset"] else ""
    how = f"{report['base_model']['model_type']}, method {recipe['method']}{preset}, seed {recipe['seed']}"
    note = "Effective bits: codes, scales, zero points, permutations and masks are counted."
    return el("header", el("h1", card.title(report)), el("p", how), el("dl", *tiles), el("p", note, class_="note"))


def evaluation(e: dict[str, Any]) -> Markup:
    """What `ptq eval --json` wrote: perplexity with the protocol that it holds under, and zero-shot tasks."""
    parts = _perplexity(e) if "perplexity" in e else []
    if "tasks" in e:
        rows = [_task(result) for result in e["tasks"].values()]
        parts.append(
            table(
                ("zero-shot task", "accuracy", "normalized", "majority", "last word's perplexity", "items", "sha256"),
                rows,
            )
        )
    return section("Evaluation", *parts)


def _perplexity(e: dict[str, Any]) -> list[Markup]:
    rows = [("perplexity", _spread(e, "perplexity")), ("tokens", f"{e['tokens']:,}")]
    if "kl" in e:
        rows.append(("KL divergence from the reference model, nats a token", f"{e['kl']:.5f}"))
        rows.append(("same first choice as the reference model", f"{e['top1_agreement']:.2%}"))
    protocol = [(key, json.dumps(value, ensure_ascii=False)) for key, value in e["protocol"].items()]
    note = el("p", "Perplexities compare only under one protocol.", class_="note")
    return [table(("measure", "value"), rows), note, table(("protocol", "value"), protocol, left=2)]


def _task(result: dict[str, Any]) -> tuple[str, ...]:
    items = f"{result['items']:,}" + ("" if result["items"] == result["rows"] else f" of {result['rows']:,}")
    measures = [_spread(result, key) if key in result else "-" for key in ("accuracy", "accuracy_norm")]
    perplexity = _spread(result, "perplexity") if "perplexity" in result else "-"
    return result["task"], *measures, f"{result['majority']:.4f}", perplexity, items, (result["sha256"] or "-")[:12]


def _spread(result: dict[str, Any], key: str) -> str:
    """A measure and its standard error."""
    error = result[f"{key}_stderr"]
    return f"{result[key]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def bits(report: dict[str, Any]) -> Markup:
    """Bits by kind of site as the recipe asks and the family allows, and how the grids lie."""
    rows = []
    for name, part, key, where in card.SITES:
        found = card.site_bits(report, part, key)
        rows.append((name, "16 (full precision)" if found == 16 else str(found), where))
    recipe, sinks = report["recipe"], report["bits"]["sinks"]
    w, p = recipe["weights"], recipe["pruning"]
    said = f"Activation grid: {recipe['activations']['grid']}. Weight groups: {w['groups']}, solver {w['solver']}."
    if sinks:
        said += f" In full precision, here and in the cache: the first {sinks} of a sequence's tokens."
    if report["sparsity"] is not None:
        asked = f"keep {p['keep']}" if p["keep"] else f"sparsity {p['sparsity']}, allocation {p['allocation']}"
        said += f" Pruned: {asked}, method {p['method']}."
    return section("Bits by site", table(("site", "bits", "where"), rows, left=3), el("p", said))


def sizes(report: dict[str, Any]) -> Markup:
    """Bytes before and after, and what takes those after."""
    source, compressed = report["sizes"]["source_bytes"], report["sizes"]["compressed_bytes"]
    kinds: Counter[str] = Counter()
    for m in report["modules"]:
        kinds[m["name"].rpartition(".")[2]] += round(m["shape"][0] * m["shape"][1] * m["effective_bits"] / 8)
    parts = [*kinds.most_common(), ("everything else: embeddings, norms, biases", compressed - kinds.total())]
    coverage = report["coverage"]
    count, rest = coverage["compressed_parameters"], coverage["other_parameters"]
    said = f"{count:,} parameters compressed, {rest:,} ({rest / max(1, count + rest):.1%}) in full precision."
    return section(
        "Size",
        _bytes("weight files", [("the base model", source), ("this folder", compressed)], max(source, compressed)),
        _bytes("in this folder", parts, compressed),
        el("p", said),
    )


def _bytes(what: str, rows: Sequence[tuple[str, int]], whole: int) -> Markup:
    cells = [(name, f"{count:,}", charts.bar(count / max(1, whole))) for name, count in rows]
    return table((what, "bytes", ""), cells, class_="box bars")


def blocks(report: dict[str, Any]) -> Markup | None:
    """Relative error, effective bits and zeros by block."""
    figures = []
    for key, label, write, log in (
        ("relative_error", "relative output error", "{:.3g}".format, True),
        ("effective_bits", "effective bits of a weight", "{:.4g}".format, False),
        ("sparsity", "share of zeros", "{:.4g}".format, False),
    ):
        points = [(block, m[key], m["name"]) for m in report["modules"] if (block := _block(m["name"])) is not None]
        points = [point for point in points if point[1] is not None]
        if points:
            drawn = charts.by_block(points, label=f"{label} by block", write=write, log=log)
            figures.append(el("figure", el("figcaption", label), drawn))
    if not figures:
        return None
    note = el("p", "One dot a module, the line through each block's median.", class_="note")
    return section("Block by block", el("div", *figures, class_="figures"), note)


def modules(report: dict[str, Any]) -> Markup:
    """Every module's numbers; the bars are shares of the worst error."""
    rows = report["modules"]
    worst = max((m["relative_error"] or 0 for m in rows), default=0) or 1
    heading = ("module", "shape", "bits", "effective bits", "relative error", "", "zeros", "seconds")
    note = (
        "Bars: share of the worst error. Linears with one input are solved together: one error, and each its share of the "
        "seconds. docs/report.md says how they are measured."
    )
    whole = table(heading, (_module(m, worst) for m in rows), class_="box tall")
    return section(f"{len(rows):,} modules", whole, el("p", note, class_="note"))


def _module(m: dict[str, Any], worst: float) -> tuple[str, ...]:
    failure = el("small", f" {m['failure']}") if m["failure"] else ""
    fine = f", {m['fine_share']:.0%} at {min(8, 2 * m['bits'])}" if m["fine_share"] else ""
    return (
        join([el("code", m["name"]), failure]),
        f"{m['shape'][0]} x {m['shape'][1]}",
        f"{m['bits']}{fine}",
        f"{m['effective_bits']:.3f}",
        _known(m["relative_error"], ".3e"),
        charts.bar((m["relative_error"] or 0) / worst),
        _known(m["sparsity"], ".2%") + (f" ({m['keep']})" if m["keep"] else ""),
        f"{m['seconds']:.2f}",
    )


def run_time(report: dict[str, Any]) -> Markup:
    """What a token costs beside the products."""
    cost = report["run_time"]
    share = cost["hadamard_additions"] / max(1, cost["multiplications"])
    rows = [
        ("multiplications of the decoder linears", f"{cost['multiplications']:,}"),
        (f"additions for Hadamard matrices, {share:.2%} as many", f"{cost['hadamard_additions']:,}"),
        ("values whose ranges are taken at run time", f"{cost['dynamic_channels']:,}"),
    ]
    return section("What a token costs at run time", table(("what", "a token"), rows))


def remarks(report: dict[str, Any]) -> Markup | None:
    """Warnings, what was skipped, and why sites differ from the recipe."""
    notes = Counter((site["site"], site["note"]) for site in report["sites"] if site["note"])
    skipped = report["coverage"]["skipped"]
    parts = []
    if report["warnings"]:
        parts.append(el("ul", *(el("li", warning) for warning in report["warnings"]), class_="warnings"))
    if skipped:
        rows = [(el("code", one["name"]), one["reason"]) for one in skipped]
        parts.append(table(("not compressed", "why"), rows, left=2, class_="box tall"))
    if notes:
        counted = [(site, str(count), note) for (site, note), count in notes.items()]
        parts.append(table(("site", "blocks", "why it differs from the recipe"), counted, left=3))
    return section("Warnings and what was left out", *parts) if parts else None


def origin(report: dict[str, Any]) -> Markup:
    """Calibration, time and memory, files and versions."""
    c = report["calibration"]
    dropped = f", {c['dropped']} dropped" if c["dropped"] else ""
    windows = f"{c['used']} of {c['requested']} windows of {c['seqlen']} tokens, {c['tokens']:,} tokens{dropped}"
    revision = report["base_model"]["revision"]
    rows = [
        ("calibration", f"{card.text_name(c['source'])}: {windows}"),
        ("sha256 of its token ids", el("code", c["fingerprint"])),
        ("base model's revision", el("code", revision) if revision else "a local folder"),
        ("licence of the base model", report["base_model"]["license"] or "not known"),
        ("made with", ", ".join(f"{name} {version}" for name, version in report["tool"].items())),
        ("time and memory", f"{report['seconds']:.1f} s, at most {report['peak_bytes'] / 1e6:,.0f} MB resident"),
    ]
    return section("How it was made", table((), rows, left=2))


def channel_ranges(blocks: Sequence[int], sites: Callable[[int], list[tuple[str, str, charts.Ranges]]]) -> Markup:
    """Figures of `blocks`; `sites` gives a block's (site, where it is, ranges)."""
    parts = []
    for block in blocks:
        figures = join(_site(block, *one) for one in sites(block))
        summary = el("summary", f"Block {block}")
        parts.append(el("details", summary, figures) if parts else el("details", summary, figures, open="open"))
    note = (
        "Each channel's minimum to maximum on the calibration tokens, in the model's own order and as reordered. Tinted: its "
        "cluster, which is what one grid has to span; thin lines are bounds of clusters."
    )
    return section("Channel ranges", el("p", note, class_="note"), *parts)


def _site(block: int, site: str, where: str, r: charts.Ranges) -> Markup:
    linear = charts.linear_to(r)
    scale = "" if linear is None else f" The axis is linear to ±{linear:.2g}, then logarithmic."
    if len(r.low) > charts.STEPS:
        scale += f" Neighbours are drawn together: {len(r.low):,} channels as {charts.STEPS} strokes."
    drawn = [_one_order(block, site, r, ordered=False)]
    if r.order is not None or r.sizes is not None:
        drawn.append(_one_order(block, site, r, ordered=True))
    caption = el("h3", f"{site}: {where}")
    return join([caption, el("p", scale.strip(), class_="note") if scale else "", el("div", *drawn, class_="figures")])


def _one_order(block: int, site: str, r: charts.Ranges, *, ordered: bool) -> Markup:
    state = "after" if ordered else "before" if r.order is not None else "not reordered"
    clusters = f", clusters: {len(r.sizes)}" if ordered and r.sizes is not None else ""
    drawn = charts.ranges(r, ordered=ordered, label=f"block {block}, {site}, {state}")
    return el("figure", el("figcaption", state + clusters), drawn)


def _block(name: str) -> int | None:
    """The decoder block that a module's path leads through."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
