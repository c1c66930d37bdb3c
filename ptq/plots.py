"""Channel ranges before and after reordering: the picture that explains RPTQ (arXiv 2304.01089, figures 1 and 4).

A finished folder keeps them in `channel_ranges.safetensors`: `blocks.<i>.<site>.min` and `.max` float32 [C] in the
model's own channel order; where it is reordered also `.permutation` int64 [C] and `.sizes` int64 [G], its clusters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptq.errors import BadInput

FILE = "channel_ranges.safetensors"
WHERE = {
    "R1": "attention norm output, into query, key, value",
    "q": "queries",
    "k": "keys",
    "v": "values",
    "R3": "attention output, into the output projection",
    "R4": "MLP norm output, into the up projection",
    "R5": "MLP activation, into the down projection",
}
BAR, BANDS, EDGE, INK = "#1f4e79", ("#f2b279", "#f9dcc0"), "#b5651d", "#333333"
# linear where the widest channel leaves the typical one visible, else linear only up to the typical one
LINEAR_UP_TO = 20.0


@dataclass(frozen=True)
class Ranges:
    """One site: low, high float32 [C] in the model's order; order int64 [C], sizes int64 [G] (sum C), or None."""

    low: np.ndarray
    high: np.ndarray
    order: np.ndarray | None
    sizes: np.ndarray | None


def draw_ranges(
    folder: str | Path,
    out_dir: str | Path,
    *,
    blocks: Sequence[int] | None = None,
    sites: Sequence[str] = ("R1", "R4", "R5"),
) -> list[Path]:
    """Draw one PNG per block and site into `out_dir` and return the files. Same ranges, same bytes.

    blocks: which decoder blocks; first, middle and last unless told. A site that a family lacks is left out.
    Raises BadInput: no or damaged ranges in `folder`, a block that is not there, nothing to draw, matplotlib missing.
    """
    tensors = read_ranges(Path(folder))
    there = sites_in(tensors)
    known = sorted({block for block, _ in there})
    blocks = first_middle_last(known) if blocks is None else blocks
    missing = sorted(set(blocks) - set(known))
    if missing:
        raise BadInput(f"{folder}: no ranges of block {missing[0]}; there are blocks {known[0]} to {known[-1]}")
    wanted = [(block, site) for block in blocks for site in sites if (block, site) in there]
    if not wanted:
        names = ", ".join(sorted({site for _, site in there}))
        raise BadInput(f"{folder}: no ranges of sites {', '.join(sites)}; there are {names}")
    _need_matplotlib()
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    files = []
    for block, site in wanted:
        files.append(Path(out_dir) / f"block-{block}-{site}.png")
        ranges = one_site(tensors, f"blocks.{block}.{site}", Path(folder) / FILE)
        _draw(ranges, f"block {block}, {site}: {WHERE.get(site, site)}", files[-1])
    return files


