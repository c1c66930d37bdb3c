"""What the result of a run depends on, as short strings: the ledger refuses to resume when one differs."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version

import torch

from ptq import distributed
from ptq.calibration import Calibration
from ptq.recipe import Recipe, fingerprint
from ptq.source import Checkpoint


def identity_of(recipe: Recipe, checkpoint: Checkpoint, calibration: Calibration, device: str) -> dict[str, str]:
    """Recipe, model, calibration tokens, devices and software of a run."""
    import transformers

    import ptq

    # Headers, sizes and times stand for the contents: hashing the weights of a large model would cost minutes at every resume.
    files = [[f["name"], f["bytes"], f["header_sha256"]] for f in checkpoint.files]
    config = (checkpoint.folder / "config.json").read_text(encoding="utf8")
    times = [path.stat().st_mtime_ns for path in sorted(set(checkpoint.where.values()))]
    return {
        "recipe": fingerprint(recipe),
        "model": hashlib.sha256(json.dumps([files, times, config]).encode()).hexdigest(),
        "calibration": calibration.fingerprint,
        "device": _device(device),
        "processes": str(distributed.size()),
        "ptq": ptq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "scikit-learn": _version("scikit-learn"),
    }


def _device(device: str) -> str:
    """What decides the order of sums, and so the last bits: a CPU's vector width and number of threads, a GPU's model."""
    if device == "cpu":
        return f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return f"{device}, {torch.cuda.get_device_name(device)}" if torch.device(device).type == "cuda" else device


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
