"""A tiny packed model with random weights as a case of gpu_check.py: its logits on a device beside the reference operations on the CPU.

A prompt, of which one row begins with padding, is run at once; then a token at a time, each with the cache of those before.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from _gpu_cases import Job
from lowbit import integer
from lowbit.cpu import native
from lowbit.modules import Linear
from lowbit.planar_cache import PlanarCacheLayer

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}
TOKENS = torch.arange(2 * 6).view(2, 6) * 37 + 3
BLOCKS = 2
PROMPT, PADDING = 4, 2  # tokens run at once; of which the first row's first are padding
# name -> options of `ptq.quantize`, and how far logits may be off, of the largest: where sums are added in another order, a number at
# the edge between two codes may fall to the other side.
PRESETS = {
    "W4A8": ({"preset": "W4A8", "tile": 64, "groups": 64, "settings": {"clusters.R3": 1}}, 0.01),
    "rptq+ W4A4KV4": ({"preset": "W4A4KV4", "method": "rptq+", "settings": {"weights.head": 8}}, 0.05),
}


def model(preset: str, device: torch.device) -> Job:
    """A small LLaMA, float32: every linear, norm and decoding step on the kernels."""
    options, near = PRESETS[preset]
    with TemporaryDirectory() as folder:
        _pack(Path(folder), options)
        with _kernels({}):
            expected = _logits(_load(folder, torch.device("cpu")))
        with _kernels(_of(device)):
            packed = _load(folder, device)
    outside = [n for n, m in packed.named_modules() if isinstance(m, Linear) and m.planar is None]
    if outside:
        raise ValueError(f"{', '.join(outside)} run outside the integer kernels")

    def run():
        attend = patch.object(PlanarCacheLayer, "attend", autospec=True, side_effect=PlanarCacheLayer.attend)
        with _kernels(_of(device)), attend as calls:
            logits = _logits(packed)
        if calls.call_count != BLOCKS * (TOKENS.shape[1] - PROMPT):
            raise ValueError(f"{calls.call_count} blocks of all steps attend by the kernel")
        return logits

    def check(logits):
        off = (logits.double().cpu() - expected.double()).abs().max()
        return float((off / (near * expected.abs().max())).nan_to_num(torch.inf))

    return Job(run, check)


def _pack(folder: Path, options: dict) -> None:
    """Quantize a random model into `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import ptq
    from ptq.texts import ASSETS

    source = folder / "source"
    tokenizer = ptq.load_tokenizer(ASSETS / "tiny-opt")
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), num_hidden_layers=BLOCKS, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    tokenizer.save_pretrained(source)
    ptq.quantize(source, folder / "out", nsamples=8, seqlen=64, device="cpu", offline=True, **options)


def _of(device: torch.device) -> dict[str, integer.Kernels]:
    """The table of kernels with Triton's for `device`, which the interpreter runs on a CPU."""
    there = integer.KERNELS["cuda"]
    return {device.type: there if device.type == "cuda" else replace(there, run_on=lambda device: True)}


@contextmanager
def _kernels(known: dict[str, integer.Kernels]):
    """Within, there are these kernels alone, and no native calls of whole blocks."""
    with patch.dict(integer.KERNELS, known, clear=True), patch.object(native, "fast_avx2", lambda: False):
        yield


def _load(folder: str, device: torch.device) -> torch.nn.Module:
    import ptq

    return ptq.load(Path(folder) / "out", device=str(device), dtype=torch.float32)


@torch.no_grad()
def _logits(packed: torch.nn.Module) -> torch.Tensor:
    """Of the prompt and of every token after it, without padding."""
    ids, mask = TOKENS.to(packed.device), torch.ones_like(TOKENS, device=packed.device)
    mask[0, :PADDING], cache, logits, start = 0, None, [], 0
    for end in range(PROMPT, ids.shape[1] + 1):
        out = packed(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, end
        logits.append(out.logits[:, -2:])  # of the prompt's tokens those that are none of padding in either row
    return torch.cat(logits, 1)