def first_middle_last(blocks: Sequence[int]) -> list[int]:
    """Three of the sorted `blocks`, or as many as there are."""
    return sorted({blocks[0], blocks[len(blocks) // 2], blocks[-1]})


def read_ranges(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder's channel ranges by name. Raises BadInput: there are none, or they cannot be read."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / FILE
    if not path.is_file():
        raise BadInput(f"{folder}: no {FILE}, so nothing to plot; a folder made by `ptq quantize` has one")
    try:
        tensors = load_file(path)
    except SafetensorError as err:
        raise BadInput(f"{path}: cannot be read: {err}; make the folder again") from err
    if not sites_in(tensors):
        raise BadInput(f"{path}: holds no channel ranges; make the folder again")
    return tensors


def sites_in(tensors: dict[str, np.ndarray]) -> set[tuple[int, str]]:
    """(block, site) of all that `read_ranges` read."""
    found = (re.fullmatch(r"blocks\.(\d+)\.(\w+)\.min", name) for name in tensors)
    return {(int(match[1]), match[2]) for match in found if match}


def one_site(tensors: dict[str, np.ndarray], key: str, path: Path) -> Ranges:
    """The site `key`, "blocks.<i>.<site>". Raises BadInput, naming `path`, for tensors that do not fit each other."""
    low, high, order, sizes = (tensors.get(f"{key}.{part}") for part in ("min", "max", "permutation", "sizes"))
    if high is None:
        raise BadInput(f"{path}: {key} has a min but no max; make the folder again")
    lengths = {len(low), len(high)}
    lengths |= {len(low) if order is None else len(order), len(low) if sizes is None else int(sizes.sum())}
    if len(lengths) != 1:
        raise BadInput(f"{path}: {key} has tensors for {sorted(lengths)} channels, expected one number; make it again")
    return Ranges(low, high, order, sizes)


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as err:
        raise BadInput("plots need matplotlib; install it with: pip install 'ptq-toolkit[compress]'") from err


def _draw(r: Ranges, title: str, file: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own style would change the bytes
        figure = Figure(figsize=(11, 3.6), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        before, after = figure.subplots(1, 2, sharey=True)
        low, high = (r.low, r.high) if r.order is None else (r.low[r.order], r.high[r.order])
        _bars(before, r.low, r.high)
        before.set_title("before: the model's own channel order", fontsize=10, color=INK)
        if r.sizes is not None:
            _clusters(after, low, high, r.sizes)
        _bars(after, low, high)
        after.set_title(_after_title(r), fontsize=10, color=INK)
        note = _scale(before, r)
        before.set_ylabel(f"activation, min to max{note}", fontsize=9, color=INK)
        after.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=3, fontsize=8, frameon=False)
        figure.suptitle(title, fontsize=11, fontweight="bold", color=INK)
        # without this key matplotlib writes its version into the file
        figure.savefig(file, metadata={"Software": None})


def _after_title(r: Ranges) -> str:
    order = "channels not reordered" if r.order is None else "channels reordered"
    return f"after: {order}" + ("" if r.sizes is None else f", clusters: {len(r.sizes)}")


def _bars(axes: Any, low: np.ndarray, high: np.ndarray) -> None:
    # one step fill is quick with 30,000 channels; its edge keeps a channel visible where it is narrower than a pixel
    x = np.arange(len(low) + 1)
    edges = {"facecolor": BAR, "edgecolor": BAR, "linewidth": 0.5}
    bottom, top = np.append(low, low[-1]), np.append(high, high[-1])
    axes.fill_between(x, bottom, top, step="post", label="one channel", zorder=3, **edges)
    axes.axhline(0, color=INK, linewidth=0.5, zorder=4)
    axes.set_xlim(0, len(low))
    axes.set_xlabel("channel", fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)


def _clusters(axes: Any, low: np.ndarray, high: np.ndarray, sizes: np.ndarray) -> None:
    """Each cluster's band, from its least minimum to its greatest maximum: what one grid has to span."""
    edges = np.concatenate([[0], np.cumsum(sizes)])  # [G] -> [G + 1]
    for g, (start, stop) in enumerate(zip(edges[:-1], edges[1:])):
        if start == stop:
            continue
        bottom, top = low[start:stop].min(), high[start:stop].max()
        label = "range of its cluster" if g == 0 else None
        axes.fill_between([start, stop], bottom, top, color=BANDS[g % 2], linewidth=0, label=label, zorder=2)
    for edge in edges[1:-1]:
        label = "cluster boundary" if edge == edges[1] else None
        axes.axvline(edge, color=EDGE, linewidth=0.4, alpha=0.45, label=label, zorder=1)


def _scale(axes: Any, r: Ranges) -> str:
    """Scale the shared y axis; returns the note that its label needs."""
    typical = linear_to(r)
    if typical is None:
        return ""
    axes.set_yscale("symlog", linthresh=typical)
    axes.yaxis.set_major_formatter("{x:g}")
    return f"\n(linear to ±{typical:.2g}, then logarithmic)"


def linear_to(r: Ranges) -> float | None:
    """The typical channel's reach, where an axis turns logarithmic; None if it can be linear throughout."""
    reach = np.maximum(np.abs(r.low), np.abs(r.high))
    typical = float(np.median(reach))
    return typical if typical > 0 and reach.max() > LINEAR_UP_TO * typical else None
