"""Spreading a sparsity: the budget is met, and the spread is the one that the formulas ask for."""

from __future__ import annotations

import itertools
import random

import pytest

from ptq.allocate import MOST, SPREAD, Measured, error_shares, levels, owl_shares

SPARSITIES = (0.02, 0.3, 0.5, 0.7, 0.92, 0.98)


def mean(shares, found):
    """Sparsity of all weights together."""
    return sum(found[name].weights * share for name, share in shares.items()) / sum(s.weights for s in found.values())


def sites(n, seed=0, curve=lambda level, scale: scale * level**2):
    """n sites in blocks of two, of different sizes, with as many outliers and as much error as the seed says."""
    draw = random.Random(seed)
    found = {}
    for i in range(n):
        scale = draw.uniform(0.1, 3)
        errors = {s: tuple(curve(level, scale) for level in levels(s)) for s in SPARSITIES}
        weights, outliers = draw.choice([48, 64, 96, 4096]), draw.uniform(0, 0.05)
        found[f"model.layers.{i // 2}.{i}"] = weights, outliers, errors
    return lambda s: {name: Measured(int(name.split(".")[2]), w, o, e[s]) for name, (w, o, e) in found.items()}


# --- levels


@pytest.mark.parametrize("sparsity", [0.02, 0.15, 0.5, 0.75, 0.92, 0.98, 1.0])
def test_levels_lie_around_the_sparsity(sparsity):
    found = levels(sparsity)
    assert list(found) == sorted(set(found)) and sparsity in found
    assert 0 <= found[0] and found[-1] <= max(MOST, (1 + sparsity) / 2)
    if sparsity < 1:  # room to give and to take, or every site would get the same
        assert found[0] < sparsity < found[-1] < 1


def test_levels_in_full():
    assert levels(0.5) == pytest.approx([0.25 + 0.05 * i for i in range(11)])
    assert levels(0.02) == pytest.approx([0, 0.02, 0.07, 0.12, 0.17, 0.22, 0.27])
    assert levels(0.98) == pytest.approx([0.73, 0.78, 0.83, 0.88, 0.93, 0.98, 0.99])


# --- owl


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("seed", range(4))
def test_owl_meets_the_budget_inside_0_and_1(sparsity, seed):
    found = sites(10, seed)(sparsity)
    shares = owl_shares(found, sparsity)
    assert mean(shares, found) == pytest.approx(sparsity, abs=1e-12)
    assert all(0 <= share <= 1 for share in shares.values())


def test_owl_keeps_more_where_outliers_are_more_and_the_same_within_a_block():
    # blocks with 1, 3 and 2 percent of outliers: density 0, 2 lambda and lambda above the lowest
    found = {f"{b}.{site}": Measured(b, 10, d, ()) for b, d in enumerate((0.01, 0.03, 0.02)) for site in ("R1", "R3")}
    shares = owl_shares(found, 0.7)
    expected = (0.7 + SPREAD, 0.7 - SPREAD, 0.7)
    assert [shares[name] for name in found] == pytest.approx([expected[int(name[0])] for name in found])


def test_owl_weighs_the_sites_of_a_block_by_their_weights():
    found = {"a": Measured(0, 30, 0.01, ()), "b": Measured(0, 10, 0.05, ()), "c": Measured(1, 40, 0.02, ())}
    shares = owl_shares(found, 0.5)  # (30 x 1% + 10 x 5%) / 40 = 2%, as much as the other block
    assert shares == pytest.approx(dict.fromkeys("abc", 0.5))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_owl_of_equal_blocks_is_uniform(sparsity):
    found = {str(b): Measured(b, 64, 0.01, ()) for b in range(3)}
    assert set(owl_shares(found, sparsity).values()) == {sparsity}
    assert owl_shares({"one": Measured(0, 64, 0.01, ())}, sparsity) == {"one": sparsity}


