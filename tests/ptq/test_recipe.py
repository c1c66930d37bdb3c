"""Recipes: what presets and methods mean, what is refused and in which words, and that YAML loses nothing."""

from __future__ import annotations

import dataclasses

import pytest

from ptq.errors import BadInput
from ptq.presets import METHODS, PRESETS
from ptq.recipe import Recipe, fingerprint, to_dict
from ptq.recipe_build import build, dump_yaml, load_yaml


def test_presets_are_the_paper_s():
    sites = ("bits", "norm_bits", "q_bits", "kv_bits", "softmax_bits")
    # weights, then the sites above (RPTQ, arXiv 2304.01089, section 4)
    expected = {
        "W4A16": (4, 16, 16, 16, 16, 16),
        "W4A8": (4, 8, 8, 8, 8, 8),
        "W4A4": (4, 4, 8, 4, 4, 8),
        "W4A4KV": (4, 16, 16, 16, 4, 16),
        "W4A3KV": (4, 16, 16, 16, 3, 16),
        "W3A3KV": (3, 16, 16, 16, 3, 16),
        "W4A4KV4": (4, 4, 4, 16, 4, 16),  # of later papers: every linear's input
    }
    assert set(PRESETS) == set(expected)
    for name, bits in expected.items():
        recipe = build(preset=name)
        assert (recipe.weights.bits, *(getattr(recipe.activations, site) for site in sites)) == bits, name


def test_later_settings_win():
    recipe = build(method="rtn", preset="W4A8", weights={"bits": 3}, activations={"kv_bits": 2})
    assert (recipe.weights.bits, recipe.weights.solver, recipe.weights.groups) == (3, "rtn", "channel")
    assert (recipe.activations.kv_bits, recipe.activations.q_bits, recipe.activations.grid) == (2, 8, "tensor")
    assert not recipe.reorder and build(method="smoothquant").smooth == 0.5


