"""`ptq inspect --html`: one page that needs nothing else, says what report.json says, and lets no text become markup."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ptq.cli import main
from ptq.html import STYLE, charts
from ptq.html.markup import Markup, el
from ptq.plots import FILE, Ranges

VOID = {"meta"}
HOSTILE = '</td><script src="https://evil.example/x.js">alert(1)</script><img onerror=\'x\'>&lt;"'
EVALUATION = {
    "perplexity": 12.3456,
    "perplexity_stderr": 0.25,
    "kl": 0.0123,
    "top1_agreement": 0.9,
    "tokens": 1000,
    "protocol": {"protocol": "rptq", "text": "wikitext2/test", "join": "\n\n", "seqlen": 2048, HOSTILE: None},
}


class Page(HTMLParser):
    """Checks the nesting, and keeps the tables as text, the tags, the attributes and all text outside of <style>."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.tables, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def table(self, first: str) -> list[list[str]]:
        """The rows under the heading that begins with `first`."""
        return next(table[1:] for table in self.tables if table[0][0] == first)


@pytest.fixture
def inspect(tmp_path):
    """(folder, report as it should be, more options) -> the page; the folder itself stays as it is."""

    def inspect(folder, change=lambda report: None, *options) -> Page:
        copy = shutil.copytree(folder, tmp_path / "copy")
        report = json.loads((copy / "report.json").read_text())
        change(report)
        (copy / "report.json").write_text(json.dumps(report))
        assert main(["inspect", str(copy), "--html", str(tmp_path / "page.html"), *options]) == 0
        assert [path.name for path in tmp_path.glob("*page*")] == ["page.html"]
        return Page((tmp_path / "page.html").read_text(encoding="utf8"))

    return inspect


def refused(capsys, *arguments) -> str:
    capsys.readouterr()  # where a test is the first to need the model, what building it said
    assert main(["inspect", *map(str, arguments)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ptq: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "family, settings", [("opt", "W4A8"), ("llama", "fine"), ("llama", "2:4"), ("opt", "zeros in place")]
)
def test_the_page_says_what_the_report_says(family, settings, packed, inspect):
    folder = packed(family, settings)
    page, report = inspect(folder), json.loads((folder / "report.json").read_text())
    rows = page.table("module")
    assert [row[0] for row in rows] == [m["name"] for m in report["modules"]]
    for row, m in zip(rows, report["modules"]):
        assert row[1] == f"{m['shape'][0]} x {m['shape'][1]}" and row[2].split(",")[0] == str(m["bits"])
        # each number as it is printed, to the digits that are printed
        assert float(row[3]) == pytest.approx(m["effective_bits"], abs=6e-4)
        error = m["relative_error"]
        assert row[4] == "-" if error is None else float(row[4]) == pytest.approx(error, rel=6e-4)
        zeros = m["sparsity"]
        assert row[6] == "-" if zeros is None else row[6] == f"{zeros:.2%}" + (f" ({m['keep']})" if m["keep"] else "")
        assert row[7] == f"{m['seconds']:.2f}"
    sizes = {row[0]: int(row[1].replace(",", "")) for row in page.table("weight files")}
    assert list(sizes.values()) == list(report["sizes"].values())
    parts = [int(row[1].replace(",", "")) for row in page.table("in this folder")]
    assert sum(parts) == report["sizes"]["compressed_bytes"] and min(parts) > 0
    cost = [int(row[1].replace(",", "")) for row in page.table("what")]
    assert cost == list(report["run_time"].values())
    skipped = report["coverage"]["skipped"]
    assert page.table("not compressed") == [[one["name"], one["reason"]] for one in skipped]
    assert all(warning in page.text for warning in report["warnings"])
    assert report["calibration"]["fingerprint"] in page.text


def test_nothing_comes_from_outside_and_nothing_runs(packed, inspect):
    page = inspect(packed("opt", "W4A8"))
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"href", "src", "srcset", "action", "style", "xlink:href"} & names
    assert not [name for name in names if name.startswith("on")]
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    style = STYLE.read_text(encoding="utf8")
    assert "url(" not in style and "@import" not in style and "</" not in style


