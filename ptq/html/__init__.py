"""One run as one HTML page: no script, nothing from outside, and every word out of a checkpoint escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptq import card, plots
from ptq.errors import BadInput
from ptq.html import sections
from ptq.html.markup import Markup, el, join
from ptq.ledger import write_whole
from ptq.report import SCHEMA_VERSION

STYLE = Path(__file__).with_name("style.css")
# What a damaged report or damaged ranges can make of code that reads them as if they were whole.
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def write_page(folder: Path, file: Path, report: dict[str, Any], evaluation: dict[str, Any] | None = None) -> None:
    """Write the page of a compressed `folder` and its `report` (report.json) into `file`, whole or not at all.

    evaluation: what `ptq eval --json` wrote. Same folder, same bytes.
    Raises BadInput: no report, one of another schema version or damaged, damaged ranges, or a place where no file can be.
    """
    if not (folder / "report.json").is_file():
        raise BadInput(f"{folder}: no report.json, so nothing to show; a folder that ptq made has one")
    if report.get("schema_version") != SCHEMA_VERSION:
        version = report.get("schema_version")
        raise BadInput(f"{folder}/report.json: schema version {version!r}, this release reads {SCHEMA_VERSION}")
    if file.is_dir() or not file.parent.is_dir():
        raise BadInput(f"--html {file}: cannot be written: {'a folder' if file.is_dir() else 'no such folder'}")
    if evaluation is not None and not {"perplexity", "tasks"} & evaluation.keys():
        raise BadInput("the evaluation holds neither perplexity nor tasks; give what `ptq eval --json FILE` wrote")
    try:
        text = page(folder, report, evaluation)
    except DAMAGE as err:
        what = f"{type(err).__name__}: {' '.join(str(err).split())[:200]}"
        raise BadInput(f"{folder}: its report, ranges or evaluation are damaged ({what}); make them again") from err
    write_whole(file, text.encode("utf8", "backslashreplace"))  # JSON can hold half a surrogate pair, UTF-8 cannot


def page(folder: Path, report: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    """The whole page. Raises BadInput for ranges that cannot be read, and any of DAMAGE."""
    parts = [
        sections.head(report),
        sections.evaluation(evaluation) if evaluation is not None else None,
        sections.bits(report),
        sections.sizes(report),
        sections.blocks(report),
        sections.modules(report),
        _ranges(folder),
        sections.run_time(report),
        sections.remarks(report),
        sections.origin(report),
    ]
    # the policy holds even if a browser should ever find markup where there is none
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = el(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        el("title", card.title(report)),
        el("style", Markup(STYLE.read_text(encoding="utf8"))),
    )
    body = el("body", join(Markup(part + "\n") for part in parts if part is not None))
    return "<!DOCTYPE html>\n" + el("html", head, body, lang="en") + "\n"


def _ranges(folder: Path) -> Markup | None:
    """Channel ranges of the first, middle and last block, if the run took any."""
    if not (folder / plots.FILE).is_file():
        return None
    tensors = plots.read_ranges(folder)
    there = plots.sites_in(tensors)

    def sites(block: int) -> list[tuple[str, str, plots.Ranges]]:
        names = [site for site in plots.WHERE if (block, site) in there]
        path = folder / plots.FILE
        return [(name, plots.WHERE[name], plots.one_site(tensors, f"blocks.{block}.{name}", path)) for name in names]

    return sections.channel_ranges(plots.first_middle_last(sorted({block for block, _ in there})), sites)
