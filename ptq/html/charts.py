"""Charts as inline SVG. Colours are classes of style.css, so that one drawing serves light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from statistics import median

import numpy as np

from ptq.html.markup import Markup, el, join
from ptq.plots import Ranges, linear_to

# A chart is as wide as a phone, in the units of its text: scaled to a column of a wider page, the text only grows.
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 340, 44, 334, 8, 118
STEPS = 2 * (RIGHT - LEFT)  # more channels than these are drawn together


def bar(share: float) -> Markup:
    """A bar of `share` (0 to 1) of its cell; what lies outside is cut."""
    width = 100 * min(1.0, max(0.0, share))
    rect = el("rect", width=_number(width), height=8, class_="bar")
    return el("svg", rect, viewBox="0 0 100 8", preserveAspectRatio="none", class_="cell", aria_hidden="true")


def by_block(
    points: Sequence[tuple[int, float, str]], *, label: str, write: Callable[[float], str], log: bool = False
) -> Markup:
    """One dot a module, and a line through the median of each block.

    points: (block, value at least 0, name of the module), in any order, not empty.
    log: the axis is logarithmic; zeros lie on its bottom. Without a value above 0 it is linear.
    Raises ValueError for a value that is negative or not a finite number.
    """
    values = [value for _, value, _ in points]
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise ValueError(f"{label}: {min(values)} to {max(values)}, expected finite numbers of at least 0")
    log = log and max(values) > 0
    ticks = _decades([value for value in values if value > 0]) if log else _steps(max(values))
    low, high = ticks[0], ticks[-1]
    last = max(block for block, _, _ in points)

    def x(block: int) -> float:
        return LEFT + 8 + (RIGHT - LEFT - 16) * (block / last if last else 0.5)

    def y(value: float) -> float:
        share = math.log(max(value, low) / low) / math.log(high / low) if log else value / high
        return BOTTOM - (BOTTOM - TOP) * share

    lines = [el("path", d=f"M{LEFT} {_number(y(tick))}H{RIGHT}", class_="rule") for tick in ticks]
    marks = [_text(LEFT - 4, y(tick) + 4, write(tick), "end") for tick in ticks]
    dots = [
        el(
            "circle",
            el("title", f"{name}: {write(value)}"),
            cx=_number(x(b)),
            cy=_number(y(value)),
            r=2.2,
            class_="dot",
        )
        for b, value, name in points
    ]
    ordered = sorted(points, key=lambda point: point[0])
    middle = [(b, median(v for _, v, _ in group)) for b, group in groupby(ordered, key=lambda point: point[0])]
    line = "M" + "L".join(f"{_number(x(b))} {_number(y(value))}" for b, value in middle)
    named = [_text(x(b), BOTTOM + 15, str(b), "middle") for b in sorted({0, last // 2, last})]
    named.append(_text((LEFT + RIGHT) / 2, BOTTOM + 30, "block", "middle"))
    return _svg([*lines, *marks, *dots, el("path", d=line, class_="line"), *named], BOTTOM + 36, label)


def ranges(r: Ranges, *, ordered: bool, label: str) -> Markup:
    """Each channel's range as a vertical stroke, before or after reordering, on one scale for both.

    After, each cluster lies behind, from its least minimum to its greatest maximum: what one grid has to span.
    Raises ValueError for a range that is not of finite numbers.
    """
    low, high = (r.low[r.order], r.high[r.order]) if ordered and r.order is not None else (r.low, r.high)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError(f"{label}: a range that is no finite number")
    C = len(low)
    squeeze = _squeeze(linear_to(r))
    least, most = min(0.0, float(low.min())), max(0.0, float(high.max()))
    span = (squeeze(most) - squeeze(least)) or 1.0

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (squeeze(value) - squeeze(least)) / span

    behind = _bands(low, high, r.sizes, y) if ordered and r.sizes is not None else []
    ticks = _apart([most, least, 0.0], y)
    marks = [_text(LEFT - 4, y(tick) + 4, f"{tick:.3g}", "end") for tick in ticks]
    zero = el("path", d=f"M{LEFT} {_number(y(0.0))}H{RIGHT}", class_="axis")
    strokes = el("path", d=_outline(low, high, y), class_="range")
    named = [_text(LEFT, BOTTOM + 14, "0", "start"), _text(RIGHT, BOTTOM + 14, f"{C:,} channels", "end")]
    return _svg([*behind, strokes, zero, *marks, *named], BOTTOM + 20, label)


def _outline(low: np.ndarray, high: np.ndarray, y: Callable[[float], float]) -> str:
    """The strokes as one closed path, along the maxima and back along the minima: so they join without seams."""
    C = len(low)
    starts = np.arange(min(C, STEPS)) * C // min(C, STEPS)  # [C] -> [S], S at most STEPS
    top, bottom = np.maximum.reduceat(high, starts), np.minimum.reduceat(low, starts)  # [C] -> [S]
    x = [_number(LEFT + (RIGHT - LEFT) * edge / C) for edge in (*starts.tolist(), C)]
    there = "".join(f"V{_number(y(value))}H{right}" for value, right in zip(top.tolist(), x[1:]))
    back = "".join(f"V{_number(y(value))}H{left}" for value, left in zip(bottom.tolist()[::-1], x[-2::-1]))
    return f"M{x[0]} {_number(y(float(top[0])))}{there}{back}Z"


def _bands(low: np.ndarray, high: np.ndarray, sizes: np.ndarray, y: Callable[[float], float]) -> list[Markup]:
    """Each cluster's box, and the bounds between them."""
    edges, found = np.concatenate([[0], np.cumsum(sizes)]).tolist(), []  # [G] -> [G + 1]
    bounds = (_number(LEFT + (RIGHT - LEFT) * edge / len(low)) for edge in edges[1:-1])
    for g, (start, stop) in enumerate(zip(edges[:-1], edges[1:])):
        if start < stop:
            top, bottom = y(float(high[start:stop].max())), y(float(low[start:stop].min()))
            width = (RIGHT - LEFT) * (stop - start) / len(low)
            box = {"x": LEFT + (RIGHT - LEFT) * start / len(low), "y": top, "width": width, "height": bottom - top}
            found.append(el("rect", **{key: _number(value) for key, value in box.items()}, class_=f"band{g % 2}"))
    lines = "".join(f"M{x} {TOP}V{BOTTOM}" for x in bounds)
    return [*found, el("path", d=lines, class_="edge")]


