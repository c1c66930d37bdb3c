"""The model card is made from the report alone, and docs/report.md explains every key of it."""

import copy
from pathlib import Path

import pytest
import yaml

from ptq.card import model_card
from ptq.recipe import to_dict
from ptq.recipe_build import build

ROOT = Path(__file__).resolve().parents[2]

REPORT = {
    "schema_version": 1,
    "tool": {"ptq": "0.1.0", "torch": "2.9", "transformers": "5.13", "python": "3.12"},
    "base_model": {
        "source": "facebook/opt-125m",
        "revision": "27dcfa74d334bc871f3234de431e71c6eeba5dd6",
        "model_type": "opt",
        "license": "other",
        "files": [{"name": "model.safetensors", "bytes": 250, "header_sha256": "00"}],
    },
    "recipe": to_dict(build(model="facebook/opt-125m", preset="W4A4")),
    "calibration": {
        "source": "bundled",
        "text_sha256": "aa",
        "fingerprint": "bb" * 32,
        "requested": 16,
        "used": 16,
        "dropped": 0,
        "seqlen": 512,
        "tokens": 8192,
    },
    "modules": [
        {
            "name": "model.decoder.layers.0.fc1",
            "shape": [3072, 768],
            "bits": 4,
            "groups": 32,
            "sparsity": None,
            "keep": None,
            "storage": "packed",
            "effective_bits": 4.7,
            "relative_error": 0.0123,
            "damp": 0.01,
            "attempts": 1,
            "tokens": 8192,
            "failure": None,
            "seconds": 0.5,
        }
    ],
    "sites": [
        {
            "block": 0,
            "site": "R1",
            "channels": 768,
            "clusters": 32,
            "bits": 8,
            "grid": "cluster",
            "permuted": True,
            "note": None,
            "rotation": 64,
        },
        {
            "block": 0,
            "site": "q",
            "channels": 768,
            "clusters": 48,
            "bits": 4,
            "grid": "channel",
            "permuted": False,
            "note": "rotary channels are not permuted",
        },
    ],
    "coverage": {
        "compressed_parameters": 750,
        "other_parameters": 250,
        "skipped": [{"name": "lm_head", "reason": "outside the blocks"}],
    },
    "bits": {
        "weights_effective": 4.7,
        "activations_effective": 4.75,
        "sinks": 1,
        "kv_bits_effective": 4.5,
        "softmax": 8,
    },
    "run_time": {"multiplications": 20000, "hadamard_additions": 300, "dynamic_channels": 768},
    "sparsity": None,
    "sizes": {"source_bytes": 250, "compressed_bytes": 100},
    "seconds": 12.5,
    "peak_bytes": 1000,
    "warnings": ["H needed more damping"],
}

EVALUATION = {
    "perplexity": 12.3456,
    "perplexity_stderr": 0.25,
    "kl": 0.0123,
    "top1_agreement": 0.9,
    "tokens": 1000,
    "protocol": {"protocol": "rptq", "text": "wikitext2/test", "sha256": "cc", "seqlen": 2048, "windows": 3},
}


def changed(**sections) -> dict:
    report = copy.deepcopy(REPORT)
    for name, value in sections.items():
        report[name] = {**report[name], **value} if isinstance(report.get(name), dict) else value
    return report


def header_and_body(report: dict) -> tuple[dict, str]:
    _, header, body = model_card(report).split("---\n", 2)
    return yaml.safe_load(header), body


def test_the_header_is_what_the_hub_reads():
    header, _ = header_and_body(REPORT)
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "facebook/opt-125m",
        "base_model_relation": "quantized",
        "license": "other",
        "tags": ["ptq", "quantized", "rptq", "w4a4"],
    }


def test_the_first_thing_to_read_is_the_import_that_makes_loading_work():
    _, body = header_and_body(REPORT)
    code = body.split("```")[1].splitlines()
    assert body.strip().startswith("```python")
    assert code[1] == "import ptq  # registers the packed format"
    compile("\n".join(code[1:]), "card", "exec")


def test_an_unknown_licence_is_left_out_not_invented():
    header, _ = header_and_body(changed(base_model={"license": None}))
    assert "license" not in header


