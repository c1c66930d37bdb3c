"""GPTQ's checkpoint layout, as AutoGPTQ (v1) and GPTQModel (v2) write it.

A linear is qweight int32 [C b / 32, R], packed along the input channels, qzeros int32 [G, R b / 32], packed along the rows, scales float16
[G, R] and g_idx int32 [C], the group of each channel. v1 stores each zero point less one, and readers do not agree on what a stored -1 is,
so a group there must not have the zero point 0. The whole model has one width and one group size; groups need not lie together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ptq.errors import BadInput
from ptq.export.codes import Codes, Weight, measured, rounded
from ptq.export.folder import Stored, write_config, write_shards
from ptq.export.grids import all_symmetric, common_group, quantized
from ptq.export.source import Source, plain_config, refuse_other_linears
from ptq.export.words import from_words, to_words
from ptq.ledger import write_json


def write(source: Source, folder: Path, variant: str | None) -> dict[str, Any]:
    """Write `source` into `folder` as "v1" or "v2"; None is v1 where all zero points are the middle code, else v2.

    Raises:
        UnsupportedModel: a family whose linears the format cannot name.
        BadInput: several widths, channels or rows that fill no whole words, or for v1 a zero point 0.
    """
    refuse_other_linears(source, "gptq")
    bits, size = _bits(source), common_group(source, scattered=True)
    version = variant or ("v1" if all_symmetric(source) else "v2")
    whole: list[str] = []
    symmetric, ordered = [], []

    def store(weight: Weight) -> Stored:
        if weight.codes is None and weight.why is None:
            whole.append(weight.name)
            return {"weight": weight.weight}, measured(weight, weight.weight, stored="full precision", bits=16)
        C = weight.weight.shape[1]
        codes, why = (None, None) if weight.codes is None else _regrouped(weight.codes, size or C)
        why = why or weight.why
        stored = "codes" if why is None else "rounded"
        codes = rounded(weight.weight, bits, size or C) if codes is None else codes
        where = f"{source.folder}: {weight.name}"
        codes = _without_zero(codes, where) if version == "v1" else codes
        symmetric.append(codes.symmetric)
        ordered.append(bool((codes.group.diff() < 0).any()))
        tensors = layout(codes, version, where)
        return tensors, measured(weight, _read(tensors, bits, version), stored=stored, bits=bits, group=size, why=why)

    rows = write_shards(source, folder, store)
    quantization = {
        "quant_method": "gptq",
        "checkpoint_format": {"v1": "gptq", "v2": "gptq_v2"}[version],
        "bits": bits,
        "group_size": size or -1,
        "desc_act": any(ordered),
        "sym": all(symmetric),
        "lm_head": False,
        "pack_dtype": "int32",
    }
    if whole:
        quantization["dynamic"] = {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in whole}
    write_json(folder / "quantize_config.json", quantization)
    write_config(source, folder, plain_config(source) | {"quantization_config": quantization})
    return {"variant": version, "modules": rows, "notes": _notes(version, quantization)}


def _bits(source: Source) -> int:
    """The width of all codes. Raises BadInput for several, or for shapes that no whole number of words holds."""
    linears = [linear for _, linear, _ in quantized(source)]
    found = {linear.bits for linear in linears}
    if len(found) != 1:
        raise BadInput(f"{source.folder}: its linears have codes of {sorted(found)} bits; gptq has one width for all")
    bits = found.pop()
    for linear in linears:
        for count, what in ((linear.in_features, "input channels"), (linear.out_features, "rows")):
            if count * bits % 32:
                what = f"a linear has {count} {what}, which at {bits} bits fill no whole number of 32-bit words"
                raise BadInput(f"{source.folder}: {what}; gptq cannot hold it")
    return bits


def _regrouped(codes: Codes, size: int) -> tuple[Codes | None, str | None]:
    """The same weights in groups of `size` channels each, or why that cannot be."""
    if (codes.group.bincount() % size != 0).any():
        return None, f"its groups cannot be cut into groups of {size} channels"
    order = codes.group.argsort(stable=True)
    first, group = codes.group[order[::size]], torch.empty_like(codes.group)
    group[order] = torch.arange(order.numel()) // size
    return Codes(codes.codes, codes.scale[:, first], codes.zero[:, first], group, codes.bits), None


def _without_zero(codes: Codes, where: str) -> Codes:
    """The same weights without a zero point 0: such a group's codes move up by one if they can. Raises BadInput if not."""
    zero_c = (codes.zero == 0)[:, codes.group]  # [R, G] -> [R, C]
    if (zero_c & (codes.codes == 2**codes.bits - 1)).any():
        raise BadInput(
            f"{where}: a group of weights above 0 uses every code, which v1 cannot store; use --format gptq:v2"
        )
    return Codes(codes.codes + zero_c, codes.scale, codes.zero.clamp(min=1), codes.group, codes.bits)


def layout(codes: Codes, version: str, where: str) -> dict[str, torch.Tensor]:
    """Tensors of one linear, named `where` in what is raised. Raises BadInput for scales that float16 does not hold."""
    scales = codes.scale.half()
    if not (torch.isfinite(scales) & (scales > 0)).all():
        raise BadInput(f"{where}: its scales do not fit float16; use --format compressed-tensors")
    zero = codes.zero - int(version == "v1")
    return {
        "qweight": to_words(codes.codes, codes.bits).T.contiguous(),  # [R, C] -> [words, R]
        "qzeros": to_words(zero.T.contiguous(), codes.bits),  # [R, G] -> [G, words]
        "scales": scales.T.contiguous(),  # [R, G] -> [G, R]
        "g_idx": codes.group.to(torch.int32),
    }


def _read(tensors: dict[str, torch.Tensor], bits: int, version: str) -> torch.Tensor:
    """float32 [R, C]: what the stored tensors of one linear stand for."""
    group, scale = tensors["g_idx"].long(), tensors["scales"].float()
    codes = from_words(tensors["qweight"].T, bits, group.numel())  # [R, C]
    zero = from_words(tensors["qzeros"], bits, scale.shape[1]).float() + int(version == "v1")  # [G, R]
    return ((codes.T - zero[group]) * scale[group]).T  # [C, R] -> [R, C]


def _notes(version: str, quantization: dict[str, Any]) -> list[str]:
    found = []
    if version == "v1" and not quantization["sym"]:
        found.append("v1 with zero points: SGLang reads it, GPTQModel wants v2, vLLM (0.32) takes no zero points")
    if quantization["desc_act"]:
        found.append("groups are scattered (g_idx, desc_act): some kernels are slower or refuse it")
    return found
