"""The command line: options become recipes, errors one line and an exit code, and nothing heavy loads for --help."""

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest

from ptq.cli import main, quantize, run
from ptq.cli.list import preset_rows
from ptq.cli.parser import build_parser, parse
from ptq.errors import BadInput, NumericalFailure, UnsupportedModel
from ptq.export import FORMATS
from ptq.presets import METHODS, PRESETS
from ptq.progress import Progress, module_line
from ptq.recipe import Activations, fingerprint
from ptq.recipe_build import dump_yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _keep_environment(monkeypatch):
    """main() sets Hugging Face's switches in os.environ; monkeypatch puts back every variable that it has touched."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_SAFETENSORS_CONVERSION", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "before")


def recipe(*options):
    return quantize.recipe_from_args(parse(["quantize", "m", "--out", "o", *options]))


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("ptq: error: ") and err.count("\n") == 1, err
    return err


# --- options -> recipe


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_exactly_its_bits(name):
    built = recipe("--preset", name)
    assert built.preset == name and built.model == "m"
    assert built.weights.bits == PRESETS[name]["weights"]["bits"]
    assert {key: getattr(built.activations, key) for key in PRESETS[name]["activations"]} == PRESETS[name][
        "activations"
    ]


@pytest.mark.parametrize(
    "options, expected",
    [
        # bits, norm_bits, q_bits, kv_bits, softmax_bits
        (["--abits", "4"], (4, 8, 4, 4, 8)),
        (["--abits", "8"], (8, 8, 8, 8, 8)),
        (["--abits", "16"], (16, 16, 16, 16, 16)),
        (["--abits", "4", "--norm-abits", "4"], (4, 4, 4, 4, 8)),
        (["--abits", "6", "--kv-bits", "4"], (6, 8, 6, 4, 8)),
        (["--kv-bits", "3"], (16, 16, 16, 3, 16)),
        (["--norm-abits", "8"], (16, 8, 16, 16, 16)),
        (["--wbits", "4"], (16, 16, 16, 16, 16)),
        (["--preset", "W4A4KV", "--kv-bits", "8"], (16, 16, 16, 8, 16)),
        (["--preset", "W4A8", "--abits", "4"], (4, 8, 4, 4, 8)),
    ],
)
def test_bits_of_each_site(options, expected):
    a = recipe(*options).activations
    assert (a.bits, a.norm_bits, a.q_bits, a.kv_bits, a.softmax_bits) == expected


def test_explicit_bits_equal_the_preset_they_spell_out():
    spelled = recipe("--wbits", "4", "--abits", "4")
    preset = recipe("--preset", "W4A4")
    assert (spelled.weights, spelled.activations) == (preset.weights, preset.activations)


def test_every_option_reaches_the_recipe():
    built = recipe(
        *"--preset W4A8 --method rptq --act-grid token --groups 128 --tile 64 --calib a.txt,b.txt --nsamples 7".split(),
        *"--seqlen 96 --seed 3 --revision r1 --trust-remote-code".split(),
    )
    assert (built.method, built.activations.grid, built.weights.groups, built.clusters.tile) == (
        "rptq",
        "token",
        128,
        64,
    )
    cal = built.calibration
    assert (cal.text, cal.nsamples, cal.seqlen) == ("a.txt,b.txt", 7, 96)
    assert (built.seed, built.revision, built.trust_remote_code) == (3, "r1", True)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_keeps_its_defaults_under_options_that_are_not_given(method):
    built = recipe("--preset", "W4A16", "--method", method)
    assert built.reorder is METHODS[method].get("reorder", True)
    assert built.activations.grid == METHODS[method].get("activations", {}).get("grid", Activations().grid)


def test_set_is_typed_by_yaml_and_has_the_last_word():
    built = recipe(*"--wbits 4 --set weights.bits=3 --set smooth=0.25 --set reorder=false --set clusters.R2=2".split())
    assert built.weights.bits == 3 and built.smooth == 0.25 and built.reorder is False and built.clusters.R2 == 2


def test_set_preset_brings_the_bits_of_the_preset():
    assert recipe("--set", "preset=W3A3KV").activations.kv_bits == 3


def test_set_counts_as_a_choice_of_bits():
    assert recipe("--set", "activations.kv_bits=4").activations.kv_bits == 4


@pytest.mark.parametrize(
    "options, part",
    [
        ([], "no bits chosen: give --preset"),
        (["--method", "gptq"], "no bits chosen"),
        (["--wbits", "5"], "weights.bits: 5 is not one of 2, 3, 4, 8, 16"),
        (["--abits", "6"], "add --kv-bits"),
        (["--kv-bits", "6"], "activations.kv_bits: 6"),
        (["--wbits", "4", "--act-grid", "tokens"], "activations.grid: 'tokens'"),
        (["--wbits", "4", "--groups", "clusters"], "weights.groups: 'clusters'"),
        (["--wbits", "4", "--tile", "48"], "clusters.tile: 48"),
        (["--wbits", "4", "--set", "weights.dampp=1"], "did you mean 'damp'"),
        (["--wbits", "4", "--set", "weights=5"], "expected a mapping"),
        (["--wbits", "4", "--set", "weights.bits.x=3"], "weights.bits"),
        (["--wbits", "4", "--set", "weights.damp"], "expected KEY.SUB=VALUE"),
        (["--wbits", "4", "--set", "weights.damp=[1"], "not YAML"),
        (["--wbits", "4", "--set", "weights.damp=much"], "weights.damp: 'much'"),
        (["--wbits", "4", "--set", "weights.bits=4.0"], "weights.bits: 4.0"),
        (["--wbits", "4", "--set", "method=[1]"], "unknown method [1]"),
        (["--wbits", "4", "--set", "reorder=maybe"], "reorder: 'maybe'"),
        (["--wbits", "4", "--set", "seed=-1"], "seed: -1"),
    ],
)
def test_options_that_make_no_recipe(options, part, capsys):
    assert main(["quantize", "m", "--out", "o", *options]) == 2
    assert part in one_line(capsys)


# --- run


def run_recipe(path, *options):
    return run.recipe_from_args(parse(["run", str(path), "--out", "o", *options]))


def test_a_written_recipe_runs_as_the_recipe_it_was(tmp_path):
    built = recipe(*"--preset W4A4 --method smoothquant --groups 64 --set clusters.R1=8".split())
    (tmp_path / "recipe.yaml").write_text(dump_yaml(built))
    assert fingerprint(run_recipe(tmp_path / "recipe.yaml")) == fingerprint(built)


@pytest.mark.parametrize(
    "text, part",
    [
        ("preset: W4A4", "names no model"),
        ("model: m\npreset: W4A5", "did you mean 'W4A"),
        ("model: m\nmethods: rptq", "did you mean 'method'"),
        ("- a\n- b", "expected a mapping"),
        ("model: [", "not YAML"),
        ("1: 2", "unknown key 1"),
        ("model: m\nweights: {bits: '4'}", "weights.bits: '4'"),
        ("model: 7", "model: 7 is not text"),
    ],
)
def test_recipe_files_that_are_refused(text, part, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(text)
    assert main(["run", str(tmp_path / "r.yaml"), "--out", "o"]) == 2
    assert part in one_line(capsys)


def test_only_the_command_line_can_allow_remote_code(tmp_path):
    (tmp_path / "r.yaml").write_text("model: m\npreset: W4A4\ntrust_remote_code: true\n")
    with pytest.raises(BadInput, match="add --trust-remote-code"):
        run_recipe(tmp_path / "r.yaml")
    assert run_recipe(tmp_path / "r.yaml", "--trust-remote-code").trust_remote_code


# --- errors and exits


@pytest.mark.parametrize(
    "line, part",
    [
        ("quantise m", "did you mean 'quantize'"),
        ("", "required: VERB"),
        ("quantize m --out o --preset W4A40", "did you mean 'W4A4'"),
        ("quantize m --out o --method gtpq", "did you mean 'gptq'"),
        ("quantize m --out o --abit 4", "did you mean '--abits'"),
        ("quantize m --out o --abit=4", "did you mean '--abits'"),
        ("quantize m", "required: --out"),
        ("quantize m --out o --wbits four", "invalid int value: 'four'"),
        ("quantize m --out o --nsamples 0", "'0' is not a whole number of at least 1"),
        ("quantize m --out o -v -q", "not allowed with"),
        ("eval d more", "unrecognized argument 'more'"),
        ("generate d", "required: --prompt"),
    ],
)
def test_a_bad_command_line_is_one_line_and_exit_2(line, part, capsys):
    with pytest.raises(SystemExit) as left:
        main(line.split())
    assert left.value.code == 2
    assert part in one_line(capsys)


def outcome(monkeypatch, error: BaseException, line: str = "quantize m --out 'my dir' --wbits 4") -> int:
    """Exit code when the verb ends in `error`; only the verb's body is replaced."""
    import shlex

    def fail(*args):
        raise error

    monkeypatch.setattr("ptq.cli.quantize.compress", fail)
    monkeypatch.setattr("ptq.cli.list.preset_rows", fail)
    return main(shlex.split(line))


