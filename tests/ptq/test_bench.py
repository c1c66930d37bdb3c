"""`ptq bench`: what is computed from times, what a process reports, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from ptq import bench
from ptq.cli import main
from ptq.errors import BadInput


def test_rates_are_medians_and_count_the_first_token_with_the_prefill(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 70)
    runs = [
        {"prefill_seconds": 2.0, "decode_seconds": 10.0, "peak_bytes": 5},
        {"prefill_seconds": 9.0, "decode_seconds": 4.0, "peak_bytes": 9},
        {"prefill_seconds": 1.0, "decode_seconds": 3.0, "peak_bytes": 7},
    ]
    load = bench.Load(prefill=100, decode=33, batch=2)
    found = bench._summary(bench.Contender("one", "transformers", str(tmp_path)), load, runs)
    assert found == {
        "prefill_tokens_per_second": 200 / 2,
        "decode_tokens_per_second": 64 / 4,
        "generation_tokens_per_second": 66 / 6,
        "peak_bytes": 9,
        "file_bytes": 70,
    }


def test_who_runs():
    found = bench.contenders(Path("a"), Path("b"), None)
    assert [(c.name, c.path, c.dtype) for c in found] == [
        ("compressed", "a", None),
        ("transformers_float32", "b", "float32"),
        ("transformers_bfloat16", "b", "bfloat16"),
    ]


def test_a_model_is_timed_in_a_process_of_its_own(model_folder, tmp_path, capsys):
    folder, out = model_folder("llama"), tmp_path / "bench.json"
    words = ["--prefill", "12", "--decode", "4", "--rounds", "1", "--threads", "1", "--device", "cpu"]
    assert main(["bench", str(folder), *words, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["load"] == {"prefill": 12, "decode": 4, "batch": 1, "threads": 1, "device": "cpu"}
    one = found["compressed"]
    assert all(one[rate] > 0 for rate in bench.RATES)
    assert one["peak_bytes"] > 50e6  # an interpreter with torch loaded has more
    assert one["file_bytes"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    shown = capsys.readouterr().out
    assert "round 1 of 1: compressed" in shown and "12 read, 4 generated, batch 1, 1 threads, cpu" in shown


def test_a_contender_that_fails_ends_the_bench_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"^compressed \(.*\): BadInput: .*"):
        bench.bench(bench.contenders(tmp_path, None, None), bench.Load(4, 2), rounds=1)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--decode", "1"], "--decode: the first new token comes with the prefill"),
        (["--gguf", "gone.gguf"], "--gguf: gone.gguf: no such file"),
        (["--prefill", "100000"], "make 100128 tokens, the model has"),
        (["--against", "gone"], "gone: no such folder"),
    ],
)
def test_what_cannot_be_timed_is_refused(words, message, model_folder, capsys):
    assert main(["bench", str(model_folder("llama")), *words, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_llama_cpp_is_asked_for_by_its_name(model_folder, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "llama_cpp" else find(name, *a))
    (tmp_path / "model.gguf").touch()
    words = ["bench", str(model_folder("llama")), "--gguf", str(tmp_path / "model.gguf"), "--device", "cpu"]
    assert main([*words, "--prefill", "4", "--decode", "2"]) == 2
    assert "llama.cpp is not installed; pip install llama-cpp-python" in capsys.readouterr().err
    assert main([*words, "--prefill", "4", "--decode", "2", "--batch-size", "2"]) == 2
    assert "leave --batch-size 1" in capsys.readouterr().err
