"""What the RPTQ table computes without a model: its recipes, the printed numbers, which cells are left, the page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import _page as pages
import _reproduce as table
from _published_rptq import LLAMA, OMNIQUANT_A25, OPT, RPTQ
from reproduce_rptq import ALL_4, LLAMA_TABLE, OPT_TABLE, PAPER_PRESETS, parse

from ptq.cli import quantize

ROWS = {row.name: row for row in OPT_TABLE.rows}
SHARED = {"protocol": "rptq", "calib": "wikitext2,ptb,c4", "nsamples": 128, "seqlen": 2048, "windows": None}
FACTS = {"cpu": "C", "cores": 2, "threads": 1, "python": "3", "torch": "2", "transformers": "5", "ptq": "0"}


def record(model="m", row="W4A4KV4-rptq+", seed=0, bits=(4.5, 4.25, None), **texts):
    """A finished record; texts: name -> perplexity, or why there is none."""
    results = {name: {"failed": v} if isinstance(v, str) else {"perplexity": v} for name, v in texts.items()}
    cell = {"model": model, "row": row, "seed": seed, "weights": "w", "options": table.listed(ROWS[row])}
    cell |= {"recipe": table.recipe_of(OPT_TABLE, ROWS[row])}
    cell |= {} if row == "full" else {"bits": dict(zip(pages.BITS, bits))}
    return cell | {"made_with": FACTS, "texts": results}


def recipe(row):
    """The recipe that `ptq quantize` would run for this row."""
    parser = argparse.ArgumentParser()
    quantize.add(parser.add_subparsers())
    return quantize.recipe_from_args(parser.parse_args(["quantize", "m", "--out", "o", *ROWS[row].options]))


def cells(page):
    """First cell of a line -> its other cells, without the rule below the heading."""
    found = (line.split("|") for line in page.splitlines() if line.startswith("| ") and not line.startswith("| --"))
    return {first.strip(): [one.strip() for one in rest] for _, first, *rest, _ in found}


@pytest.mark.parametrize("row", [name for name in ROWS if name != "full"])
def test_every_row_is_a_recipe_under_its_preset(row):
    preset, method = row.split("-", 1)
    made = recipe(row)
    assert made.preset == preset and method.startswith(made.method) and (made.method == "rptq+") == ("+" in method)
    assert made.activations.grid == "cluster" or "static" not in row


def test_the_rows_of_four_bits_everywhere_differ_in_what_their_names_say():
    assert recipe(f"{ALL_4}-rptq+").activations.grid == "tile"
    for name in ("rtn", "gptq", "smoothquant"):
        made = recipe(f"{ALL_4}-{name}")
        assert made.activations.grid == "token" and made.weights.groups == 64
    half, two_of_4 = recipe(f"{ALL_4}-rptq+50"), recipe(f"{ALL_4}-rptq+2:4")
    assert half.pruning.sparsity == 0.5 and half.pruning.keep is None and half.weights.act_order
    assert two_of_4.pruning.keep == "2:4" and not two_of_4.weights.act_order
    assert half.pruning.storage == two_of_4.pruning.storage == "packed"
    assert half.activations == two_of_4.activations == recipe(f"{ALL_4}-rptq+").activations


def test_the_printed_numbers_are_whole_and_belong_to_rows():
    assert set(RPTQ) == set(OMNIQUANT_A25) == set(OPT_TABLE.texts)
    assert {*RPTQ["wikitext2"]} == {"FP16", *PAPER_PRESETS}
    for line in OPT_TABLE.printed:
        assert line.beside is None or line.beside in ROWS
        assert line.models in (OPT, LLAMA) and len(line.numbers.split()) == len(line.models)
        # one peer printed "NaN" where its own rerun of another broke down
        assert all(number in ("-", "NaN") or float(number) > 1 for number in line.numbers.split())


def test_the_printed_lines_lie_beside_their_rows():
    def printed(text, row, *models):
        return pages.printed_lines(OPT_TABLE, text, row, models)

    small, large = "facebook/opt-1.3b", "facebook/opt-66b"
    assert printed("ptb", "W4A4-rptq", large) == [["RPTQ W4A4 (RPTQ's README)", "18.87"]]
    assert printed("c4", "full", small, "m") == [["full precision (RPTQ's README)", "14.72", "-"]]
    assert printed("wikitext2", f"{ALL_4}-rptq", small) == []
    assert printed("wikitext2", f"{ALL_4}-rptq", large) == [["RPTQ W4A4 (OmniQuant, Table A25)", "11.16"]]
    assert printed("wiki.test.raw@0", "full", small) == []
    quarot = printed("wikitext2", f"{ALL_4}-quarot", "huggyllama/llama-7b", "meta-llama/Meta-Llama-3-8B")
    assert ["QuaRot, GPTQ (FlatQuant's README)", "-", "8.16"] in quarot
    assert ["QuaRot (QServe's README)", "6.34", "8.33"] in quarot
    below = printed("wikitext2", None, "meta-llama/Llama-2-7b-hf")
    assert ["FlatQuant, GPTQ (FlatQuant's README)", "5.78"] in below
    assert ["SpinQuant (SpinQuant's README)", "5.9"] in below


def test_the_page_of_one_model_has_ratios_and_bits():
    records = [
        record(row="full", seed=None, wikitext2=20.0),
        record(seed=0, wikitext2=21.0),
        record(seed=1, wikitext2=23.0, bits=(4.7, 4.25, None)),
        record(row="W4A8-rptq", wikitext2="eval: exit 4"),
    ]
    page = pages.page(OPT_TABLE, records, SHARED, "python x")
    found = cells(page)
    assert found["row"] == ["m", "ratio", "weight bits", "activation bits", "KV bits"]
    assert found["full precision"] == ["20.00", "1.000", "-", "-", "-"]
    assert found["RPTQ+ W4A4KV4"] == ["22.00 ± 1.41 (2)", "1.100", "4.60", "4.25", "16.00"]
    assert found["RPTQ W4A8"][:2] == ["n/a", "-"] and "n/a: W4A8-rptq of m, seed 0, wikitext2: eval: exit 4." in page
    assert "README" not in page and "## Effective bits" not in page


def test_a_ratio_needs_full_precision_of_the_same_text():
    records = [record(row="full", seed=None, ptb=20.0), record(wikitext2=21.0)]
    assert pages.ratio(records, "wikitext2", "m", "W4A4KV4-rptq+") == "-"


def test_the_page_of_several_models_sets_printed_numbers_below_ours_and_bits_apart():
    opt = "facebook/opt-6.7b"
    records = [
        record(opt, "full", None, wikitext2=10.861),
        record(opt, "W4A4-rptq", wikitext2=11.9, bits=(4.25, 4.0, 4.0)),
        record("mine", "W4A4-rptq", wikitext2=30.0),
    ]
    page = pages.page(OPT_TABLE, records, SHARED, "python x")
    ours, bits = page.split("## Effective bits")
    found = cells(ours)
    assert found["row"] == [opt, "mine"]
    assert found["full precision"] == found["full precision (RPTQ's README)"] == ["10.86", "-"]
    assert found["RPTQ W4A4"] == ["11.90", "30.00"] and found["RPTQ W4A4 (RPTQ's README)"] == ["12.00", "-"]
    assert found["OmniQuant W4A4 (OmniQuant, Table A25)"] == ["12.24", "-"]
    assert cells(bits) == {"row": [opt, "mine"], "RPTQ W4A4": ["4.25 / 4.00 / 4.00", "4.50 / 4.25 / 16.00"]}


def test_the_page_says_whether_the_papers_settings_are_its_own():
    records = [record("facebook/opt-6.7b", "full", None, wikitext2=10.861)]
    for shared, held in (
        (SHARED, True),
        (SHARED | {"mode": "random"}, True),
        (SHARED | {"mode": "first"}, False),
        (SHARED | {"windows": 4}, False),
    ):
        page = pages.page(OPT_TABLE, records, shared, "python x")
        assert ("not the settings of this table" not in page) == held and "the settings of this table" in page
        assert ("first windows" in page) == (shared.get("mode") == "first")


class Subprocesses:
    """Stands in for ptq: keeps the words of each call and writes what its verb would."""

    def __init__(self, failing=()):
        self.calls, self.failing = [], failing

    def __call__(self, words, args):
        words = list(map(str, words))
        self.calls.append(words)
        if words[0] in self.failing:
            return 4, "too bad"
        if words[0] == "eval":
            Path(words[words.index("--json") + 1]).write_text(json.dumps({"perplexity": 12.5}), encoding="utf8")
        else:
            out = Path(words[words.index("--out") + 1])
            out.mkdir()
            report = {"seconds": 1.0, "bits": {**dict.fromkeys(pages.BITS, 4.5), "softmax": 16}}
            (out / "report.json").write_text(json.dumps(report), encoding="utf8")
        return 0, ""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Measure a made-up model with a stand-in for ptq; returns (exit status, verbs that were run)."""
    model, text = tmp_path / "model", tmp_path / "text.txt"
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf8")
    (model / "model.safetensors").write_bytes(b"weights")
    text.write_text("words", encoding="utf8")
    common = ["--model", str(model), "--calib", str(text), "--device", "cpu", "--offline", "--out", str(tmp_path)]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def measured(*words, failing=()):
        stand_in = Subprocesses(failing)
        monkeypatch.setattr(table, "run", stand_in)
        status = table.main(*parse([*common, "--texts", str(text), *words]))
        return status, [words[0] for words in stand_in.calls]

    return measured