def test_an_error_of_ours_is_one_line_with_its_own_exit_code(monkeypatch, capsys):
    assert outcome(monkeypatch, NumericalFailure("H of\nblock 3")) == 4
    assert one_line(capsys) == "ptq: error: H of block 3\n"


def test_an_unsupported_model_keeps_its_tree(monkeypatch, capsys):
    assert outcome(monkeypatch, UnsupportedModel("no spec:\n  layers\nSpec(...)")) == 3
    assert capsys.readouterr().err == "ptq: error: no spec:\n  layers\nSpec(...)\n"


def test_an_interrupt_prints_the_command_that_resumes(monkeypatch, capsys):
    assert outcome(monkeypatch, KeyboardInterrupt()) == 130
    resume = "ptq quantize m --out 'my dir' --wbits 4 --resume"
    assert one_line(capsys) == f"ptq: error: interrupted; resume with: {resume}\n"
    assert outcome(monkeypatch, KeyboardInterrupt(), f"{resume[4:]}") == 130
    assert one_line(capsys).rstrip().endswith(resume)


def test_an_interrupted_verb_that_cannot_resume_promises_nothing(monkeypatch, capsys):
    assert outcome(monkeypatch, KeyboardInterrupt(), "list") == 130
    assert one_line(capsys) == "ptq: error: interrupted\n"


