"""A run killed at any moment leaves nothing half-made under its name, and goes on to the very same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import contents

from ptq import identity
from ptq.errors import BadInput
from ptq.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = {"R1": 2, "R2": 1, "R3": 1, "R4": 2, "R5": 2}


@pytest.fixture
def recipe(small, recipe_for):
    return recipe_for(small, preset="W4A8", clusters=CLUSTERS)


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def test_resumed_from_every_state_a_kill_can_leave_the_bytes_are_the_same(recipe, run, states_of_a_kill):
    out, states = states_of_a_kill(recipe)
    whole = contents(out)
    assert len(states) > 20
    *partial, last = states
    assert contents(last / "out").keys() - whole.keys() == {
        "ledger.json"
    }  # whole, only the manifest was left to remove
    with pytest.raises(BadInput, match="this run is complete, nothing is left to resume"):
        run(recipe, last / "out", resume=True)
    assert contents(last / "out") == whole
    for n, state in enumerate(partial):
        assert not (state / "out").exists(), n
        manifest = (state / "out.partial" / "ledger.json").is_file()
        assert manifest == (n >= 2), n  # made, then a manifest: from there on there is something to resume
        if n != 1:  # there the folder is empty, and the message is to remove it: test_nothing_to_resume
            run(recipe, state / "out", resume=manifest)
            assert [p.name for p in state.iterdir()] == ["out"] and contents(state / "out") == whole, n


class Stop(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture
def stopped(recipe, run, tmp_path, monkeypatch):
    """A run that ended after its first block; gives its output's path."""
    complete = Ledger.complete

    def then_stop(self, *args):
        complete(self, *args)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "complete", then_stop)
        with pytest.raises(Stop):
            run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    return tmp_path / "out"


KILL_AFTER_THE_FIRST_BLOCK = """
import os, signal, sys, ptq.ledger
complete = ptq.ledger.Ledger.complete
def then_die(self, *args):
    complete(self, *args)
    os.kill(os.getpid(), signal.SIGKILL)
ptq.ledger.Ledger.complete = then_die
from ptq.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_command_resumes_after_a_kill(recipe, run, tmp_path):
    run(recipe, tmp_path / "whole")
    c, out = recipe.calibration, tmp_path / "out"
    verb = ["quantize", recipe.model, "--out", str(out), "--preset", "W4A8", "--device", "cpu", "--calib", c.text]
    verb += ["--nsamples", str(c.nsamples), "--seqlen", str(c.seqlen), "--set", f"calibration.mode={c.mode}"]
    verb += [word for site in CLUSTERS for word in ("--set", f"clusters.{site}={CLUSTERS[site]}")]
    options = {"env": environment(), "capture_output": True, "text": True, "cwd": tmp_path}
    killed = subprocess.run([sys.executable, "-c", KILL_AFTER_THE_FIRST_BLOCK, *verb], **options)
    assert killed.returncode == -9, killed.stderr
    assert not out.exists() and (tmp_path / "out.partial" / "model-00001-of-00003.safetensors").is_file()
    done = subprocess.run([sys.executable, "-m", "ptq", *verb, "--resume"], **options)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(tmp_path / "whole")


def test_another_recipe_is_refused(stopped, recipe, run, recipe_for, small):
    other = recipe_for(small, preset="W4A4", clusters=CLUSTERS)
    with pytest.raises(BadInput, match="this is another run: recipe was .*, is "):
        run(other, stopped, resume=True)


def test_a_changed_calibration_text_is_refused(stopped, recipe, run, text_file):
    before = text_file.read_text()
    try:
        text_file.write_text("Now for something different. " + before)
        with pytest.raises(BadInput, match="this is another run: calibration was .*, is "):
            run(recipe, stopped, resume=True)
    finally:
        text_file.write_text(before)


def test_another_scikit_learn_or_cpu_is_refused(stopped, recipe, run, monkeypatch):
    monkeypatch.setattr(identity, "version", lambda package: f"another {package}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
    match = "device was cpu, .*, is cpu, ABACUS, .*; scikit-learn was .*, is another scikit-learn"
    with pytest.raises(BadInput, match=match):
        run(recipe, stopped, resume=True)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_changed_model_is_refused(name, stopped, recipe, run, small):
    file = small / name
    before, time = file.read_bytes(), file.stat().st_mtime_ns
    try:
        file.write_bytes(before[:-1] + (b"\x00" if name.endswith("tensors") else b"\n\n"))
        with pytest.raises(BadInput, match="this is another run: model was .*, is "):
            run(recipe, stopped, resume=True)
    finally:
        file.write_bytes(before)
        os.utime(file, ns=(time, time))
    run(recipe, stopped, resume=True)  # and nothing was spoiled


def test_an_output_that_exists_is_left_alone(recipe, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    for resume in (False, True):
        with pytest.raises(BadInput, match="exists already"):
            run(recipe, tmp_path / "out", resume=resume)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_unfinished_run_is_not_overwritten(stopped, recipe, run):
    before = contents(stopped.with_name("out.partial"))
    with pytest.raises(BadInput, match="unfinished run is there; continue it with --resume or remove"):
        run(recipe, stopped)
    assert contents(stopped.with_name("out.partial")) == before


def test_nothing_to_resume(recipe, run, tmp_path):
    with pytest.raises(BadInput, match="no unfinished run to resume; leave --resume out"):
        run(recipe, tmp_path / "out", resume=True)
    (tmp_path / "out.partial").mkdir()  # killed before its first manifest
    with pytest.raises(BadInput, match="no unfinished run to resume; remove .*out.partial and leave --resume out"):
        run(recipe, tmp_path / "out", resume=True)


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"identity": {}, "completed": "x", "records": []}', b"\xff\xfe"])
def test_a_corrupt_ledger_is_refused(damage, stopped, recipe, run):
    (stopped.with_name("out.partial") / "ledger.json").write_bytes(damage)
    with pytest.raises(BadInput, match="ledger.json: cannot be read"):
        run(recipe, stopped, resume=True)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_lost_activations_are_refused_not_replaced_by_the_first_block_s(damage, stopped, recipe, run):
    path = stopped.with_name("out.partial") / "activations-00001.safetensors"
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BadInput, match="activations-00001.safetensors: cannot be read"):
        run(recipe, stopped, resume=True)