def hostile(report: dict) -> None:
    report["modules"][0] |= {"name": HOSTILE, "failure": HOSTILE}
    report["base_model"] |= {"source": HOSTILE, "model_type": HOSTILE, "license": HOSTILE, "revision": HOSTILE}
    report["sites"][0]["note"] = HOSTILE
    report["coverage"]["skipped"] = [{"name": HOSTILE, "reason": HOSTILE}]
    report["warnings"] = [HOSTILE, "half a pair \ud800"]
    report["recipe"] |= {"method": HOSTILE, "preset": HOSTILE, "seed": HOSTILE}
    report["tool"] = {HOSTILE: HOSTILE}


def test_hostile_text_stays_text(packed, inspect, tmp_path):
    (tmp_path / "e.json").write_text(json.dumps(EVALUATION))
    page = inspect(packed("opt", "W4A8"), hostile, "--eval", str(tmp_path / "e.json"))
    assert not {"script", "img"} & set(page.tags)
    assert page.table("module")[0][0].startswith(HOSTILE)
    # twice each: title (in the head and on the page), module, skipped, tool; once: type, licence, revision, note, warning, protocol
    assert page.text.count(HOSTILE) >= 14


def test_an_evaluation_carries_its_protocol(packed, inspect, tmp_path):
    (tmp_path / "e.json").write_text(json.dumps(EVALUATION))
    page = inspect(packed("opt", "W4A8"), lambda report: None, "--eval", str(tmp_path / "e.json"))
    assert [row[1] for row in page.table("measure")] == ["12.3456 ± 0.2500", "1,000", "0.01230", "90.00%"]
    said = dict(page.table("protocol"))
    assert said["text"] == '"wikitext2/test"' and said["join"] == '"\\n\\n"' and said["seqlen"] == "2048"


def test_tasks_alone_are_an_evaluation(packed, inspect, tmp_path):
    task = {"task": "piqa", "accuracy": 0.61, "accuracy_stderr": 0.02, "majority": 0.5, "items": 100, "rows": 1838}
    task |= {"sha256": "ab" * 32}
    other = task | {"task": HOSTILE, "accuracy_norm": 0.4, "accuracy_norm_stderr": None, "rows": 100}
    other |= {"perplexity": 7.5, "perplexity_stderr": 0.5, "sha256": None}
    (tmp_path / "e.json").write_text(json.dumps({"tasks": {"piqa": task, "x": other}}))
    page = inspect(packed("opt", "W4A8"), lambda report: None, "--eval", str(tmp_path / "e.json"))
    assert page.table("zero-shot task") == [
        ["piqa", "0.6100 ± 0.0200", "-", "0.5000", "-", "100 of 1,838", "abababababab"],
        [HOSTILE, "0.6100 ± 0.0200", "0.4000", "0.5000", "7.5000 ± 0.5000", "100", "-"],
    ]


def test_the_same_folder_gives_the_same_bytes_and_no_local_path(packed, tmp_path):
    folder = packed("opt", "W4A8")
    for name in "ab":
        assert main(["inspect", str(folder), "--html", str(tmp_path / name)]) == 0
    first = (tmp_path / "a").read_bytes()
    report = json.loads((folder / "report.json").read_text())
    assert first == (tmp_path / "b").read_bytes()
    assert (
        report["base_model"]["source"].encode() not in first and report["calibration"]["source"].encode() not in first
    )


def test_every_site_is_drawn_before_and_after(packed, inspect):
    folder = packed("opt", "W4A8")
    tensors = load_file(folder / FILE)
    labels = [value for name, value in inspect(folder).attributes if name == "aria-label" and "block" in value]
    for key in (name.removesuffix(".min") for name in tensors if name.endswith(".min")):
        _, block, site = key.split(".")
        states = ["before", "after"] if f"{key}.permutation" in tensors else ["not reordered"]
        assert [f"block {block}, {site}, {state}" in labels for state in states] == [True] * len(states)


def damage_ranges(folder):
    tensors = load_file(folder / FILE)
    tensors["blocks.0.R1.min"][0] = np.nan
    save_file(tensors, folder / FILE)


def damage_report(**change):
    def damage(folder):
        report = json.loads((folder / "report.json").read_text())
        (folder / "report.json").write_text(json.dumps({**report, **change}))

    return damage