def test_sigterm_is_an_interrupt_and_the_handler_is_put_back(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("ptq.cli.quantize.compress", lambda recipe, args: signal.raise_signal(signal.SIGTERM))
    assert main("quantize m --out o --wbits 4".split()) == 130
    assert "--resume" in one_line(capsys)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_says_no_is_one_line_with_what_to_do(code, monkeypatch, capsys):
    def fail(recipe, args):
        raise OSError(code, os.strerror(code), "o.partial/shard")

    monkeypatch.setattr("ptq.cli.quantize.compress", fail)
    assert main("quantize m --out o --wbits 4".split()) == 2
    line = one_line(capsys)
    assert "o.partial/shard" in line and "then continue with: ptq quantize m --out o --wbits 4 --resume" in line


def test_the_error_number_inside_a_safetensors_error_is_found(tmp_path):
    # a limit on file size stands for a full disk: safetensors words both the same way
    done = python(
        "import errno, resource, signal, sys\n"
        "import numpy as np\n"
        "from safetensors.numpy import save_file\n"
        "from ptq.cli import disk_errno\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        f"try: save_file({{'x': np.zeros(9999)}}, {str(tmp_path / 'x')!r})\n"
        "except Exception as err: sys.exit(0 if disk_errno(err) == errno.EFBIG else 1)\n"
        "sys.exit(2)\n"
    )
    assert done.returncode == 0, done.stderr


def test_other_errors_keep_their_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        outcome(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(FileNotFoundError):
        outcome(monkeypatch, FileNotFoundError(errno.ENOENT, "gone"))


def test_offline_is_set_before_the_libraries_read_it(monkeypatch):
    seen = {}
    monkeypatch.setattr("ptq.cli.quantize.compress", lambda recipe, args: seen.update(os.environ))
    assert main("quantize m --out o --wbits 4".split()) == 0
    assert seen["HF_HUB_OFFLINE"] == "before"
    assert main("quantize m --out o --wbits 4 --offline".split()) == 0
    assert seen["HF_HUB_OFFLINE"] == seen["TRANSFORMERS_OFFLINE"] == "1"


# --- start, help, list


def start(command: list[str]) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)


def python(code: str) -> subprocess.CompletedProcess:
    return start([sys.executable, "-c", code])


def test_help_loads_nothing_heavy():
    # numpy, matplotlib and datasets cost tenths of a second, torch and transformers seconds
    done = python(
        "import sys\n"
        "from ptq.cli import main\n"
        "for verb in ('', 'quantize', 'run', 'eval', 'generate', 'inspect', 'list'):\n"
        "    try: main([*verb.split(), '--help'])\n"
        "    except SystemExit as left: assert left.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'datasets', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    assert done.returncode == 0, done.stderr
    assert "usage: ptq quantize" in done.stdout


def test_python_m_ptq_is_the_command():
    done = python("import runpy, sys; sys.argv = ['ptq', 'quantize']; runpy.run_module('ptq', run_name='__main__')")
    assert done.returncode == 2 and done.stderr.startswith("ptq: error: the following arguments are required")


def test_a_reader_that_leaves_is_no_error(tmp_path):
    # a shell's `| head` closes the pipe before the verb has printed: here it is closed from the start
    code = (
        "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1)\n"
        "from ptq.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = start([sys.executable, "-c", code, "inspect", str(packed_dir(tmp_path / "d"))])
    assert done.returncode == 0 and done.stderr == ""


def test_every_verb_has_its_help_and_a_body():
    actions = build_parser()._subparsers._group_actions[0].choices
    assert list(actions) == ["plan", "quantize", "prune", "run", "eval", "generate", "export", "bench", "inspect", "list"]
    for name, parser in actions.items():
        assert parser.get_default("main") is not None, name
        assert parser.format_help().startswith(f"usage: ptq {name}")


def test_list_shows_all_there_is_to_choose(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*PRESETS, *METHODS, *FORMATS, "opt", "llama"))
    rows = {row[0]: row[1:] for row in preset_rows()}
    assert rows["W4A4"] == ["4", "8", "4", "4", "4", "8"]
    assert rows["W3A3KV"] == ["3", "-", "-", "3", "-", "-"]


# --- inspect

MODULE = {
    "kind": "linear",
    "bits": 4,
    "groups": 2,
    "codec": "affine",
    "scale_dtype": "float16",
    "input": None,
    "output": None,
}
MEASURED = {"name": "b.0.fc1", "shape": [8, 4], "bits": 4, "groups": 2, "effective_bits": 6.0, "relative_error": 0.0123}


def model_dir(path: Path, *, config: dict, report: dict | None = None) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    if report is not None:
        (path / "report.json").write_text(json.dumps(report))
    (path / "model.safetensors").write_bytes(b"\0" * 1000)
    return path


def packed_dir(path: Path) -> Path:
    norm = {"kind": "norm", "norm": "layernorm", "permuted": True, "rotation": 1, "quantizer": None}
    modules = {"b.0.fc1": MODULE, "b.0.norm": norm, "b.0.fc2": {**MODULE, "bits": 16}}
    quantization = {"quant_method": "ptq", "format_version": 2, "modules": modules}
    report = {
        "modules": [{**MEASURED, "damp": None, "attempts": 1, "seconds": 0.1}],
        "base_model": {"source": "org/m", "revision": "abc"},
        "bits": {"weights_effective": 6.0, "kv_bits_effective": None},
        "sizes": {"source_bytes": 4000, "compressed_bytes": 1000},
        "coverage": {
            "compressed_parameters": 32,
            "other_parameters": 9,
            "skipped": [{"name": "head", "reason": "tied"}],
        },
        "warnings": ["look here"],
    }
    return model_dir(path, config={"model_type": "ptq_opt", "quantization_config": quantization}, report=report)


def test_inspect_prints_an_aligned_table_and_what_is_not_compressed(tmp_path, capsys):
    assert main(["inspect", str(packed_dir(tmp_path / "d"))]) == 0
    out = capsys.readouterr().out
    heading, first, second = out.splitlines()[:3]
    assert first.split() == ["b.0.fc1", "8", "x", "4", "4", "2", "6.000", "0.012"]
    assert second.split() == ["b.0.fc2", "-", "16", "2", "-", "-"]
    assert heading.index("relative error") + len("relative error") == len(first)
    assert "b.0.norm" not in out and "1 of 2 linears compressed" in out
    assert "not compressed: head: tied" in out and "warning: look here" in out and "4.00x smaller" in out


def test_inspect_json_alone_on_stdout(tmp_path, capsys):
    assert main(["inspect", str(packed_dir(tmp_path / "d")), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quant_method"] == "ptq" and found["safetensors_bytes"] == 1000
    assert [m["name"] for m in found["modules"]] == ["b.0.fc1", "b.0.fc2"]
    assert found["modules"][0]["relative_error"] == 0.0123


def test_inspect_says_that_a_folder_is_full_precision(tmp_path, capsys):
    folder = model_dir(tmp_path / "d", config={"model_type": "opt"})
    assert main(["inspect", str(folder)]) == 0
    assert "opt, 0.0 MB of safetensors, full precision" in capsys.readouterr().out


def test_inspect_names_the_method_of_another_tool(tmp_path, capsys):
    folder = model_dir(
        tmp_path / "d", config={"model_type": "opt", "quantization_config": {"quant_method": "awq", "modules": 3}}
    )
    assert main(["inspect", str(folder)]) == 0
    assert "quantized by 'awq'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, part", [(None, "no config.json"), ("{", "not JSON"), ("[]", "expected a JSON object")]
)
def test_inspect_refuses_what_is_no_model_folder(content, part, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["inspect", str(tmp_path)]) == 2
    assert part in one_line(capsys)


@pytest.mark.parametrize("verb", ["inspect", "eval", "generate --prompt x"])
def test_a_folder_that_is_not_there(verb, tmp_path, capsys):
    assert main([*verb.split(), str(tmp_path / "gone")]) == 2
    assert "no such folder" in one_line(capsys)


def test_json_to_a_folder_that_is_not_there(tmp_path, capsys):
    folder = packed_dir(tmp_path / "d")
    assert main(["inspect", str(folder), "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert "cannot be written" in one_line(capsys)


# --- progress


class Terminal(StringIO):
    def isatty(self):
        return True


ROW = {"name": "a", "bits": 4, "effective_bits": 4.25, "sparsity": None, "relative_error": 0.5, "seconds": 1.0}


def test_module_lines_are_aligned():
    rows = [ROW, {**ROW, "name": "model.decoder.layers.31.self_attn.q_proj", "bits": 16, "effective_bits": 16.0}]
    lines = [module_line(row) for row in [*rows, {**ROW, "relative_error": None, "seconds": 1234.5}]]
    assert len({len(line) for line in lines}) == 1 and len({line.index("error") for line in lines}) == 1
    assert "4 bits ( 4.25 effective)" in lines[0] and "5.000e-01" in lines[0]


def test_plain_progress_goes_on_from_where_a_run_resumed():
    out = StringIO()
    progress = Progress(stream=out, every=0)
    assert list(progress.track(range(3, 5), label="block", total=5, start=3)) == [3, 4]
    assert [line.split(",")[0] for line in out.getvalue().splitlines()] == ["block: 4/5", "block: 5/5"]


def test_a_short_run_prints_no_progress_lines():
    out = StringIO()
    assert list(Progress(stream=out, every=3600).track("ab", label="block")) == ["a", "b"]
    assert out.getvalue() == ""


def test_quiet_prints_nothing_and_verbose_adds_details():
    quiet, plain, loud = (StringIO() for _ in range(3))
    for stream, options in ((quiet, {"quiet": True}), (plain, {}), (loud, {"verbose": True})):
        progress = Progress(stream=stream, every=0, **options)
        for _ in progress.track([1]):
            progress.line(module_line(ROW))
        progress.detail("detail")
    assert quiet.getvalue() == ""
    assert module_line(ROW) in plain.getvalue() and "detail" not in plain.getvalue()
    assert "detail" in loud.getvalue()


def test_a_terminal_gets_a_bar_and_lines_above_it():
    out = Terminal()
    progress = Progress(stream=out)
    for _ in progress.track([1, 2], label="block"):
        progress.line("a line")
    assert "block:" in out.getvalue() and out.getvalue().count("a line\n") == 2
    assert progress.bar is None


def test_parse_returns_a_namespace_with_the_verb_body():
    assert isinstance(parse(["list"]), argparse.Namespace) and callable(parse(["list"]).main)
