"""Triton kernels without a GPU: run by Triton's interpreter, or only launched."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from lowbit import integer

ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def interpret(code: str, folder: Path, *names: str, paths: Iterable[Path] = ()) -> str:
    """What `code` prints in a process where Triton interprets, which must be asked for before triton is first imported.

    Its arguments are the files `names` of `folder`, where it runs; it imports from `paths` beside lowbit.
    """
    found = os.pathsep.join(map(str, (ROOT / "kernels", *paths)))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": found, "OMP_NUM_THREADS": "1"}
    child = [sys.executable, "-W", "ignore", "-c", code, *(str(folder / name) for name in names)]
    done = subprocess.run(child, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def launches_of(monkeypatch, kernels: list[tuple[ModuleType, str]], of_family: ModuleType) -> list:
    """What would be launched on a device without numbers, "meta", from now on: (kernel, its tensors' devices).

    kernels: (module, name). of_family: the module whose `_family` and `_parts` ask the device.
    """

    class Launch:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *given, **_: seen.append((self.name, {t.device.type for t in given if torch.is_tensor(t)}))

    seen: list = []
    for module, name in kernels:
        monkeypatch.setattr(module, name, Launch(name))
    monkeypatch.setattr(of_family, "_family", lambda device: "sm_90")
    monkeypatch.setattr(of_family, "_parts", lambda *_: 2)
    monkeypatch.setitem(integer.KERNELS, "meta", replace(integer.KERNELS["cuda"], run_on=lambda device: True))
    return seen
