"""The bundled model, where perplexity means something: what the presets may cost, and what clusters are for."""

from __future__ import annotations

from pathlib import Path

import pytest

import ptq
from ptq.calibration import calibration_windows
from ptq.checkpoint import load_tokenizer
from ptq.perplexity import evaluate, windows_for
from ptq.pipeline import compress
from ptq.progress import Progress
from ptq.recipe_build import build
from ptq.texts import read_text

MODEL = Path(ptq.__file__).parent / "assets" / "tiny-opt"
CALIBRATION = {"text": "bundled", "nsamples": 8, "seqlen": 256}


@pytest.fixture(scope="module")
def perplexity(tmp_path_factory):
    """recipe keywords (None: full precision) -> perplexity on the first 6 windows of 256 tokens of the held-out excerpt."""
    windows = windows_for(load_tokenizer(MODEL), read_text("bundled"), protocol="plain", seqlen=256, limit=6)

    def measured(**recipe):
        folder = MODEL
        if recipe:
            folder = tmp_path_factory.mktemp("bundled") / "out"
            built = build(model=str(MODEL), calibration=CALIBRATION, **recipe)
            compress(built, out=folder, device="cpu", offline=True, progress=Progress(quiet=True))
        return evaluate(ptq.load(folder), windows)["perplexity"]

    return measured


def test_presets_cost_little(perplexity):
    full = perplexity()
    # A twentieth of a uniform guess over 3072 tokens: the model has learned something.
    assert full < 3072 / 20
    assert perplexity(preset="W4A8") < 1.10 * full


def test_one_grid_for_all_channels_loses_what_clusters_keep(perplexity):
    four_bits = {"bits": 4, "norm_bits": 8}
    tensor = perplexity(method="rtn", activations={**four_bits, "grid": "tensor"})
    assert tensor > 10 * perplexity(activations=four_bits)


def test_excerpts_are_long_enough_for_the_defaults():
    tokenizer = load_tokenizer(MODEL)
    assert calibration_windows(tokenizer, "bundled", nsamples=16, seqlen=512).used == 16
