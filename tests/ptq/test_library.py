"""ptq.quantize, ptq.prune and ptq.evaluate do what the commands of those names do, and take what they take."""

import argparse
import hashlib
import inspect
import json
import pkgutil

import pytest

import ptq
from ptq.cli import main
from ptq.cli.parser import build_parser
from ptq.errors import BadInput

# What the command prints, and what it spells otherwise.
COMMAND_ONLY = {"help", "out", "model", "folder", "set", "json", "verbose", "quiet"}
LIBRARY_ONLY = {"settings", "progress"}


def digests(folder):
    """File -> sha256, of all that a run writes but the times in report.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "report.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def common(text_file):
    """The same small calibration as keywords and as options."""
    words = {"calib": str(text_file), "nsamples": 2, "seqlen": 16, "seed": 3, "device": "cpu"}
    return words, [part for key, value in words.items() for part in (f"--{key}", str(value))]


def test_quantize_writes_the_bytes_of_the_command(model_folder, common, tmp_path):
    words, options = common
    source, mine, theirs = model_folder("opt"), tmp_path / "mine", tmp_path / "theirs"
    result = ptq.quantize(source, mine, preset="W4A8", kv_bits=4, settings={"clusters.R1": 4}, **words)
    line = ["--preset", "W4A8", "--kv-bits", "4", "--set", "clusters.R1=4", "--quiet", *options]
    assert main(["quantize", str(source), "--out", str(theirs), *line]) == 0
    assert digests(mine) == digests(theirs) and any(name.endswith(".safetensors") for name in digests(mine))
    report = json.loads((mine / "report.json").read_text())
    assert result.report == report and result.folder == mine and result.sparsity is None
    assert (result.effective_bits, result.compressed_bytes) == (
        report["bits"]["weights_effective"],
        report["sizes"]["compressed_bytes"],
    )


def test_prune_writes_the_bytes_of_the_command(model_folder, common, tmp_path):
    words, options = common
    source, mine, theirs = model_folder("opt"), tmp_path / "mine", tmp_path / "theirs"
    result = ptq.prune(source, mine, nm="2:4", refine=2, wbits=4, groups=32, **words)
    line = ["--nm", "2:4", "--refine", "pcg:2", "--wbits", "4", "--groups", "32", "--quiet", *options]
    assert main(["prune", str(source), "--out", str(theirs), *line]) == 0
    assert digests(mine) == digests(theirs)
    # some of what is kept rounds to zero
    assert 0.5 <= result.sparsity < 0.6 and result.effective_bits < 8


def test_evaluate_returns_what_the_command_writes(model_folder, text_file, capsys):
    source, against = model_folder("opt"), model_folder("llama")
    words = {"text": str(text_file), "seqlen": 16, "windows": 3, "batch_size": 2, "device": "cpu"}
    found = ptq.evaluate(source, against=against, **words)
    line = [part for key, value in words.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    assert main(["eval", str(source), "--against", str(against), *line, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert found["tokens"] == 3 * 15 and found["kl"] > 0


@pytest.mark.parametrize("verb, function", [("quantize", ptq.quantize), ("prune", ptq.prune), ("eval", ptq.evaluate)])
def test_the_function_takes_the_options_of_the_command_by_keyword_alone(verb, function):
    verbs = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    options = {action.dest for action in verbs.choices[verb]._actions} - COMMAND_ONLY
    parameters = inspect.signature(function).parameters.values()
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - LIBRARY_ONLY == options
    assert {p.name for p in parameters if p.kind is not p.KEYWORD_ONLY} <= {"model", "out"}
    assert all(p.annotation is not p.empty for p in parameters)


@pytest.mark.parametrize(
    "call, part",
    [
        (lambda m, out: ptq.quantize(m, out, preset="W4A9"), "unknown preset 'W4A9' (did you mean 'W4A"),
        (lambda m, out: ptq.quantize(m, out, wbits=4, method="rpqt"), "did you mean 'rptq"),
        (lambda m, out: ptq.quantize(m, out, wbits=4, settings={"weights.dampp": 1}), "did you mean 'damp'"),
        (lambda m, out: ptq.quantize(m, out), "no bits chosen"),
        (lambda m, out: ptq.prune(m, out, sparsity=0.5, method="sparsgpt"), "did you mean 'sparsegpt'"),
        (lambda m, out: ptq.prune(m, out, sparsity=0.5, nm="2:4"), "give one of --sparsity"),
        (lambda m, out: ptq.evaluate(m, protocol="rptqq"), "did you mean 'rptq'"),
        (lambda m, out: ptq.evaluate(m, tasks=["piqqa"]), "did you mean 'piqa'"),
        (lambda m, out: ptq.evaluate(m, limit=3), "--limit is about tasks"),
        (lambda m, out: ptq.evaluate(out), "no such folder"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(call, part, model_folder, tmp_path):
    with pytest.raises(BadInput) as err:
        call(model_folder("opt"), tmp_path / "out")
    assert part in str(err.value) and "\n" not in str(err.value)
    assert not list(tmp_path.iterdir())


def test_no_module_hides_an_exported_name():
    # importing ptq.NAME would put the module in the place of the function
    assert not {module.name for module in pkgutil.iter_modules(ptq.__path__)} & set(ptq.__all__)
    assert all(hasattr(ptq, name) for name in ptq.__all__)
