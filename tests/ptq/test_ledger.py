"""The ledger's own promises; whole runs killed and resumed are in end_to_end/test_resume.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptq.errors import BadInput
from ptq.ledger import Ledger, refuse_existing, write_json, write_tensors, write_whole

IDENTITY = {"recipe": "a", "model": "b"}
STATES = [torch.arange(12.0).view(2, 3, 2), torch.full((1, 3, 2), 0.1, dtype=torch.float64)]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def begun(tmp_path):
    ledger = Ledger.open(tmp_path / "out", IDENTITY, resume=False)
    ledger.entering(STATES)
    return ledger


def test_opening_writes_nothing_until_there_is_something_to_keep(tmp_path):
    ledger = Ledger.open(tmp_path / "out", IDENTITY, resume=False)
    assert names(tmp_path) == []
    assert ledger.entering(STATES) is STATES
    assert names(tmp_path / "out.partial") == ["activations-00000.safetensors", "ledger.json"]


def test_states_come_back_bit_for_bit(begun, tmp_path):
    for step in range(3):
        again = Ledger.open(tmp_path / "out", IDENTITY, resume=True)
        assert again.completed == step and again.records == list(range(step))
        states = again.entering([torch.zeros(1)])
        assert [t.dtype for t in states] == [torch.float32, torch.float64]
        assert all(torch.equal(a, b + step) for a, b in zip(states, STATES, strict=True))
        again.complete([s + 1 for s in states], step)
        assert names(tmp_path / "out.partial") == [f"activations-{step + 1:05d}.safetensors", "ledger.json"]


def test_finishing_leaves_the_output_alone_under_its_name(begun, tmp_path):
    (begun.folder / "model.safetensors").write_bytes(b"x")
    (begun.folder / ".model.safetensors.tmp").write_bytes(b"half")
    begun.finish(tmp_path / "out")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["model.safetensors"]


@pytest.mark.parametrize("out", [".", "/", ""])
@pytest.mark.parametrize("resume", [False, True])
def test_folders_without_a_name_exist_already(out, resume, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="exists already; choose another --out"):
        Ledger.open(Path(out), IDENTITY, resume=resume)


def test_a_manifest_left_in_the_output_is_removed_by_a_resume_only(begun, tmp_path):
    out = tmp_path / "out"
    begun.folder.rename(out)
    with pytest.raises(BadInput, match="exists already"):
        refuse_existing(out)
    assert "ledger.json" in names(out)
    with pytest.raises(BadInput, match="out: this run is complete, nothing is left to resume"):
        refuse_existing(out, resume=True)
    assert "ledger.json" not in names(out)
    (out / "ledger.json").write_text('{"of": "somebody else"}')
    with pytest.raises(BadInput, match="exists already"):
        refuse_existing(out, resume=True)
    assert "ledger.json" in names(out)


def test_what_differs_is_named_with_both_values(begun, tmp_path):
    with pytest.raises(BadInput, match="another run: extra was None, is 1; model was b, is c; repeat") as caught:
        Ledger.open(tmp_path / "out", {"recipe": "a", "model": "c", "extra": "1"}, resume=True)
    assert "recipe was" not in str(caught.value)


@pytest.mark.parametrize("write", [write_whole, write_json, write_tensors])
def test_a_write_that_fails_leaves_the_old_file(write, tmp_path, monkeypatch):
    old, new = {write_whole: (b"old", b"new"), write_json: (1, 2)}.get(write, ({"x": STATES[0]}, {"x": STATES[1]}))
    path = tmp_path / "file"
    write(path, old)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        write(path, new)
    assert path.read_bytes() == before


def test_tensors_are_written_as_they_are(tmp_path):
    column = torch.arange(6).view(2, 3).T  # not contiguous
    write_tensors(tmp_path / "t.safetensors", {"x": column})
    assert torch.equal(load_file(tmp_path / "t.safetensors")["x"], column) and names(tmp_path) == ["t.safetensors"]
    write_json(tmp_path / "j.json", {"a": [1]})
    assert json.loads((tmp_path / "j.json").read_text()) == {"a": [1]}
