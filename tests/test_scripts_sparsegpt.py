"""What the pruning scripts compute without a model: the paper's table, which rows are left, the page, the column loop."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import _page as pages
import _reproduce as table
import bench_prune
from _published import MODELS, PERPLEXITY
from peers.column_loop import prune_by_columns
from reproduce_sparsegpt import TABLE, parse

ROWS = {row.name: row for row in TABLE.rows}
SHARED = {"protocol": "sparsegpt", "calib": "c4", "nsamples": 128, "seqlen": 2048, "windows": None}
FACTS = {"cpu": "C", "cores": 2, "threads": 1, "python": "3", "torch": "2", "transformers": "5", "ptq": "0"}


def record(model="m", row="sparsegpt-50", seed=0, **texts):
    """A finished record; texts: name -> perplexity, or why there is none."""
    results = {name: {"failed": v} if isinstance(v, str) else {"perplexity": v} for name, v in texts.items()}
    options = table.listed(ROWS[row])
    cell = {"model": model, "row": row, "seed": seed, "weights": "w", "options": options}
    cell |= {"recipe": table.recipe_of(TABLE, ROWS[row])}
    return cell | {"made_with": FACTS, "texts": results}


def oracle(W, H, *, sparsity=None, keep=None, block, damp=0.01):
    """Optimal brain surgery with an explicit inverse of what is left of H for every column: no factor, no lazy update."""
    W, H = W.double().clone(), H.double()
    H = H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    C = W.shape[1]
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(C)]
    pruned = torch.zeros_like(W, dtype=torch.bool)
    width = block if keep is None else keep[1]
    for j in range(C):
        if j % width == 0:
            columns = range(j, min(j + width, C))
            score = torch.stack([W[:, k] ** 2 / inverses[k][0, 0] for k in columns], 1)  # [R, width]
            if keep is None:
                threshold = sorted(score.flatten().tolist())[int(score.numel() * sparsity)]
                pruned[:, j : j + width] = score <= threshold
            else:
                rank = score.argsort(1).argsort(1)
                pruned[:, j : j + width] = rank < keep[1] - keep[0]
        for r in range(W.shape[0]):
            if pruned[r, j]:
                W[r, j:] -= W[r, j] / inverses[j][0, 0] * inverses[j][0]
                W[r, j] = 0
    return W


@pytest.mark.parametrize(
    "pattern", [{"sparsity": 0.5}, {"sparsity": 0.3}, {"keep": (2, 4)}, {"keep": (1, 4)}, {"keep": (4, 8)}]
)
def test_the_column_loop_is_optimal_brain_surgery(pattern):
    W, H = bench_prune.random_layer(5, 24, seed=3)
    found = prune_by_columns(W, H, **pattern, block=8)
    expected = oracle(W, H, **pattern, block=8)
    assert torch.equal(found == 0, expected == 0)
    # float32 with three factorizations of a well-conditioned H of 24 channels
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


def test_the_column_loop_counts_as_the_paper_does():
    W, H = bench_prune.random_layer(6, 16)
    assert (prune_by_columns(W, H, sparsity=0.5, block=16) == 0).sum() == 6 * 16 // 2 + 1
    groups = (prune_by_columns(W, H, keep=(2, 4)) == 0).view(6, 4, 4).sum(-1)  # [R, C] -> [R, groups, m] -> [R, groups]
    assert (groups == 2).all()


def test_the_random_layer_is_positive_definite_and_correlated():
    _, H = bench_prune.random_layer(3, 64)
    assert torch.linalg.eigvalsh(H.double()).min() > 0
    spread = H.diagonal().sqrt()
    correlation = H / spread / spread[:, None] - torch.eye(64)
    assert correlation.abs().max() > 0.3


@pytest.mark.parametrize("text", PERPLEXITY)
def test_the_published_table_is_whole(text):
    for row, line in PERPLEXITY[text].items():
        assert row in ROWS and len(line.split()) == len(MODELS)
        assert all(value == "-" or float(value) > 1 for value in line.split())
    numbers = {row: [None if v == "-" else float(v) for v in line.split()] for row, line in PERPLEXITY[text].items()}
    for model in range(len(MODELS)):
        one = {row: values[model] for row, values in numbers.items()}
        assert one["magnitude-50"] > one["sparsegpt-50"]
        if one["sparsegpt-2:4"] is not None:
            assert one["sparsegpt-2:4"] > one["sparsegpt-4:8"] > one["sparsegpt-50"]


def published(text, row, model):
    """As printed, "-" if nothing was."""
    found = pages.printed_lines(TABLE, text, row, [model])
    return found[0][1] if found else "-"


def test_published_numbers_are_found_by_model_row_and_text():
    assert published("wikitext2", "sparsegpt-50", "facebook/opt-125m") == "36.85"
    assert published("c4", "sparsegpt-2:4", "facebook/opt-66b") == "12.25"
    assert published("ptb", "sparsegpt-2:4", "facebook/opt-125m") == "-"
    assert published("wikitext2", "best-50", "facebook/opt-125m") == "-"
    assert published("wikitext2", "full", "opt-125m") == "-"
    assert published("wiki.test.raw@0", "full", "facebook/opt-125m") == "-"


def test_only_rows_that_calibrate_have_seeds():
    plan = table.planned([ROWS["full"], ROWS["magnitude-50"], ROWS["sparsegpt-2:4"]], [0, 7])
    assert [(row.name, seed) for row, seed in plan] == [
        ("full", None),
        ("magnitude-50", None),
        ("sparsegpt-2:4", 0),
        ("sparsegpt-2:4", 7),
    ]


def test_a_finished_text_is_measured_once_and_a_failed_one_again():
    assert list(table.finished_texts(record(a=36.9, b="exit 4"))) == ["a"]
    assert table.finished_texts(None) == {}


def test_records_of_other_options_or_other_weights_are_dropped(capsys):
    stale = record(seed=1, a=1.5) | {"recipe": "of another release"}
    gone = record(seed=2, a=1.5) | {"row": "a row of old"}
    moved = record(seed=3, a=1.5) | {"weights": "other"}
    elsewhere = record("another", a=1.5) | {"weights": "other"}
    good = record(a=1.5)
    records = {table.key(one): one for one in (good, stale, gone, moved, elsewhere)}
    assert list(table.still_hold(TABLE, records, "m", "w").values()) == [good, elsewhere]
    assert capsys.readouterr().err.count("dropped") == 3


def test_records_come_back_by_cell_and_only_under_the_same_settings(tmp_path):
    path = tmp_path / "t.json"
    assert table.read_records(path, SHARED) == {}
    rows = [record(a=36.9), record(row="full", seed=None, a=27.7)]
    path.write_text(json.dumps({"settings": SHARED, "rows": rows}), encoding="utf8")
    found = table.read_records(path, SHARED)
    assert found == {("m", "sparsegpt-50", 0): rows[0], ("m", "full", None): rows[1]}
    # what comes back from JSON must count as made with the row's options
    assert table.still_hold(TABLE, found, "m", "w") == found
    with pytest.raises(table.CannotGoOn, match="nsamples 128, not 64"):
        table.read_records(path, SHARED | {"nsamples": 64})


def test_another_file_is_another_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one", encoding="utf8")
    first = table.label(str(path))
    path.write_text("two", encoding="utf8")
    assert first.startswith("text.txt@") and table.label(str(path)) != first
    assert table.label("wikitext2") == "wikitext2"


def test_the_page_sets_the_papers_numbers_below_ours():
    opt = "facebook/opt-125m"
    records = [
        record(opt, "full", None, wikitext2=27.661),
        record(opt, seed=0, wikitext2=36.0),
        record(opt, seed=1, wikitext2=38.0),
        record("mine", seed=0, wikitext2="eval: exit 4"),
    ]
    lines = pages.page(TABLE, records, SHARED, "python x").splitlines()
    rows = {
        cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (x.split("|") for x in lines) if len(cells) > 2
    }
    assert rows["row"] == [opt, "mine"]
    assert rows["full precision"] == ["27.66", "-"] and rows["full precision (paper)"] == ["27.66", "-"]
    assert rows["SparseGPT 50%"] == ["37.00 ± 1.41 (2)", "n/a"] and rows["SparseGPT 50% (paper)"] == ["36.85", "-"]
    assert "ADMM + PCG 50%" not in rows and "SparseGPT 2:4 (paper)" not in rows
    assert any(line.startswith("n/a: sparsegpt-50 of mine") and "eval: exit 4" in line for line in lines)
    assert not any("not the settings of this table" in line for line in lines)
    other = pages.page(TABLE, records, SHARED | {"windows": 4}, "python x")
    assert "not the settings of this table" in other


def test_the_arguments_refuse_an_unknown_row_and_two_models_of_one_name(tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        parse(["--rows", "sparsegpt-51"])
    assert refused.value.code == 2 and "sparsegpt-50" in capsys.readouterr().err
    for parent in ("a", "b"):
        (tmp_path / parent / "model").mkdir(parents=True)
    with pytest.raises(SystemExit) as refused:
        parse(["--model", str(tmp_path / "a/model"), "--model", str(tmp_path / "b/model")])
    assert refused.value.code == 2 and "two models are called model" in capsys.readouterr().err


def test_a_childs_peak_is_its_own_and_its_failure_says_why(tmp_path):
    args = SimpleNamespace(threads=1)
    held = torch.ones(60_000_000)  # 240 MB here, which the kernel would count as the child's
    small = bench_prune.run_child([sys.executable, "-S", "-c", "pass"], args, tmp_path)
    large = bench_prune.run_child([sys.executable, "-S", "-c", "x = b'1' * 100_000_000"], args, tmp_path)
    assert small["peak_resident_bytes"] < 60e6 < 100e6 < large["peak_resident_bytes"] < 4 * held.numel()
    with pytest.raises(bench_prune.CannotMeasure, match="status 3: too bad"):
        bench_prune.run_child([sys.executable, "-S", "-c", "print('too bad'); raise SystemExit(3)"], args, tmp_path)


def end_to_end(evaluated=True):
    """Made-up measurements of ours and a peer in the shape of `measure_end_to_end`."""
    protocol = {"windows": 24, "seqlen": 512, "text": "t", "sha256": "0" * 64, "protocol": "plain"}
    rows = []
    for name, seconds, perplexity in (("sparsegpt", 50.0, 60.0), ("llm-compressor", 100.0, 63.0)):
        row = {"pattern": "50%", "name": name, "seconds_process": seconds, "seconds_compress": seconds - 10}
        row |= {"pruned_weights": 210, "zeros": 0.5, "peak_resident_bytes": int(seconds * 1e7), "runs": [{}]}
        row |= {"evaluation": {"perplexity": perplexity, "perplexity_stderr": 4.0}} if evaluated else {}
        rows.append(row)
    full = {"full": {"perplexity": 32.88, "perplexity_stderr": 2.3, "protocol": protocol}} if evaluated else {}
    part = {"nsamples": 16, "seqlen": 512, "rows": rows, **full}
    return {"model": "smol", "calib": "c", "made_by": "python x", "made_with": FACTS, "end_to_end": part}


def test_the_bench_page_puts_ratios_first_and_leaves_out_what_was_not_measured():
    text = bench_prune.page(end_to_end())
    assert text.index("llm-compressor / sparsegpt") < text.index("full precision")
    ratios = next(line for line in text.splitlines() if "llm-compressor / sparsegpt" in line)
    assert [cell.strip() for cell in ratios.split("|")[3:-1]] == ["2.00", "2.25", "2.00", "1.050"]
    bare = bench_prune.page(end_to_end(evaluated=False))
    ratios = next(line for line in bare.splitlines() if "llm-compressor / sparsegpt" in line)
    assert [cell.strip() for cell in ratios.split("|")[3:-1]] == ["2.00", "2.25", "2.00", "-"]
    assert "Perplexity on" not in bare and "full precision" not in bare
