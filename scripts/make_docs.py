"""Write docs/cli.md from the parser of `ptq`, and docs/api.md from the docstrings of what the four packages export.

usage: python scripts/make_docs.py

tests/ptq/test_docs.py fails when the pages in the repository are not these.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ptq", "rptq", "sparsegpt", "lowbit")
WIDTH = 100  # columns of help pages, and of signatures before they are broken
MADE = "Made by `scripts/make_docs.py`; change {where} and run it again.\n"

Definition = ast.FunctionDef | ast.ClassDef


def cli_page() -> str:
    """The help of `ptq` and of each verb, in the order of the parser."""
    from ptq.cli.parser import build_parser

    # argparse wraps at the terminal's width, and from Python 3.14 on it colours
    os.environ.update(COLUMNS=str(WIDTH), NO_COLOR="1")
    parser = build_parser()
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    pages = [("ptq", parser)] + [(f"ptq {name}", verb) for name, verb in verbs.items()]
    helps = [f"## {title}\n\n{_fenced(page.format_help(), 'text')}" for title, page in pages]
    return "\n".join(["# The command\n", MADE.format(where="the parser in `ptq/cli`"), *helps])


def api_page() -> str:
    """What each package exports, in the order of its `__all__`."""
    parts = ["# In Python\n", MADE.format(where="the docstrings")]
    for name in PACKAGES:
        package = importlib.import_module(name)
        parts.append(f"## {name}\n\n{_fenced(inspect.getdoc(package), 'text')}")
        parts += [_entry(package, exported) for exported in package.__all__]
    return "\n".join(parts)


def _entry(package: ModuleType, name: str) -> str:
    """One exported name: where it is, its signature, its docstring; of a class also what it defines itself."""
    thing = getattr(package, name)
    title = f"### {package.__name__}.{name}\n"
    if not inspect.isclass(thing) and not inspect.isfunction(thing):
        return f"{title}\n{_fenced(_value(name, thing), 'python')}"
    node = ast.parse(inspect.getsource(thing)).body[0]
    source = Path(inspect.getsourcefile(thing)).relative_to(ROOT).as_posix()
    return f"{title}\n`{source}`\n\n{_fenced(_described(node, ''), 'python')}"


def _value(name: str, value: Any) -> str:
    """A constant; of a mapping its keys, because the values are what the functions do."""
    return f"{name}: {' | '.join(map(repr, value))}" if isinstance(value, dict) else f"{name} = {value!r}"


def _described(node: Definition, indent: str) -> str:
    """A definition without its body: signature, docstring, and the fields and public members of a class."""
    inner, doc = indent + "    ", ast.get_docstring(node)
    lines = textwrap.indent(_signature(node), indent).splitlines()
    if doc:
        lines += textwrap.indent(f'"""{doc}"""' if "\n" not in doc else f'"""{doc}\n"""', inner).splitlines()
    if isinstance(node, ast.ClassDef):
        fields = [inner + ast.unparse(part) for part in node.body if isinstance(part, ast.AnnAssign)]
        lines += ["", *fields] if fields else []
        for member in _members(node):
            lines += ["", _described(member, inner)]
    return "\n".join(lines)


def _members(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """How one is made, then public methods and properties that say what they do."""
    for member in node.body:
        if isinstance(member, ast.FunctionDef):
            public = not member.name.startswith("_") and ast.get_docstring(member)
            if public or member.name == "__init__":
                yield member


def _signature(node: Definition) -> str:
    """As in the source: decorators, name, and arguments, one a line where they are too long for one."""
    marks = [f"@{ast.unparse(mark)}" for mark in node.decorator_list]
    if isinstance(node, ast.FunctionDef):
        made, returned = _arguments(node.args), f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return "\n".join([*marks, _joined(f"def {node.name}", made, f"{returned}:")])
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    return "\n".join([*marks, f"class {node.name}{f'({bases})' if bases else ''}:"])


def _arguments(given: ast.arguments) -> list[str]:
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + given.defaults
    parts = [_argument(arg, default) for arg, default in zip(plain, defaults)]
    if given.vararg:
        parts.append(f"*{ast.unparse(given.vararg)}")
    elif given.kwonlyargs:
        parts.append("*")
    parts += [_argument(arg, default) for arg, default in zip(given.kwonlyargs, given.kw_defaults)]
    return parts + ([f"**{ast.unparse(given.kwarg)}"] if given.kwarg else [])


def _argument(arg: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return ast.unparse(arg)
    return f"{ast.unparse(arg)}{' = ' if arg.annotation else '='}{ast.unparse(default)}"


def _joined(name: str, parts: list[str], end: str) -> str:
    line = f"{name}({', '.join(parts)}){end}"
    return line if len(line) <= WIDTH else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){end}"


def _fenced(text: str | None, language: str) -> str:
    return f"```{language}\n{(text or '').strip()}\n```\n"


PAGES = {"docs/cli.md": cli_page, "docs/api.md": api_page}


def main() -> None:
    """Write the pages."""
    for name, make in PAGES.items():
        (ROOT / name).write_text(make(), encoding="utf8")


if __name__ == "__main__":
    main()
