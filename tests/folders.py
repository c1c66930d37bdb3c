"""What a run leaves on disk."""

from __future__ import annotations

from pathlib import Path

# These tell of one run, not of its result: times, peak memory.
OF_THE_RUN = {"report.json", "README.md"}


def contents(folder: Path) -> dict[str, bytes]:
    """File name -> bytes, of all files that tell of the result."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in OF_THE_RUN}
