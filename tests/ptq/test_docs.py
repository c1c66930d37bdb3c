"""The pages that scripts/make_docs.py makes are those in docs, and say something of everything that is exported."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
make_docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_docs)


@pytest.fixture(autouse=True)
def _another_terminal(monkeypatch):
    """No page may depend on it; monkeypatch puts back what making a page sets."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "")


@pytest.mark.parametrize("name", make_docs.PAGES)
def test_pages_are_up_to_date(name):
    there = (ROOT / name).read_text(encoding="utf8")
    assert there == make_docs.PAGES[name](), f"{name} is behind: run python scripts/make_docs.py"


@pytest.mark.parametrize("package", make_docs.PACKAGES)
def test_every_exported_name_has_a_docstring(package):
    module = importlib.import_module(package)
    things = {name: getattr(module, name) for name in module.__all__}
    assert not [name for name, thing in things.items() if callable(thing) and not thing.__doc__]


def test_signatures_are_those_of_the_source():
    source = "@property\ndef f(a, /, b: int, *c, d='x', e: tuple[int, str] = (1, 'y'), **g) -> None:\n    '''Doc.'''"
    node = make_docs.ast.parse(source).body[0]
    wanted = "@property\ndef f(a, b: int, *c, d='x', e: tuple[int, str] = (1, 'y'), **g) -> None:"
    assert make_docs._described(node, "") == f'{wanted}\n    """Doc."""'
