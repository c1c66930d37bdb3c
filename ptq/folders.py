"""Folders that a user names, and the JSON files in them. Nothing heavy, so that a bad path is refused at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ptq.errors import BadInput


def model_folder(path: str | Path) -> Path:
    """The path, if a model lies there. Raises BadInput otherwise."""
    folder = Path(path)
    if not folder.is_dir():
        raise BadInput(f"{path}: no such folder")
    if not (folder / "config.json").is_file():
        raise BadInput(f"{path}: not a model folder: it has no config.json")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises BadInput when it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except ValueError as err:
        raise BadInput(f"{path}: not JSON: {err}") from err
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
