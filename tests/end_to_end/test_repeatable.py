"""The same recipe writes the same bytes; another seed changes what depends on it and nothing else."""

from __future__ import annotations

import pytest
from folders import contents


@pytest.mark.parametrize("repeated_family", ["llama", "bloom"])
def test_two_runs_write_the_same_bytes(repeated_family, w4a8, recipe_for, run, tmp_path):
    first = w4a8(repeated_family)
    run(recipe_for(first.source, preset="W4A8"), tmp_path / "again")
    before, after = contents(first.out), contents(tmp_path / "again")
    assert {n for n in before if n.endswith(".safetensors")} >= {"model-00001-of-00003.safetensors"}
    assert before == after


def test_another_seed_changes_the_blocks_and_the_recipe_only(model_folder, recipe_for, run, tmp_path, text_file):
    found = []
    for seed in (0, 1):
        calibration = {"text": str(text_file), "nsamples": 4, "seqlen": 16, "mode": "random"}
        run(recipe_for(model_folder("opt"), preset="W4A8", seed=seed, calibration=calibration), tmp_path / str(seed))
        found.append(contents(tmp_path / str(seed)))
    changed = {name for name in found[0] if found[0][name] != found[1][name]}
    blocks = {f"model-{i:05d}-of-00003.safetensors" for i in (1, 2)}
    must = blocks | {"recipe.yaml", "channel_ranges.safetensors"}
    # k-means may find fewer clusters than were asked for: the config counts them, the index holds the shards' sizes
    may = {"config.json", "model.safetensors.index.json"}
    assert must <= changed <= must | may
