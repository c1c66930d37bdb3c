"""Packed checkpoints under accelerate's device_map: the same numbers, and packed tensors, which are buffers, in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ptq
from ptq.errors import BadInput


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "opt"
    how = {"method": "gptq", "preset": "W4A8", "nsamples": 2, "seqlen": 64, "device": "cpu", "offline": True}
    return ptq.quantize(Path(ptq.__file__).parent / "assets" / "tiny-opt", out, **how).folder


def half_on_disk(model):
    """A device map: the second half of the blocks on disk."""
    inner = model.model.decoder
    places = {f"model.decoder.{name}": "cpu" for name, _ in inner.named_children() if name != "layers"}
    half = len(inner.layers) // 2
    blocks = {f"model.decoder.layers.{i}": "cpu" if i < half else "disk" for i in range(len(inner.layers))}
    return places | blocks | {"lm_head": "cpu"}


@torch.no_grad()
def test_half_of_the_blocks_on_disk_computes_the_same(folder, tmp_path):
    whole, ids = ptq.load(folder), torch.randint(2, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    how = {"device_map": half_on_disk(whole), "offload_folder": tmp_path, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"} and not any(t.is_meta for t in model.state_dict().values())
    assert torch.equal(model(ids).logits, whole(ids).logits)
    more = [one.generate(ids, max_new_tokens=5, do_sample=False) for one in (model, whole)]
    assert torch.equal(*more)


def test_packed_tensors_cannot_be_offloaded(folder, tmp_path):
    how = {"device_map": half_on_disk(ptq.load(folder)), "offload_folder": tmp_path, "dtype": torch.float32}
    with pytest.raises(BadInput, match="was offloaded.*stream=True") as error:
        AutoModelForCausalLM.from_pretrained(folder, **how, offload_buffers=True)
    assert "\n" not in str(error.value)