@pytest.mark.parametrize(
    "options, words",
    [
        ({"preset": "W4A9"}, ["unknown preset 'W4A9'", "did you mean 'W4A"]),
        ({"preset": ["W4A8"]}, ["unknown preset"]),
        ({"method": "rtpq"}, ["unknown method 'rtpq'", "did you mean 'rptq'"]),
        (
            {"method": "zzzz"},
            ["unknown method 'zzzz'", "known: rptq, rptq+, rtn, gptq, smoothquant, peg, atom, quarot, group4"],
        ),
        ({"wieghts": {}}, ["unknown key 'wieghts'", "did you mean 'weights'"]),
        ({"weights": {"bit": 4}}, ["recipe.weights: unknown key 'bit'", "did you mean 'bits'"]),
        ({"weights": 4}, ["recipe.weights: expected a mapping with keys bits", "got 4"]),
        ({"weights": {"bits": 5}}, ["weights.bits: 5 is not one of 2, 3, 4, 8, 16"]),
        ({"weights": {"bits": 4.0}}, ["weights.bits: 4.0"]),
        ({"weights": {"bits": True}}, ["weights.bits: True"]),
        ({"weights": {"bits": "4"}}, ["weights.bits: '4'"]),
        ({"weights": {"solver": "obq"}}, ["weights.solver: 'obq' is not one of gptq, rtn, group4"]),
        ({"weights": {"groups": 4}}, ["weights.groups: 4 is not a whole number of at least 8"]),
        ({"weights": {"groups": "row"}}, ["weights.groups: 'row'"]),
        ({"weights": {"damp": 0}}, ["weights.damp: 0 must lie inside 0 and 1"]),
        ({"weights": {"damp": float("nan")}}, ["weights.damp: nan is not a number between 0 and 1"]),
        ({"weights": {"act_order": "yes"}}, ["weights.act_order: 'yes' is neither true nor false"]),
        ({"activations": {"kv_bits": 6}}, ["activations.kv_bits: 6 is not one of 2, 3, 4, 8, 16"]),
        ({"activations": {"softmax_bits": 1}}, ["activations.softmax_bits: 1"]),
        ({"activations": {"grid": "row"}}, ["activations.grid: 'row' is not one of cluster, tile, tensor, token"]),
        ({"clusters": {"R3": 0}}, ["clusters.R3: 0 is not a whole number of at least 1"]),
        ({"clusters": {"tile": 48}}, ["clusters.tile: 48 is not one of 32, 64, 128"]),
        ({"calibration": {"nsamples": 0}}, ["calibration.nsamples: 0"]),
        ({"calibration": {"seqlen": 2.5}}, ["calibration.seqlen: 2.5"]),
        ({"calibration": {"mode": "all"}}, ["calibration.mode: 'all' is not one of random, first"]),
        ({"calibration": {"text": 7}}, ["calibration.text: 7 is not text"]),
        ({"smooth": 1.5}, ["smooth: 1.5 is not a number between 0 and 1"]),
        ({"smooth": True}, ["smooth: True"]),
        ({"seed": -1}, ["seed: -1"]),
        ({"reorder": 1}, ["reorder: 1 is neither true nor false"]),
        ({"version": 2}, ["recipe.version: 2 is not one of 1"]),
        ({"method": "group4", "weights": {"bits": 8}}, ["method group4 stores 4 bits, not 8"]),
        ({"method": "group4", "activations": {"kv_bits": 8}}, ["method group4 stores 4 bits, not 8"]),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(options, words):
    with pytest.raises(BadInput) as caught:
        build(**options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("method", METHODS)
def test_yaml_gives_the_recipe_back(method, tmp_path):
    recipe = build(method=method, model="m", preset="W4A16", seed=3, clusters={"R1": 16}, weights={"groups": 32})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(recipe), encoding="utf8")
    assert load_yaml(path) == recipe


def test_a_resolved_yaml_is_not_changed_by_its_own_method_and_preset(tmp_path):
    recipe = build(method="rtn", preset="W4A8", reorder=True, weights={"bits": 16}, activations={"q_bits": 16})
    (tmp_path / "r.yaml").write_text(dump_yaml(recipe))
    assert load_yaml(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    "text, words",
    [
        ("weights: [", "not YAML"),
        ("- 1\n", "expected a mapping at the top, got list"),
        ("", "expected a mapping at the top, got NoneType"),
        ("1: 2\n", "unknown key 1"),
        ("weights:\n  bits: 5\n", "weights.bits: 5"),
        ("preset: W4A\n", "did you mean"),
        ("!!python/object/apply:os.system ['true']\n", "not YAML"),
    ],
)
def test_bad_yaml(text, words, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(BadInput, match=words) as caught:
        load_yaml(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


def test_yaml_that_cannot_be_read(tmp_path):
    with pytest.raises(BadInput, match="gone.yaml: cannot be read"):
        load_yaml(tmp_path / "gone.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    with pytest.raises(BadInput, match="cannot be read"):
        load_yaml(tmp_path / "latin.yaml")


def test_the_fingerprint_sees_every_field():
    base = build(preset="W4A8")
    assert fingerprint(base) == fingerprint(build(preset="W4A8"))
    for overrides in (
        {"seed": 1},
        {"weights": {"damp": 0.02}},
        {"clusters": {"R2": 5}},
        {"calibration": {"nsamples": 9}},
    ):
        assert fingerprint(build(preset="W4A8", **overrides)) != fingerprint(base), overrides


def test_recipes_cannot_change_under_a_run():
    with pytest.raises(dataclasses.FrozenInstanceError):
        build().seed = 1
    assert to_dict(Recipe())["clusters"] == {
        "R1": 32,
        "R2": 4,
        "R3": 4,
        "R4": 32,
        "R5": 32,
        "tile": None,
        "wide": None,
        "allot": "site",
        "rotate": False,
        "balance": False,
    }


@pytest.mark.parametrize(
    "options, field",
    [
        ({"method": "rtn", "activations": {"bits": 8, "grid": "cluster"}}, "activations.grid"),
        ({"method": "gptq", "weights": {"bits": 4, "groups": "cluster"}}, "weights.groups"),
        ({"method": "rtn", "clusters": {"tile": 64}}, "clusters.tile"),
        ({"method": "group4", "activations": {"q_bits": 4}}, "activations.q_bits"),
    ],
)
def test_what_a_method_cannot_do_is_refused_not_ignored(options, field):
    with pytest.raises(BadInput, match=field):
        build(**options)