def _squeeze(linear: float | None) -> Callable[[float], float]:
    """The axis: linear, or beyond ±`linear` logarithmic, a decade as long as the way from 0 to `linear`."""
    if linear is None:
        return lambda value: value
    return lambda value: (
        value if abs(value) <= linear else math.copysign(linear * (1 + math.log10(abs(value) / linear)), value)
    )


def _steps(most: float) -> list[float]:
    """Ticks from 0 to at least `most`, at round numbers, five at most."""
    if most <= 0:
        return [0.0, 1.0]
    unit = 10.0 ** math.floor(math.log10(most))
    step = next(s * unit for s in (0.25, 0.5, 1.0, 2.5) if 4 * s * unit >= most)
    return [step * i for i in range(math.ceil(most / step) + 1)]


def _decades(values: Sequence[float]) -> list[float]:
    """Powers of ten around the values, at least two, at most about five."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    every = -(-(high - low) // 4)
    return [10.0**power for power in range(low, high + every, every)]


def _apart(ticks: Sequence[float], y: Callable[[float], float]) -> list[float]:
    """The ticks, earlier ones first, whose labels do not lie on one another."""
    found: list[float] = []
    for tick in ticks:
        if all(abs(y(tick) - y(other)) > 12 for other in found):
            found.append(tick)
    return found


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return el("text", text, x=_number(x), y=_number(y), text_anchor=anchor)


def _svg(parts: Sequence[Markup], height: int, label: str) -> Markup:
    return el("svg", join(parts), viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label, class_="chart")


def _number(value: float) -> str:
    """A coordinate, to a tenth of a unit."""
    return f"{round(value, 1):g}"
