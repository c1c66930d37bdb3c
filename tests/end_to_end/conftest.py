"""Fixtures of whole runs: what is slow is made once a session and shared."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

import ptq
from ptq.architectures import geometry_of, spec_for
from ptq.blocks import record_calls, skeleton, tensor_names
from ptq.ledger import Ledger
from ptq.pipeline import compress
from ptq.progress import Progress
from ptq.recipe_build import build
from ptq.source import open_checkpoint

NSAMPLES, SEQLEN = 6, 24
CLUSTERS = {"R1": 8, "R2": 2, "R3": 3, "R4": 8, "R5": 8}
FULL = {"bits": 16, "norm_bits": 16, "q_bits": 16, "kv_bits": 16, "softmax_bits": 16}


@pytest.fixture(scope="session")
def recipe_for(text_file):
    """(model folder, options of recipe.build) -> a recipe with small clusters and few tokens."""

    def make(folder, **options):
        calibration = {"text": str(text_file), "nsamples": NSAMPLES, "seqlen": SEQLEN, "mode": "first"}
        return build(**{"model": str(folder), "calibration": calibration, "clusters": CLUSTERS, **options})

    return make


@pytest.fixture(scope="session")
def run():
    """compress(), quietly, into a folder."""

    def run(recipe, out, **options):
        return compress(recipe, out=Path(out), device="cpu", progress=Progress(quiet=True), **options)

    return run


@pytest.fixture(scope="session")
def tokens(tokenizer, text_file):
    """The calibration windows of `recipe_for`, int64 [N, T]."""
    ids = tokenizer(text_file.read_text(encoding="utf8"))["input_ids"]
    return torch.tensor(ids[: NSAMPLES * SEQLEN]).view(NSAMPLES, SEQLEN)


@pytest.fixture(scope="session")
def small(tmp_path_factory, tokenizer):
    """An OPT so small that dozens of runs take seconds."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=300, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def states_of_a_kill(run, tmp_path, monkeypatch):
    """recipe -> (folder `out` of its run, the folders that kills on the way would have left beside it).

    SIGKILL leaves the files as they are, so a copy of the folder before each change is what a kill there leaves.
    """

    def made(recipe) -> tuple[Path, list[Path]]:
        home, states = tmp_path / "home", []
        home.mkdir()

        def before(change):
            def wrapped(self, *args, **kwargs):
                if home in self.parents:
                    states.append(tmp_path / f"state-{len(states)}")
                    shutil.copytree(home, states[-1])
                return change(self, *args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            for name in ("mkdir", "replace", "rename", "unlink"):  # every call that changes which names a folder has
                patch.setattr(Path, name, before(getattr(Path, name)))
            run(recipe, home / "out")
        return home / "out", states

    return made


@dataclass(frozen=True)
class Result:
    """A finished run: `left[i]` is what left block i inside the pipeline, [N, T, C]."""

    source: Path
    out: Path
    report: dict
    left: list[torch.Tensor]


@pytest.fixture(scope="session")
def w4a8(model_folder, recipe_for, run, tmp_path_factory):
    """family -> its W4A8 run, made once."""
    complete = Ledger.complete

    def result(family: str) -> Result:
        source, out, left = model_folder(family), tmp_path_factory.mktemp("w4a8") / family, []

        def keep(self, states, record):
            left.append(torch.cat(states))
            complete(self, states, record)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ledger, "complete", keep)
            report = run(recipe_for(source, preset="W4A8"), out)
        return Result(source, out, report, left)

    return functools.cache(result)


@pytest.fixture(scope="session")
def loaded(w4a8):
    """family -> the W4A8 model as ptq.load gives it, made once; tests must not change it."""
    return functools.cache(lambda family: ptq.load(w4a8(family).out))


@pytest.fixture(scope="session")
def opened(tokens):
    """folder -> what the engine sees of a model: checkpoint, spec, geometry, the input of block 0, and the true outputs."""

    def look(folder: Path) -> SimpleNamespace:
        checkpoint = open_checkpoint(folder)
        model = skeleton(checkpoint)
        spec = spec_for(checkpoint.config, model)
        model.set_attn_implementation("eager")
        names = tensor_names(model, spec, checkpoint)
        cpu = torch.device("cpu")
        states, calls = record_calls(model, spec, names, checkpoint, [tokens], device=cpu, dtype=torch.float32)
        whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        with torch.no_grad():
            hidden = whole(tokens, output_hidden_states=True).hidden_states
        return SimpleNamespace(
            checkpoint=checkpoint,
            model=model,
            spec=spec,
            geometry=geometry_of(checkpoint.config, spec),
            names=names,
            states=states[0],
            call=calls[0][tokens.shape[0]],
            after_block_0=hidden[1],
        )

    return functools.cache(look)
