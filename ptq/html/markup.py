"""HTML that is safe by construction: text becomes markup only through here, and is escaped on the way."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is markup already; any other str is escaped when it enters an element."""


def el(tag: str, *children: str, **attributes: object) -> Markup:
    """One element. Of attribute names the last underscore is left out (`class_`) and others become hyphens (`aria_label`)."""
    names = (name.removesuffix("_").replace("_", "-") for name in attributes)
    said = "".join(f' {name}="{html.escape(str(value))}"' for name, value in zip(names, attributes.values()))
    return Markup(f"<{tag}{said}>{join(children)}</{tag}>")


def join(children: Iterable[str]) -> Markup:
    """Children one after the other, each escaped unless it is markup."""
    return Markup("".join(child if isinstance(child, Markup) else html.escape(child) for child in children))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, class_: str = "box") -> Markup:
    """A table that scrolls in a box of its own; all but the `left` first columns are numbers, aligned to the right."""

    def line(tag: str, cells: Sequence[str]) -> Markup:
        return el("tr", *(el(tag, c, class_="n") if i >= left else el(tag, c) for i, c in enumerate(cells)))

    body = join(Markup(line("td", row) + "\n") for row in rows)
    whole = el("table", el("thead", line("th", head)) if head else "", el("tbody", body))
    # a box that scrolls has to be reachable without a mouse
    return el("div", whole, class_=class_, tabindex=0)