def test_finished_cells_are_skipped_and_failed_ones_tried_again(call, tmp_path, capsys):
    rows = ("--rows", "full", "W4A8-rptq", "--seeds", "0", "1")
    assert call(*rows, failing=("quantize",)) == (0, ["eval", "quantize", "quantize"])
    assert "quantize: exit 4: too bad" in capsys.readouterr().out
    assert call(*rows) == (0, ["quantize", "eval", "quantize", "eval"])
    assert call(*rows) == (0, [])
    assert "model, RPTQ W4A8, seed 1: there already" in capsys.readouterr().err
    saved = json.loads((tmp_path / "rptq.json").read_text(encoding="utf8"))
    assert [(one["row"], one["seed"]) for one in saved["rows"]] == [("full", None), ("W4A8-rptq", 0), ("W4A8-rptq", 1)]
    assert saved["rows"][1]["bits"] == dict.fromkeys(pages.BITS, 4.5) and saved["rows"][1]["seconds_quantize"] == 1.0


def test_another_mode_of_calibration_is_another_table(call, capsys):
    assert call("--rows", "full", "--mode", "first")[0] == 0
    assert call("--rows", "full") == (2, [])
    assert "made with mode first, not None: give another --name" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["first", "random", None])
def test_the_mode_reaches_the_recipe_if_it_was_given(monkeypatch, tmp_path, mode):
    stand_in = Subprocesses()
    monkeypatch.setattr(table, "run", stand_in)
    chosen, args = parse(["--mode", mode] if mode else [])
    table.compress(chosen, tmp_path, tmp_path / "out", ROWS["W4A16-rptq"], 1, args)
    told = [word for word in stand_in.calls[0] if word.startswith("calibration.mode")]
    assert told == ([f"calibration.mode={mode}"] if mode else [])


def test_a_mix_of_files_is_labelled_file_by_file(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name, encoding="utf8")
    mix = f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'},c4"
    first, second, third = table.label(mix).split(",")
    assert first.startswith("a.txt@") and second.startswith("b.txt@") and third == "c4"
    assert table.shown(mix) == "a.txt,b.txt,c4" and table.label("wikitext2,ptb,c4") == "wikitext2,ptb,c4"


def test_each_table_has_its_own_models_texts_and_rows():
    chosen, args = parse([])
    assert chosen is OPT_TABLE and args.model == list(OPT) and args.rows == list(ROWS) and args.name == "rptq"
    chosen, args = parse(["--table", "llama"])
    assert chosen is LLAMA_TABLE and args.model == list(LLAMA) and args.texts == ["wikitext2"]
    assert args.name == "rptq-llama" and args.rows[0] == "full" and f"{ALL_4}-quarot" in args.rows
    assert not any(row.startswith(f"{preset}-") for preset in PAPER_PRESETS for row in args.rows)
    assert "--table llama" in table.command_of(chosen, args)


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        parse(["--rows", "W4A5-rptq"])
    assert refused.value.code == 2 and "W4A8-rptq" in capsys.readouterr().err
