"""Make a recipe from the command line, from YAML or from Python."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ptq.errors import BadInput
from ptq.presets import METHODS, PRESETS, PRUNING_METHODS
from ptq.recipe import Recipe, to_dict
from ptq.recipe_check import check


def suggest(name: str, known) -> str:
    """`" (did you mean 'x'?)"` or the list of what is known."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(map(str, known))})"


def merge(base: Any, overrides: dict[str, Any], where: str = "recipe") -> Any:
    """A copy of the dataclass `base` with `overrides` applied recursively. An unknown key is a BadInput with a suggestion."""
    known = {f.name: getattr(base, f.name) for f in fields(base)}
    changes = {}
    for key, value in overrides.items():
        if key not in known:
            raise BadInput(f"{where}: unknown key {key!r}{suggest(key, known)}")
        nested = dataclasses.is_dataclass(known[key])
        if nested and not isinstance(value, dict):
            raise BadInput(
                f"{where}.{key}: expected a mapping with keys {', '.join(f.name for f in fields(known[key]))}, got {value!r}"
            )
        changes[key] = merge(known[key], value, f"{where}.{key}") if nested else value
    return replace(base, **changes)


def build(*, method: str = "rptq", preset: str | None = None, **overrides: Any) -> Recipe:
    """A validated recipe: the method's defaults, then the preset's bits, then `overrides` (nested dicts).

    Raises:
        BadInput: unknown method, preset or key (with a suggestion), or a value outside its range.
    """
    methods = METHODS | PRUNING_METHODS
    if not isinstance(method, str) or method not in methods:
        raise BadInput(f"unknown method {method!r}{suggest(method, methods)}")
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise BadInput(f"unknown preset {preset!r}{suggest(preset, PRESETS)}")
    recipe = merge(Recipe(method=method, preset=preset), methods[method])
    if preset is not None:
        recipe = merge(recipe, PRESETS[preset])
    return check(merge(recipe, overrides))


def load_yaml(path: str | Path) -> Recipe:
    """Read a recipe file. Keys as in `Recipe`; `method` and `preset` fill in what is not spelled out.

    Raises:
        BadInput: unreadable file, not a mapping, an unknown key or a bad value.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError) as err:
        raise BadInput(f"recipe {path}: cannot be read: {err}") from err
    except yaml.YAMLError as err:
        raise BadInput(f"recipe {path}: not YAML: {' '.join(str(err).split())}") from err
    if not isinstance(data, dict):
        raise BadInput(f"recipe {path}: expected a mapping at the top, got {type(data).__name__}")
    odd = [key for key in data if not isinstance(key, str)]
    if odd:
        raise BadInput(f"recipe {path}: unknown key {odd[0]!r}{suggest(odd[0], [f.name for f in fields(Recipe)])}")
    return build(**{"method": "rptq", **data})


def dump_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML text."""
    import yaml

    return yaml.safe_dump(to_dict(recipe), sort_keys=False)
