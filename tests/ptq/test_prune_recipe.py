"""`ptq prune`: its options become a recipe, and what makes no recipe is one line and exit 2."""

from __future__ import annotations

import os

import pytest

from ptq.cli import main, prune
from ptq.cli.parser import parse
from ptq.errors import BadInput
from ptq.presets import PRUNING_METHODS
from ptq.recipe import keep_of, pruned_blocks, quantizes
from ptq.recipe_build import build, dump_yaml, load_yaml


@pytest.fixture(autouse=True)
def _keep_environment(monkeypatch):
    """main() sets Hugging Face's switches in os.environ; monkeypatch puts back every variable that it has touched."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_SAFETENSORS_CONVERSION", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def recipe(line):
    return prune.recipe_from_args(parse(["prune", "m", "--out", "o", *line.split()]))


# --- options -> recipe


@pytest.mark.parametrize(
    "method, refine", [("sparsegpt", 10), ("admm", 15), ("alps", 10), ("wanda", 0), ("magnitude", 0)]
)
def test_the_defaults_of_each_method(method, refine):
    built = recipe(f"--sparsity 0.5 --method {method}")
    assert (built.method, built.pruning.method, built.pruning.refine) == (method, method, refine)
    assert built.true_sequential and not built.reorder and not quantizes(built)
    p = built.pruning
    assert (p.sparsity, p.keep, p.scope, p.block) == (0.5, None, "block", 128)
    assert (p.preserve, p.allocation, p.first, p.storage) == (False, "uniform", 1.0, "dense")
    assert (built.on_failure, built.weights.bits, built.weights.groups) == ("stop", 16, "channel")


def test_the_default_method_is_sparsegpt():
    assert recipe("--nm 2:4") == recipe("--nm 2:4 --method sparsegpt")
    assert set(PRUNING_METHODS) == {"sparsegpt", "admm", "alps", "wanda", "magnitude"}


def test_every_option_reaches_the_recipe():
    built = recipe(
        "--sparsity 0.7 --method alps --refine pcg:5 --first 0.66 --preserve --storage packed "
        "--wbits 3 --groups 64 --on-failure skip --calib a.txt --nsamples 7 --seqlen 96 --seed 3 --revision r1 "
        "--trust-remote-code"
    )
    p = built.pruning
    assert (p.sparsity, p.method, p.refine, p.first) == (0.7, "alps", 5, 0.66)
    assert recipe("--sparsity 0.7 --allocation owl").pruning.allocation == "owl"
    assert (p.preserve, p.storage, built.weights.bits, built.weights.groups) == (True, "packed", 3, 64)
    assert built.on_failure == "skip" and built.model == "m"
    assert (built.calibration.text, built.calibration.nsamples, built.calibration.seqlen) == ("a.txt", 7, 96)
    assert (built.seed, built.revision, built.trust_remote_code) == (3, "r1", True)


@pytest.mark.parametrize(
    "option, steps",
    [("", 10), ("--refine none", 0), ("--refine pcg:0", 0), ("--refine pcg:5", 5), ("--refine pcg:40", 40)],
)
def test_refine(option, steps):
    assert recipe(f"--sparsity 0.5 {option}").pruning.refine == steps


@pytest.mark.parametrize(
    "options, storage",
    [
        ("", "dense"),
        ("--wbits 16", "dense"),
        ("--storage dense", "dense"),
        ("--storage packed", "packed"),
        ("--wbits 4", "packed"),
        ("--wbits 4 --storage packed", "packed"),
    ],
)
def test_storage_is_dense_unless_bits_need_it_packed(options, storage):
    assert recipe(f"--nm 2:4 {options}").pruning.storage == storage


def test_set_has_the_last_word():
    built = recipe("--sparsity 0.5 --set pruning.sparsity=0.6 --set pruning.scope=row --set weights.damp=0.1")
    assert (built.pruning.sparsity, built.pruning.scope, built.weights.damp) == (0.6, "row", 0.1)


@pytest.mark.parametrize("line", ["--nm 2:4 --wbits 4", "--sparsity 0.5 --method admm --allocation error --first 0.5"])
def test_the_written_recipe_is_the_recipe(line, tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe(line)))  # a bare 2:4 would be 124 to YAML
    assert load_yaml(tmp_path / "recipe.yaml") == recipe(line)


@pytest.mark.parametrize("keep, pair", [("2:4", (2, 4)), ("1:2", (1, 2)), ("4:8", (4, 8)), ("15:16", (15, 16))])
def test_keep_is_n_of_m(keep, pair):
    assert keep_of(recipe(f"--nm {keep}").pruning) == pair


@pytest.mark.parametrize(
    "first, blocks, expected",
    [(1.0, 12, 12), (0.5, 2, 1), (0.66, 12, 8), (0.01, 12, 1), (0.7, 10, 7), (0.55, 20, 11), (0.07, 100, 7)],
)
def test_first_is_a_share_of_the_blocks_rounded_up(first, blocks, expected):
    # 0.7 * 10, 0.55 * 20 and 0.07 * 100 are a little more than whole numbers in floating point
    assert pruned_blocks(recipe(f"--sparsity 0.5 --first {first}").pruning, blocks) == expected


# --- what makes no recipe

BAD = {
    "neither": ("", "give one of --sparsity (share of zeros, for instance 0.5) and --nm (2:4 keeps 2 of every 4)"),
    "both": ("--nm 2:4 --sparsity 0.5", "give one of --sparsity"),
    "both, by --set": ("--nm 2:4 --set pruning.sparsity=0.5", "sparsity 0.5 and keep 2:4 exclude each other"),
    "more than all": ("--sparsity 1.5", "pruning.sparsity: 1.5 is not a number between 0 and 1"),
    "less than none": ("--sparsity -0.5", "pruning.sparsity: -0.5 is not a number between 0 and 1"),
    "no number": ("--sparsity nan", "pruning.sparsity: nan is not a number between 0 and 1"),
    "nothing": ("--sparsity 0", "--sparsity 0 prunes nothing"),
    "nothing, by --set": ("--sparsity 0.5 --set pruning.sparsity=0", "--sparsity 0 prunes nothing"),
    "keeps more than there are": ("--nm 4:2", "pruning.keep: '4:2' is not n:m with 0 < n < m <= 16; 2:4 keeps 2"),
    "keeps all": ("--nm 4:4", "pruning.keep: '4:4' is not n:m"),
    "keeps none": ("--nm 0:4", "pruning.keep: '0:4' is not n:m"),
    "wide groups": ("--nm 16:32", "pruning.keep: '16:32' is not n:m"),
    "one number": ("--nm 2", "pruning.keep: '2' is not n:m"),
    "three numbers": ("--nm 2:4:8", "pruning.keep: '2:4:8' is not n:m"),
    "an odd digit": ("--nm ²:4", "pruning.keep: '²:4' is not n:m"),
    "n:m without quotes in YAML": (
        "--sparsity 0.5 --set pruning.keep=2:4",
        "pruning.keep: 124 is not text; put n:m in quotes",
    ),
    "refine x": ("--sparsity 0.5 --refine pcg:x", "--refine pcg:x: expected pcg:N, for instance pcg:10, or none"),
    "refine a number": ("--sparsity 0.5 --refine 10", "--refine 10: expected pcg:N"),
    "refine less": ("--sparsity 0.5 --refine pcg:-1", "--refine pcg:-1: expected pcg:N"),
    "dense bits": ("--nm 2:4 --wbits 4 --storage dense", "pruning.storage: dense stores plain weights"),
    "dense reordering": ("--nm 2:4 --set reorder=true", "pruning.storage: dense stores plain weights"),
    "allocated n:m": (
        "--nm 2:4 --allocation owl",
        "pruning.allocation: owl spreads a sparsity, but 2:4 is fixed; use uniform",
    ),
    "no block": ("--sparsity 0.5 --first 0", "pruning.first: 0"),
    "more than the blocks": ("--sparsity 0.5 --first 1.2", "pruning.first: 1.2 is not a number between 0 and 1"),
    "bits": ("--sparsity 0.5 --wbits 5", "weights.bits: 5 is not one of 2, 3, 4, 8, 16"),
    "groups": ("--sparsity 0.5 --wbits 4 --groups cluster", "weights.groups: method sparsegpt makes no clusters"),
    "act order": ("--nm 2:4 --wbits 4 --set weights.act_order=true", "would split the groups of 4"),
    "rounding": ("--nm 2:4 --wbits 4 --set weights.solver=rtn", "weights.solver: rtn does not prune; use gptq"),
    "on failure": ("--sparsity 0.5 --on-failure ignore", "on_failure: 'ignore' is not one of stop, skip"),
    "scope": ("--sparsity 0.5 --set pruning.scope=column", "pruning.scope: 'column' is not one of block, row, layer"),
    "block": ("--sparsity 0.5 --set pruning.block=0", "pruning.block: 0 is not a whole number of at least 1"),
    "preserve": ("--sparsity 0.5 --set pruning.preserve=1", "pruning.preserve: 1 is neither true nor false"),
    "preserve and spread": ("--sparsity 0.5 --preserve --allocation owl", "owl does not know the zeros"),
    "inner method": ("--sparsity 0.5 --set pruning.method=[1]", "pruning.method: [1] is not one of sparsegpt"),
    "a key": ("--sparsity 0.5 --set pruning.scopes=row", "unknown key 'scopes' (did you mean 'scope'?)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_2(case, capsys, tmp_path):
    options, part = BAD[case]
    assert main(["prune", "m", "--out", str(tmp_path / "o"), *options.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ptq: error: ") and err.count("\n") == 1 and part in err, err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, part",
    [
        ("--sparsity 0.5 --method sparsegtp", "unknown 'sparsegtp' (did you mean 'sparsegpt'?)"),
        ("--sparsity 0.5 --method rptq", "argument --method: unknown 'rptq'"),
        ("--sparsity half", "argument --sparsity: invalid float value: 'half'"),
        ("--sparsity 0.5 --storage pack", "unknown 'pack' (did you mean 'packed'?)"),
        ("--sparsity 0.5 --allocation own", "unknown 'own' (did you mean 'owl'?)"),
        ("--sparsity 0.5 --wbits four", "argument --wbits: invalid int value: 'four'"),
        ("--sparsty 0.5", "unrecognized argument '--sparsty' (did you mean '--sparsity'?)"),
        ("--sparsity 0.5 --abits 8", "unrecognized argument '--abits'"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_2(options, part, capsys):
    with pytest.raises(SystemExit) as left:
        main(["prune", "m", "--out", "o", *options.split()])
    err = capsys.readouterr().err
    assert left.value.code == 2 and err.startswith("ptq: error: ") and err.count("\n") == 1 and part in err, err


def test_a_method_that_quantizes_prunes_when_it_is_told_to_in_full():
    pruning = {"keep": "2:4", "storage": "packed"}
    with pytest.raises(BadInput, match="weights.act_order: would split the groups of 4"):
        build(method="rptq", preset="W4A8", pruning=pruning)
    built = build(method="rptq", preset="W4A8", pruning=pruning, weights={"act_order": False})
    assert built.reorder and built.pruning.method == "sparsegpt"
    with pytest.raises(BadInput, match="weights.solver: rtn does not prune"):
        build(method="rtn", pruning={"sparsity": 0.5})
