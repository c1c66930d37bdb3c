"""report.json is what its schema says, and docs/report.md names exactly the schema's keys, with their types."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from ptq.pipeline import compress
from ptq.progress import Progress
from ptq.recipe_build import build

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "ptq" / "assets" / "report.schema.json").read_text(encoding="utf8"))
WORDS = {"int": "integer", "float": "number", "bool": "boolean", "list": "array"}


def problems(report: dict) -> list[str]:
    errors = Draft202012Validator(SCHEMA).iter_errors(report)
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in errors]


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf8"))


def test_the_schema_is_one():
    Draft202012Validator.check_schema(SCHEMA)


# reordered and static; round to nearest; 2:4 in slots and at 4 bits; zeros in place; FlexGen's codec
@pytest.mark.parametrize(
    "family, settings",
    [("opt", "W4A8"), ("llama", "rows"), ("llama", "2:4"), ("opt", "zeros in place"), ("opt", "along rows")],
)
def test_a_real_run_fits(family, settings, packed):
    assert problems(report_of(packed(family, settings))) == []


def test_a_run_with_fine_groups_a_packed_head_and_dynamic_grids_fits(model_folder, text_file, tmp_path):
    recipe = build(
        model=str(model_folder("llama")),
        method="rptq+",
        preset="W4A4KV4",
        calibration={"text": str(text_file), "nsamples": 2, "seqlen": 24, "mode": "first"},
        clusters={"tile": 32},
        weights={"fine": 0.2, "head": 8},
    )
    report = compress(recipe, out=tmp_path / "out", device="cpu", progress=Progress(quiet=True))
    assert problems(report_of(tmp_path / "out")) == []
    assert report["modules"][-1]["name"] == "lm_head" and any(row["fine_share"] for row in report["modules"])
    assert report["run_time"]["dynamic_channels"] and report["bits"]["sinks"]


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda r: r.pop("warnings"), "'warnings' is a required property"),
        (lambda r: r.update(schema_version=2), "schema_version: 1 was expected"),
        (lambda r: r["modules"][0].update(bit=4), "('bit' was unexpected)"),
        (lambda r: r["modules"][0].update(shape=[1, 2, 3]), "modules.0.shape"),
        (lambda r: r["sites"][0].update(site="R2"), "sites.0.site"),
        (lambda r: r["sizes"].update(source_bytes=1.5), "sizes.source_bytes"),
        (lambda r: r["bits"].update(sinks=None), "bits.sinks"),
    ],
)
def test_the_schema_refuses_what_is_no_report(change, part, packed):
    report = copy.deepcopy(report_of(packed("opt", "W4A8")))
    change(report)
    found = problems(report)
    assert len(found) == 1 and part in found[0]


def keys_of(schema: dict, prefix: str = "") -> dict[str, tuple[set[str], str]]:
    """Path of every key -> its types and its description. Lists are marked by []."""
    found = {}
    for name, value in schema.get("properties", {}).items():
        kinds = value["type"] if isinstance(value["type"], list) else [value["type"]]
        found[prefix + name] = (set(kinds), value["description"])
        items = value.get("items") or {}
        found |= keys_of(value, f"{prefix}{name}.") | keys_of(items, f"{prefix}{name}[].")
    return found


def documented() -> dict[str, set[str]]:
    """Path of every key in the tables of docs/report.md -> its types. A heading of one name is the path of its table."""
    found, prefix = {}, ""
    for line in (ROOT / "docs" / "report.md").read_text(encoding="utf8").splitlines():
        if line.startswith("## "):
            prefix = "" if "," in line else f"{line[3:]}."
        elif line.startswith("| `"):
            keys, kinds = line.split("|")[1:3]
            kinds = kinds.replace(" of strings", "").replace(" of ints", "").strip().split(" or ")
            found |= {prefix + key: {WORDS.get(k, k) for k in kinds} for key in re.findall("`(.+?)`", keys)}
    return found


def test_the_documentation_names_exactly_the_keys_of_the_schema_and_their_types():
    known = keys_of(SCHEMA)
    assert documented() == {path: kinds for path, (kinds, _) in known.items()}
    assert len(known) > 60
    assert all(text and "\n" not in text for _, text in known.values())
