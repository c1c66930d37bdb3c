"""What a run says while it works, on stderr, so that `--json -` leaves stdout to the result."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TextIO

NAME_WIDTH = 44


def module_line(row: dict[str, Any]) -> str:
    """One aligned line for a module of the report: name, bits, effective bits, relative error, seconds."""
    error = "-" if row["relative_error"] is None else f"{row['relative_error']:.3e}"
    bits = f"{row['bits']:>2} bits ({row['effective_bits']:5.2f} effective)"
    zeros = "" if row["sparsity"] is None else f"  {row['sparsity']:6.2%} zeros"
    return f"{row['name']:<{NAME_WIDTH}}  {bits}{zeros}  error {error:>9}  {row['seconds']:7.1f} s"


class Progress:
    """A bar on a terminal, a plain line every few seconds elsewhere, nothing when `quiet`.

    Args:
        quiet: print nothing at all.
        verbose: also print what is handed to `detail`.
        stream: where to print; stderr unless told.
        every: seconds between two plain lines.
    """

    def __init__(
        self, *, quiet: bool = False, verbose: bool = False, stream: TextIO | None = None, every: float = 5.0
    ) -> None:
        self.quiet, self.verbose, self.every = quiet, verbose, every
        self.stream = sys.stderr if stream is None else stream
        self.bar: Any = None

    def line(self, text: str) -> None:
        """Print one line, above the bar when there is one."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
            return
        print(text, file=self.stream, flush=True)

    def detail(self, text: str) -> None:
        """Print one line under -v only."""
        if self.verbose:
            self.line(text)

    def track(
        self, items: Iterable[Any], *, label: str = "block", total: int | None = None, start: int = 0
    ) -> Iterator[Any]:
        """Yield `items`, saying how far it got. `start` of `total` were done before (a resumed run)."""
        total = start + len(items) if total is None and isinstance(items, Sized) else total
        if self.quiet:
            yield from items
        elif self.stream.isatty() and self.bar is None:
            yield from self._bar(items, label, total, start)
        else:
            yield from self._plain(items, label, total, start)

    def _bar(self, items: Iterable[Any], label: str, total: int | None, start: int) -> Iterator[Any]:
        from tqdm import tqdm

        options = {"desc": label, "total": total, "initial": start, "dynamic_ncols": True, "leave": False}
        with tqdm(items, file=self.stream, **options) as self.bar:
            try:
                yield from self.bar
            finally:
                self.bar = None

    def _plain(self, items: Iterable[Any], label: str, total: int | None, start: int) -> Iterator[Any]:
        began = last = time.monotonic()
        for done, item in enumerate(items, start + 1):
            yield item
            now = time.monotonic()
            if now - last >= self.every:
                last = now
                self.line(f"{label}: {done}{f'/{total}' if total else ''}, {now - began:.0f} s")
