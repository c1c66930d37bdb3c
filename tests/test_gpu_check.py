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
# Runs the script, then every case once more with a result that is off by a tenth of its largest entry.
CHILD = """
import sys
sys.argv[0], damaged = "scripts/gpu_check.py", []
import gpu_check
code = gpu_check.main()
import torch
from _gpu_cases import tiny_cases
for case in tiny_cases():
    job = case.make(torch.device("cpu"))
    result = job.run()
    if result is None:
        continue
    first = result
    while isinstance(first, tuple):
        first = first[0]
    first += (first.abs().amax() / 10).to(first.dtype) if first.is_floating_point() else 9
    if not job.check(result) > 1:
        damaged.append(case.kernel)
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