@pytest.mark.parametrize(
    "damage, part",
    [
        (lambda folder: (folder / "report.json").unlink(), "no report.json, so nothing to show"),
        (damage_report(schema_version=2), "schema version 2, this release reads 1"),
        (damage_report(run_time={}), "damaged (KeyError: 'hadamard_additions')"),
        (damage_report(seconds="<b>"), "damaged (ValueError"),
        (damage_ranges, "a range that is no finite number"),
    ],
)
def test_a_folder_that_cannot_be_shown_leaves_no_page(damage, part, packed, tmp_path, capsys):
    folder = shutil.copytree(packed("opt", "W4A8"), tmp_path / "copy")
    damage(folder)
    assert part in refused(capsys, folder, "--html", tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_options_that_do_not_go_together(packed, tmp_path, capsys):
    folder = packed("opt", "W4A8")
    assert "goes onto the page of --html" in refused(capsys, folder, "--eval", "x")
    assert "no such file" in refused(capsys, folder, "--html", tmp_path / "p", "--eval", tmp_path / "gone")
    (tmp_path / "e.json").write_text("{}")
    assert "neither perplexity nor tasks" in refused(
        capsys, folder, "--html", tmp_path / "p", "--eval", tmp_path / "e.json"
    )
    assert "cannot be written" in refused(capsys, folder, "--html", tmp_path / "gone" / "p")
    assert "a folder" in refused(capsys, folder, "--html", tmp_path)


# --- charts


def test_text_becomes_markup_only_once():
    assert el("p", "<&", el("b", '"'), class_="x<") == '<p class="x&lt;">&lt;&amp;<b>&quot;</b></p>'
    assert isinstance(el("p"), Markup) and not isinstance(el("p") + "<", Markup)


def heights(svg: str) -> list[tuple[float, float]]:
    """(top, bottom) of each stroke of a range chart, from its outline: there along the maxima, back along the minima."""
    path = next(dict(a)["d"] for a in _elements(svg, "path") if dict(a)["class"] == "range")
    levels = [float(part.split("H")[0]) for part in path.strip("MZ").split("V")[1:]]
    half = len(levels) // 2
    return list(zip(levels[:half], levels[half:][::-1]))


def _elements(svg: str, tag: str):
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda name, attributes: found.append(attributes) if name == tag else None
    parser.feed(svg)
    return found


def test_ranges_are_drawn_to_scale_in_both_orders():
    low, high = np.array([-1.0, -4, -2], dtype=np.float32), np.array([1.0, 6, 0], dtype=np.float32)
    r = Ranges(low, high, np.array([2, 0, 1]), np.array([2, 1]))
    scale = (charts.BOTTOM - charts.TOP) / 10  # units a unit: from -4 to 6
    # coordinates are rounded to a tenth
    expected = [(charts.TOP + (6 - b) * scale, charts.TOP + (6 - a) * scale) for a, b in zip(low, high)]
    assert np.allclose(heights(charts.ranges(r, ordered=False, label="x")), expected, atol=0.06)
    after = charts.ranges(r, ordered=True, label="x")
    assert np.allclose(heights(after), [expected[i] for i in (2, 0, 1)], atol=0.06)
    bands = [{k: float(v) for k, v in map(tuple, a) if k != "class"} for a in _elements(after, "rect")]
    assert [band["height"] for band in bands] == pytest.approx([3 * scale, 10 * scale], abs=0.06)  # -2..1, -4..6
    assert bands[0]["width"] == pytest.approx(2 * bands[1]["width"], abs=0.11)


def test_more_channels_than_strokes_lose_no_extreme():
    high = np.random.default_rng(0).random(charts.STEPS * 3 + 7, dtype=np.float32)
    high[1001] = 15
    found = heights(charts.ranges(Ranges(-high, high, None, None), ordered=False, label="x"))
    assert len(found) == charts.STEPS
    assert min(top for top, _ in found) == charts.TOP and max(bottom for _, bottom in found) == charts.BOTTOM


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [0.3, 0.0], [1e-9, 3.0], [4.0, 4.0]])
@pytest.mark.parametrize("log", [False, True])
def test_dots_lie_inside_and_in_order(values, log):
    points = [(block, value, str(value)) for block, value in enumerate(values)]
    dots = [dict(a) for a in _elements(charts.by_block(points, label="x", write=str, log=log), "circle")]
    y = [float(dot["cy"]) for dot in dots]
    assert all(charts.TOP <= at <= charts.BOTTOM for at in y)
    # higher values lie higher, that is at lesser y
    assert all((a - b) * (v - w) <= 0 for a, v in zip(y, values) for b, w in zip(y, values))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_dot_has_a_place(value):
    with pytest.raises(ValueError, match="expected finite numbers"):
        charts.by_block([(0, value, "a")], label="x", write=str)
