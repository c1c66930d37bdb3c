"""compressed-tensors: `pack-quantized`, and `int-quantized` where 8-bit weights meet inputs of 8 bits.

`pack-quantized` holds a linear as weight_packed int32 [R, ceil(C b / 32)], weight_scale [R, G], weight_shape int64 [2] and, where zero
points are not all the middle code, weight_zero_point int32 [ceil(R b / 32), G], packed along the rows. `int-quantized` holds weight int8
[R, C], weight_scale and weight_zero_point int8 [R, G]. Codes are signed there, code - 2^(b-1), and packed with 2^(b-1) added again. Groups
are runs of equal length in the model's own channel order: the format no longer has a g_idx.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lowbit.modules import ActivationQuantizer, Linear, Norm

from ptq.errors import BadInput
from ptq.export.codes import Codes, Weight, measured, rounded, rounded_evenly
from ptq.export.folder import Stored, write_config, write_shards
from ptq.export.grids import all_symmetric, common_group, quantized
from ptq.export.source import Source, plain_config, refuse_other_linears
from ptq.export.words import from_words, to_words


def takes(module: Linear | Norm, quantizer: ActivationQuantizer) -> bool:
    """Whether a config group can say how the input of linears is rounded: a grid a token, or one static grid."""
    plain = quantizer.mode == "token" or quantizer.mode == "static" and quantizer.clusters == 1
    return plain and not quantizer.sinks and module.rotation == 1


def write(source: Source, folder: Path, variant: str | None) -> dict[str, Any]:
    """Write `source` into `folder`; variant "symmetric" moves every zero point to the middle code.

    Raises:
        UnsupportedModel: a family whose linears the format cannot name.
        BadInput: rounded inputs of a linear in full precision, or a static input grid that does not hold 0.
    """
    refuse_other_linears(source, "compressed-tensors")
    whole_numbers, group = _is_w8a8(source), common_group(source, scattered=False)
    symmetric = variant == "symmetric" or all_symmetric(source)
    schemes: dict[str, dict[str, Any] | None] = {}

    def store(weight: Weight) -> Stored:
        if weight.codes is None and weight.why is None:
            if weight.quantizer is not None:
                what = f"{weight.name} is in full precision, its input is not; --weights-only leaves that out"
                raise BadInput(f"{source.folder}: {what}")
            schemes[weight.name] = None
            return {"weight": weight.weight}, measured(weight, weight.weight, stored="full precision", bits=16)
        codes, size, why = _expressed(weight, group, symmetric)
        tensors = (int_quantized if whole_numbers else pack_quantized)(codes, size, symmetric=symmetric)
        tensors["weight_scale"] = _in_dtype(tensors["weight_scale"], source.dtype)
        schemes[weight.name] = {"weights": _weight_args(codes.bits, size, symmetric)} | _input(source, weight, tensors)
        stored = "codes" if codes is weight.codes and why is None else "rounded"
        row = measured(weight, _read(tensors, codes.bits), stored=stored, bits=codes.bits, group=size, why=why)
        return tensors, row

    rows = write_shards(source, folder, store)
    form = "int-quantized" if whole_numbers else "pack-quantized"
    config = plain_config(source) | {"quantization_config": _quantization_config(form, schemes)}
    write_config(source, folder, config)
    return {"variant": form, "modules": rows, "notes": _notes(form, schemes)}


def _is_w8a8(source: Source) -> bool:
    """Whether inputs are rounded and every quantized weight has 8 bits."""
    found = [
        (linear.bits, linear.input_quantizer if norm is None else norm.quantizer)
        for _, linear, norm in quantized(source)
    ]
    return any(quantizer is not None for _, quantizer in found) and {bits for bits, _ in found} == {8}


def _expressed(weight: Weight, size: int | None, symmetric: bool) -> tuple[Codes, int | None, str | None]:
    """(codes that the format can hold, channels of a group or None for a row, why they are not the source's)."""
    codes, why, C = weight.codes, weight.why, weight.weight.shape[1]
    size = None if size is None or C % size else size
    if codes is not None and codes.run_length() % (size or C):
        codes, why = None, f"its groups are no runs of {size or C} channels in the model's own order"
    if codes is not None and (codes.symmetric or not symmetric):
        return codes, size, why
    why = why or "its zero points are moved to the middle"
    return (rounded_evenly if symmetric else rounded)(weight.weight, weight.bits, size or C), size, why


def _grids(codes: Codes, size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero uint8) [R, C / size]: one a run of channels, so that a wide group's come several times."""
    first = codes.group[:: size or codes.group.numel()]  # [C] -> [C / size]
    return codes.scale[:, first].contiguous(), codes.zero[:, first].contiguous()


def _in_dtype(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In the model's dtype, as readers that multiply in the scale's own expect; bfloat16 would round it, so it then stays as it is."""
    return scale.to(dtype) if torch.equal(scale.to(dtype).float(), scale.float()) else scale


def pack_quantized(codes: Codes, size: int | None, *, symmetric: bool) -> dict[str, torch.Tensor]:
    """Tensors of a linear whose groups are runs of `size` channels, None for whole rows; symmetric: zero points need not be told."""
    scale, zero = _grids(codes, size)
    tensors = {
        "weight_packed": to_words(codes.codes, codes.bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = to_words(zero.T.contiguous(), codes.bits).T.contiguous()  # [R, G] -> [words, G]
    return tensors


def int_quantized(codes: Codes, size: int | None, *, symmetric: bool) -> dict[str, torch.Tensor]:
    """The same with 8-bit codes as int8."""
    scale, zero = _grids(codes, size)
    tensors = {"weight": (codes.codes.to(torch.int16) - 128).to(torch.int8), "weight_scale": scale}
    if not symmetric:
        tensors["weight_zero_point"] = (zero.to(torch.int16) - 128).to(torch.int8)
    return tensors


def _read(tensors: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """float32 [R, C]: what the stored tensors of one linear stand for."""
    scale, point = tensors["weight_scale"].float(), tensors.get("weight_zero_point")
    R, G = scale.shape
    if "weight" in tensors:
        codes, zero = tensors["weight"].float(), 0 if point is None else point.float()
    else:
        codes = from_words(tensors["weight_packed"], bits, int(tensors["weight_shape"][1])).float()
        zero = 2 ** (bits - 1) if point is None else from_words(point.T, bits, R).T.float()
    zero = torch.as_tensor(zero, dtype=torch.float32).expand(R, G)
    grouped = codes.unflatten(1, (G, -1))  # [R, C] -> [R, G, n]
    return ((grouped - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)  # [R, G, n] -> [R, C]


def _weight_args(bits: int, size: int | None, symmetric: bool) -> dict[str, Any]:
    args = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    return args | ({"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size})


def _input(source: Source, weight: Weight, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How the linear's input is rounded, for its config group; a static grid's tensors are added to `tensors`."""
    quantizer = weight.quantizer
    if quantizer is None:
        return {}
    if quantizer.mode == "token":
        args = {"num_bits": quantizer.token_bits, "strategy": "token", "dynamic": True}
    else:
        bits, zero = int(quantizer.bits), int(quantizer.zero)
        if not 0 <= zero < 2**bits:
            what = f"{weight.name}: its input's grid of {bits} bits has its zero at code {zero}, outside"
            raise BadInput(f"{source.folder}: {what}; compressed-tensors cannot say that, --weights-only leaves it out")
        args = {"num_bits": bits, "strategy": "tensor", "dynamic": False}
        tensors["input_scale"] = quantizer.scale.clone()  # linears that share an input share the grid
        tensors["input_zero_point"] = (quantizer.zero - 2 ** (bits - 1)).to(torch.int8)
    return {"input_activations": {"type": "int", "symmetric": False, **args}}


def _quantization_config(form: str, schemes: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    """Linears of one scheme are one config group; a group of all that are not ignored is named by its class."""
    groups, different = {}, []
    for scheme in schemes.values():
        if scheme is not None and scheme not in different:
            different.append(scheme)
    for i, scheme in enumerate(different):
        names = [name for name, theirs in schemes.items() if theirs == scheme]
        groups[f"group_{i}"] = {"targets": names if len(different) > 1 else ["Linear"], "format": form, **scheme}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *(name for name, scheme in schemes.items() if scheme is None)],
    }


def _notes(form: str, schemes: dict[str, dict[str, Any] | None]) -> list[str]:
    if form == "int-quantized" and any(s and not s["weights"]["symmetric"] for s in schemes.values()):
        how = "--format compressed-tensors:symmetric rounds them so"
        return [f"weights have zero points, which transformers reads; vLLM's W8A8 kernels want symmetric ones: {how}"]
    return []
