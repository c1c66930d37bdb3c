"""Opening checkpoints: what is found, what is read, and what is refused. Damaged folders are in end_to_end/test_bad_input.py."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from ptq.errors import BadInput, UnsupportedModel
from ptq.source import open_checkpoint, read_config, read_headers, resolve


def write(path, tensors):
    save_file(tensors, path, metadata={"format": "pt"})


def test_every_tensor_is_found_with_its_shape_and_read_back(model_folder):
    folder = model_folder("llama")
    checkpoint = open_checkpoint(folder)
    truth = load_file(folder / "model.safetensors")
    assert checkpoint.shapes == {name: tuple(t.shape) for name, t in truth.items()}
    assert checkpoint.config.model_type == "llama"
    read = checkpoint.read(truth)
    assert all(torch.equal(read[name], t) for name, t in truth.items())
    (facts,) = checkpoint.files
    assert facts["name"] == "model.safetensors" and facts["bytes"] == (folder / "model.safetensors").stat().st_size


def test_shards_are_joined_through_the_index(tmp_path):
    write(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    write(tmp_path / "b.safetensors", {"y": torch.arange(3)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    where, shapes, files = read_headers(tmp_path)
    assert {n: p.name for n, p in where.items()} == {"x": "a.safetensors", "y": "b.safetensors"}
    assert shapes == {"x": (2,), "y": (3,)} and [f["name"] for f in files] == ["a.safetensors", "b.safetensors"]
    write(tmp_path / "b.safetensors", {"x": torch.ones(2)})
    with pytest.raises(BadInput, match="tensor x is in both a.safetensors and b.safetensors"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", "..", ""], ids=repr
)
def test_shard_names_that_leave_the_folder_or_are_no_safetensors(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(BadInput, match="is not a plain .*safetensors file name"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": 3}}', '{"weight_map": {"x": []}}']
)
def test_an_index_that_is_none(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadInput, match="index.json"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"x": {}}',
        b'{"x": {"data_offsets": [0, 0]}}',
        b'{"x": 1}',
        b'{"x": {"data_offsets": [0], "shape": []}}',
    ],
)
def test_headers_that_are_none(header, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(BadInput, match="corrupt safetensors header"):
        read_headers(tmp_path)


def test_a_header_longer_than_its_file_is_not_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(BadInput, match="not a safetensors file or truncated"):
        read_headers(tmp_path)


def test_reading_casts_floats_only_and_refuses_what_is_no_number(model_folder, tmp_path):
    config = (model_folder("opt") / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    write(
        tmp_path / "model.safetensors",
        {"w": torch.ones(2), "i": torch.arange(2), "bad": torch.tensor([1.0, torch.nan, torch.inf])},
    )
    checkpoint = open_checkpoint(tmp_path)
    read = checkpoint.read(["w", "i"], torch.bfloat16)
    assert read["w"].dtype == torch.bfloat16 and read["i"].dtype == torch.int64
    with pytest.raises(BadInput, match="bad has 2 NaN or infinite of 3 weights"):
        checkpoint.read(["bad"])
    with pytest.raises(BadInput, match="tensor gone is missing"):
        checkpoint.read(["gone"])


def test_what_is_no_folder_and_no_hub_id(tmp_path):
    (tmp_path / "file").write_text("x")
    for name in (tmp_path / "gone", tmp_path / "file", "./gone", "~/gone", "a/b/c"):
        with pytest.raises(BadInput, match="not a model folder"):
            resolve(str(name))
    with pytest.raises(BadInput, match="no such folder, and the hub gave"):
        resolve("nobody/has-this-model", offline=True)


def test_a_local_folder_has_no_revision(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(BadInput, match="a local folder has no revision 'v1'; leave --revision out"):
        resolve(str(tmp_path), revision="v1")


@pytest.mark.parametrize("trust", [False, True])
def test_what_is_fetched_from_the_hub(trust, tmp_path, monkeypatch):
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    code = ["modeling_theirs.py"]
    others = ["consolidated.safetensors", "original/params.json", "onnx/model.safetensors", "model.bin", "onnx/run.py"]

    def fetch(model, *, allow_patterns, ignore_patterns, **options):
        files = [*wanted, *code, *others]
        found = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        assert list(found) == wanted + code * trust
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert resolve("them/model", trust_remote_code=trust) == tmp_path


def test_remote_code_does_not_run_unasked(model_folder, tmp_path):
    config = json.loads((model_folder("opt") / "config.json").read_text())
    config |= {"model_type": "their_own", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UnsupportedModel, match="config.json"):
        read_config(tmp_path)
    assert not (tmp_path / "ran").exists()
