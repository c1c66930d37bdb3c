"""Packed folders of tiny models, each made once."""

from __future__ import annotations

import functools

import pytest

from ptq.pipeline import compress
from ptq.progress import Progress
from ptq.recipe_build import build

RTN = {"solver": "rtn"}
# One width everywhere, no order, no rounding of activations, unless the name says otherwise.
SETTINGS = {
    "groups": {"method": "rtn", "weights": {"bits": 4, "groups": 32}},
    "rows": {"method": "rtn", "weights": {"bits": 4}},
    "2 bits": {"method": "rtn", "weights": {"bits": 2, "groups": 32}},
    "3 bits": {"method": "rtn", "weights": {"bits": 3, "groups": 32}},
    "8 bits": {"method": "rtn", "weights": {"bits": 8}},
    "ordered": {
        "weights": {"bits": 4, "groups": 32, **RTN},
        "clusters": {"tile": 32, "R1": 2, "R3": 1, "R4": 2, "R5": 3},
    },
    "uneven": {"weights": {"bits": 4, **RTN}, "clusters": {"R1": 5, "R2": 2, "R3": 3, "R4": 5, "R5": 5}},
    "rotated": {"weights": {"bits": 4, "groups": 32, **RTN}, "clusters": {"tile": 32, "wide": 0, "rotate": True}},
    "2:4": {
        "method": "magnitude",
        "weights": {"bits": 4, "groups": 32, "solver": "gptq"},
        "pruning": {"keep": "2:4", "storage": "packed"},
    },
    "half of it zero": {"method": "magnitude", "pruning": {"sparsity": 0.5, "storage": "packed"}},
    "zeros in place": {"method": "magnitude", "pruning": {"sparsity": 0.5}},
    "along rows": {"method": "group4", "weights": {"bits": 4}},
    "fine": {"weights": {"bits": 4, "groups": 16, "fine": 0.2}, "clusters": {"tile": 32, "wide": 0}},
    "head": {"method": "rtn", "weights": {"bits": 4, "groups": 32, "head": 8}},
    "W8A8 a token": {
        "method": "rtn",
        "weights": {"bits": 8},
        "activations": {"bits": 8, "norm_bits": 8, "grid": "token"},
    },
    "W8A8 static": {
        "method": "rtn",
        "weights": {"bits": 8},
        "activations": {"bits": 8, "norm_bits": 8, "grid": "tensor"},
    },
    "W4A8": {"preset": "W4A8", "weights": RTN, "clusters": {"R1": 4, "R2": 2, "R3": 2, "R4": 4, "R5": 4}},
}


@pytest.fixture(scope="session")
def packed(model_folder, text_file, tmp_path_factory):
    """(family, name in SETTINGS, dtype of the source) -> the packed folder."""

    @functools.cache
    def folder(family, name, *dtype):
        calibration = {"text": str(text_file), "nsamples": 1, "seqlen": 16, "mode": "first"}
        recipe = build(model=str(model_folder(family, *dtype)), calibration=calibration, **SETTINGS[name])
        out = tmp_path_factory.mktemp("packed") / "model"
        compress(recipe, out=out, device="cpu", progress=Progress(quiet=True))
        return out

    return folder
