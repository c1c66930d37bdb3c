"""scripts/gpu_check.py where there is no GPU: what it says, what the interpreter can check, and that its checks can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import gpu_check

ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
# Runs the script, and checks every result once more when it is off by a tenth of its largest entry.
CHILD = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import _gpu_cases
from dataclasses import replace
sys.argv[0], damaged = "scripts/gpu_check.py", []
def doubted(case):
    def make(device):
        job = case.make(device)
        def check(result):
            error, first = job.check(result), result
            while isinstance(first, tuple):
                first = first[0]
            if first is not None:
                first += (first.abs().amax() / 10).to(first.dtype) if first.is_floating_point() else 9
                if not job.check(result) > 1:
                    damaged.append(case.kernel)
            return error
        return replace(job, check=check)
    return replace(case, make=make)
tiny_cases = _gpu_cases.tiny_cases
_gpu_cases.tiny_cases = lambda: [doubted(case) for case in tiny_cases()]
import gpu_check
code = gpu_check.main()
print("passed though damaged:", damaged)
sys.exit(code)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "out")])
    assert gpu_check.main() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no GPU" in said
    assert not (tmp_path / "out").exists()


@needs_triton
def test_interpreter_checks_every_kernel_and_times_nothing(tmp_path):
    folders = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "scripts"))
    environment = {**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    child = [sys.executable, "-c", CHILD, "--out", str(tmp_path), "--interpret"]
    done = subprocess.run(child, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "passed though damaged: []" in done.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["device"] == "Triton's interpreter"
    assert all(row["error"] <= 1 and "ms" not in row for row in found["rows"])
    assert "no GPU took part and nothing was timed" in (tmp_path / "gpu.md").read_text()
