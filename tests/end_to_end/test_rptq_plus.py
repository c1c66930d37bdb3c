"""rptq+: sorted tiles, Hadamard blocks, spared sinks: the function is kept, and what was calibrated is what runs."""

from __future__ import annotations

import math

import pytest
import torch
from lowbit.modules import ActivationQuantizer, Linear, Norm

import ptq
from ptq import reorder
from ptq.blocks import load_block, run_block
from ptq.errors import BadInput
from ptq.recipe_build import build
from ptq.sites import collect, until_last_input

TILES = {"tile": 32, "wide": 0.125, "rotate": True}
FINE = {"fine": 0.2}
FORMS = {"dynamic": {}, "static": {"activations": {"grid": "cluster"}}}


def fresh(seen):
    return load_block(seen.model, seen.spec, 0, seen.names, seen.checkpoint, device=torch.device("cpu"))


def ranges_of(seen, block, sinks):
    def forward():
        until_last_input(lambda: run_block(block, seen.states, seen.call, sinks=sinks))

    more = {"ranges": True, "hessians": False, "where": "block", "sinks": sinks, "every": 2}
    return collect(block, seen.spec, seen.geometry, forward, **more)


@torch.no_grad()
def test_sorting_and_rotating_change_nothing(family, opened, model_folder):
    seen = opened(model_folder(family))
    block, recipe = fresh(seen), build(method="rptq+", preset="W4A4KV4", clusters=TILES)
    orders = reorder.plan_orders(ranges_of(seen, block, 0).ranges, recipe, seen.spec, seen.geometry, "block")
    reorder.fold_orders(block, seen.spec, seen.geometry, orders)
    reorder.fold_rotations(block, seen.spec, orders)
    turned = {m.rotation for m in block.modules() if isinstance(m, (Linear, Norm))}
    assert max(turned) >= 8
    out = run_block(block, seen.states, seen.call)
    # float32 sums in another order: far below 1e-5 of the largest value, where a wrong channel is about 1
    assert float((out - seen.after_block_0).abs().max() / seen.after_block_0.abs().max()) < 1e-5


@torch.no_grad()
def test_sinks_are_left_out_of_ranges_and_samples(opened, model_folder):
    seen = opened(model_folder("llama"))
    block = fresh(seen)
    found = {sinks: ranges_of(seen, block, sinks) for sinks in (0, 2)}
    B, T, C = seen.states.shape
    assert len(found[0].samples["R1"]) == -(-B * T // 2) and len(found[2].samples["R1"]) == -(-B * (T - 2) // 2)
    inputs = block.get_submodule(seen.spec.attention_norm)(seen.states)[:, 2:].reshape(-1, C)
    assert torch.equal(found[2].ranges["R1"].max, inputs.amax(0)) and torch.equal(found[2].samples["R1"], inputs[::2])


@pytest.fixture(scope="module")
def runs(model_folder, recipe_for, run, tmp_path_factory):
    """(family, form) -> (folder, report) of a W4A4KV4 run, made once."""
    done = {}

    def result(family, form):
        if (family, form) not in done:
            out = tmp_path_factory.mktemp("plus") / family
            recipe = recipe_for(
                model_folder(family),
                method="rptq+",
                preset="W4A4KV4",
                **FORMS[form] | {"clusters": TILES, "weights": FINE},
            )
            done[family, form] = (out, run(recipe, out))
        return done[family, form]

    return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["opt", "llama", "gpt_neox"])
@torch.no_grad()
def test_decoding_with_the_packed_cache_equals_one_pass(family, form, runs, tokens):
    out, report = runs(family, form)
    model = ptq.load(out)
    assert any(isinstance(m, ActivationQuantizer) and m.sinks == 1 for m in model.modules())
    ids = tokens[:2, :12]
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :5], use_cache=True)
    pieces, cache = [first.logits], first.past_key_values
    for t in range(5, 12):
        step = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        pieces.append(step.logits)
    # The cache turns rotary keys back, which can move one by a float32 rounding across a border between codes.
    gap = (torch.cat(pieces, 1) - whole).abs().max() / whole.abs().max()
    assert float(gap) < 1e-4
    assert cache.layers[0].spared.at.tolist() == [0]


@torch.no_grad()
def test_padding_moves_the_sink_and_changes_no_logit(runs, tokens):
    model = ptq.load(runs("llama", "static")[0])
    ids, short = tokens[:1, :10], tokens[1:2, :6]
    batch = torch.cat([ids, torch.cat([torch.zeros(1, 4, dtype=torch.int64), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(batch, attention_mask=mask, position_ids=positions).logits
    alone = model(short).logits
    assert float((padded[1:, 4:] - alone).abs().max() / alone.abs().max()) < 1e-5  # masked scores are exact zeros


@pytest.mark.parametrize("form, grid", [("dynamic", 16), ("static", 0)])
def test_the_report_counts_every_bit(form, grid, runs):
    _, report = runs("llama", form)
    inputs = [s for s in report["sites"] if s["site"] in ("R1", "R3", "R4", "R5")]
    tiles = sum(s["clusters"] for s in inputs)
    wide = sum(
        (s["effective_bits"] * s["channels"] - (4 * s["channels"] + (grid + 4 * (grid > 0)) * s["clusters"]))
        / (4 * 32 + 4 * (grid > 0))
        for s in inputs
    )
    blocks = len(inputs) // 4
    assert wide == pytest.approx(blocks * max(1, round(0.125 * tiles / blocks)))
    assert {s["effective_bits"] for s in report["sites"] if s["site"] in ("k", "v")} == {4.0}
    sizes = [math.prod(m["shape"]) for m in report["modules"]]
    fine = sum(m["fine_share"] * n for m, n in zip(report["modules"], sizes)) / sum(sizes)
    assert 0.1 < fine <= FINE["fine"]
    for m in report[
        "modules"
    ]:  # codes, a group's scale and zero point a row, its size and its number; rows end on bytes
        R, C = m["shape"]
        groups = 4 * m["groups"] * (1 + m["fine_share"]) / R  # bytes a row
        assert m["effective_bits"] == pytest.approx(
            4 * (1 + m["fine_share"]) + (20 + 4 * m["fine_share"]) * m["groups"] / C + 8 * groups / C, abs=0.6
        )
    # the tiles of 32 here hold Hadamard matrices of 32 (log2 32 = 5 additions a channel)
    channels = sum(s["channels"] for s in inputs)
    assert report["run_time"]["hadamard_additions"] <= 5 * channels and report["run_time"]["hadamard_additions"] > 0
    assert report["run_time"]["dynamic_channels"] == (channels if form == "dynamic" else 0)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "rptq", "activations": {"grid": "tile"}}, "grid: tile: needs sorted tiles"),
        ({"method": "rptq", "clusters": {"rotate": True}}, "clusters.rotate: needs sorted tiles"),
        ({"method": "rptq+", "clusters": {"tile": None}}, "clusters.wide: is a share of tiles"),
        ({"method": "rptq", "clusters": {"allot": "block"}}, "clusters.allot: block needs tiles"),
        ({"method": "rptq+", "clusters": {"allot": "range"}}, "clusters.allot: 'range' is not one of site, block"),
        ({"method": "rptq+", "clusters": {"wide": 2}}, "clusters.wide: 2 is not a number between 0 and 1"),
        ({"method": "gptq", "activations": {"clip": True, "grid": "token"}}, "no tiles and no clipping"),
        ({"method": "rptq+", "activations": {"sinks": -1}}, "activations.sinks: -1"),
    ],
)
def test_what_does_not_fit_together_is_refused(options, words):
    with pytest.raises(BadInput, match=words):
        build(**options)