# --- error


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("seed", range(4))
def test_error_meets_the_budget(sparsity, seed):
    found = sites(10, seed)(sparsity)
    shares = error_shares(found, levels(sparsity), sparsity)
    assert shares.keys() == found.keys() and mean(shares, found) == pytest.approx(sparsity, abs=1e-12)
    assert all(levels(sparsity)[0] <= share <= levels(sparsity)[-1] for share in shares.values())


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_equal_errors_give_equal_shares(sparsity):
    errors = tuple(level**2 for level in levels(sparsity))
    found = {name: Measured(0, 64, 0.0, errors) for name in "abcd"}
    shares = error_shares(found, levels(sparsity), sparsity)
    assert shares == pytest.approx(dict.fromkeys("abcd", sparsity), abs=1e-12)


def test_a_site_with_steeper_errors_keeps_more():
    flat, steep = (tuple(scale * level**2 for level in levels(0.5)) for scale in (1.0, 1.5))
    shares = error_shares({"steep": Measured(0, 64, 0.0, steep), "flat": Measured(1, 64, 0.0, flat)}, levels(0.5), 0.5)
    # without steps 1.5 s = 1.0 f at s + f = 1, s = 0.4; on the grid the neighbours of 0.4 and 0.6 come first
    assert shares == pytest.approx({"steep": 0.4, "flat": 0.6})


def test_a_small_site_with_the_same_errors_keeps_more():
    errors = tuple(level**2 for level in levels(0.5))  # the same error for a tenth of the zeros
    found = {"small": Measured(0, 10, 0.0, errors), "large": Measured(0, 100, 0.0, errors)}
    shares = error_shares(found, levels(0.5), 0.5)
    assert shares["small"] == pytest.approx(0.25) and shares["large"] > 0.5


def total(shares, found, at):
    """Sum of the errors at `shares`, on straight lines between the levels."""
    error = 0.0
    for name, share in shares.items():
        j = max(i for i, level in enumerate(at[:-1]) if level <= share)
        part = (share - at[j]) / (at[j + 1] - at[j])
        error += found[name].errors[j] * (1 - part) + found[name].errors[j + 1] * part
    return error


@pytest.mark.parametrize("seed", range(6))
def test_no_grid_of_levels_beats_it_for_convex_errors(seed):
    at = levels(0.5)[::2]  # 0.25 .. 0.75 by tenths
    draw = random.Random(seed)
    found = {}
    for name in "abcd":
        slopes = sorted(draw.uniform(0, 1) for _ in at[1:])
        found[name] = Measured(0, draw.choice([1, 2, 4]), 0.0, tuple(itertools.accumulate([0.1, *slopes])))
    budget = sum(found[name].weights * 0.5 for name in found)
    best = min(
        total(dict(zip("abcd", chosen)), found, at)
        for chosen in itertools.product(at, repeat=4)
        if sum(found[name].weights * s for name, s in zip("abcd", chosen)) >= budget - 1e-9
    )
    shares = error_shares(found, at, 0.5)
    assert total(shares, found, at) <= best + 1e-9
    # nor does moving a little between any two sites
    for a, b in itertools.permutations("abcd", 2):
        moved = dict(shares)
        moved[a] += 1e-3 / found[a].weights
        moved[b] -= 1e-3 / found[b].weights
        if moved[a] <= at[-1] and moved[b] >= at[0]:
            assert total(moved, found, at) >= total(shares, found, at) - 1e-12


def test_errors_that_fall_back_are_bridged():
    # measured errors may bend down; the hull goes straight over the bump, so the bump alone stops nobody
    bumpy = (0.0, 0.9, 1.0)
    found = {"bumpy": Measured(0, 1, 0.0, bumpy), "straight": Measured(0, 1, 0.0, (0.0, 0.6, 1.2))}
    shares = error_shares(found, (0.25, 0.5, 0.75), 0.5)
    assert shares == {"bumpy": 0.75, "straight": 0.25}