def test_a_local_path_is_not_published():
    text = model_card(
        changed(
            base_model={"source": "/secret/home/opt-tiny/", "revision": None}, calibration={"source": "/secret/my.txt"}
        )
    )
    assert "secret" not in text and "opt-tiny" in text and "my.txt" in text
    assert "base_model" not in yaml.safe_load(text.split("---\n")[1])


def test_what_is_not_low_bit_is_said():
    limits = model_card(REPORT).split("## What is not low-bit")[1]
    assert "250 of 1,000 parameters (25.0%)" in limits
    assert "norm outputs" in limits and "softmax, attention probabilities: 8 bits" in limits
    assert "`lm_head`: outside the blocks" in limits and "rotary channels are not permuted" in limits
    assert "H needed more damping" in limits
    assert "queries" not in limits.split("`lm_head`")[0]  # at 4 bits they are low-bit


def test_what_a_token_costs_at_run_time_is_said():
    said = (
        "1.50% as many additions for Hadamard matrices as the linears have multiplications and the ranges of 768 values"
    )
    assert said in model_card(REPORT)
    free = {"multiplications": 20000, "hadamard_additions": 0, "dynamic_channels": 0}
    assert "at run time" not in model_card({**REPORT, "run_time": free})


def test_effective_bits_and_spared_sinks_are_said():
    bits = model_card(REPORT).split("## Bits")[1]
    assert "4.700 a compressed weight, 4.750 a value that enters a linear, 4.500 a cached key or value" in bits
    assert "the first 1 of a sequence's tokens" in bits
    plain = model_card(changed(bits={"activations_effective": 16, "sinks": 0})).split("## Bits")[1]
    assert "enters a linear" not in plain and "Full precision, and" not in plain


@pytest.mark.parametrize(
    "bits, expected", [({"preset": "W4A16"}, "16 (full precision)"), ({"preset": "W4A4"}, "| 4 |")]
)
def test_the_table_follows_the_recipe(bits, expected):
    table = model_card(changed(recipe=to_dict(build(**bits)))).split("## Bits")[1].split("Effective")[0]
    row = next(line for line in table.splitlines() if line.startswith("| queries"))
    assert expected in row


def test_softmax_that_stays_in_full_precision_is_not_called_low_bit():
    text = model_card(changed(bits={"softmax": 16}))  # the recipe asks for 8
    assert "| softmax | 16 (full precision) |" in text
    assert "- softmax, attention probabilities: full precision." in text


def test_bits_without_a_preset_have_a_name_too():
    built = build(weights={"bits": 4}, activations={"kv_bits": 3})
    assert "# opt-125m" not in model_card(changed(recipe=to_dict(built)))
    assert "# facebook/opt-125m, W4A3KV, rptq" in model_card(changed(recipe=to_dict(built)))


def test_one_note_on_many_blocks_is_one_line():
    site = REPORT["sites"][1]
    text = model_card({**REPORT, "sites": [{**site, "block": block} for block in range(32)]})
    assert text.count("rotary channels are not permuted") == 1 and "site q, 32 blocks:" in text


def test_an_evaluation_carries_its_protocol():
    text = model_card({**REPORT, "evaluation": EVALUATION})
    assert "Perplexity 12.3456 ± 0.2500 over 1,000 tokens" in text and "KL 0.01230" in text
    assert "protocol 'rptq', text 'wikitext2/test', sha256 'cc', seqlen 2048, windows 3" in text
    assert "## Evaluation" not in model_card(REPORT)


def test_modules_without_an_error_are_no_error_of_zero():
    modules = [{**REPORT["modules"][0], "relative_error": None}]
    assert "Relative output error" not in model_card({**REPORT, "modules": modules})


def keys_of(value) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values())) if value else set()
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


def test_the_documentation_explains_every_key():
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf8")
    known = keys_of({name: value for name, value in REPORT.items() if name != "recipe"}) | {"recipe"}
    unexplained = {key for key in known if f"`{key}`" not in text and f".{key}`" not in text}
    assert not unexplained
