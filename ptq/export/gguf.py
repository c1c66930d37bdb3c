"""GGUF for llama.cpp: one file with the tensors, what the architecture needs to know, and the tokenizer."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptq.architectures import geometry_of
from ptq.errors import BadInput, UnsupportedModel
from ptq.export import gguf_blocks
from ptq.export.codes import Weight, measured
from ptq.export.folder import parts
from ptq.export.gguf_tokenizer import add_tokenizer
from ptq.export.source import Source

FILE = "model.gguf"


@dataclass(frozen=True)
class Family:
    """What llama.cpp calls a family. interleaved: whether its rotary embedding pairs channels 2i and 2i + 1, so that the rows of queries
    and keys move. windows: every so-manieth block attends to all tokens, the others to a sliding window, unless the file says otherwise;
    0 where llama.cpp has no windows."""

    architecture: str
    interleaved: bool = False
    windows: int = 0


FAMILIES = {
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma2": Family("gemma2", windows=2),
    "gemma3_text": Family("gemma3", windows=6),
}

# ggml's numbers for a file of mostly such tensors.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES = {"f32": torch.float32, "f16": torch.float16}
FROM_CODES = {"Q4_0": gguf_blocks.q4_0, "Q4_1": gguf_blocks.q4_1, "Q8_0": gguf_blocks.q8_0}


def write(source: Source, folder: Path, variant: str | None) -> dict[str, Any]:
    """Write model.gguf into `folder`, the linears as `variant`, None for the smallest type that holds their codes.

    Raises:
        UnsupportedModel: a family, or a configuration of one, that llama.cpp has no words for.
        BadInput: no `gguf` package, or a tokenizer that cannot be told to llama.cpp.
    """
    try:
        import gguf
    except ImportError as err:
        raise BadInput("--format gguf needs the package gguf: pip install gguf") from err
    family = _family(source)
    writer = gguf.GGUFWriter(folder / FILE, family.architecture, use_temp_file=True)
    notes = _add_parameters(writer, source, family)
    add_tokenizer(writer, source)
    names = gguf.get_tensor_name_map(_architecture(gguf, family), source.blocks)
    rows, kinds = [], Counter()

    def add(name: str, data: torch.Tensor, kind: str) -> None:
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if there is None:
            raise UnsupportedModel(f"{source.folder}: {family.architecture} has no place for {name}")
        data = data[_row_order(source, family, name)]
        raw = data.contiguous() if kind in ("F32", "F16") else data.contiguous().view(torch.uint8)
        writer.add_tensor(there, raw.numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])

    for weights, plain in parts(source):
        for weight in weights:
            data, kind, row = _stored(gguf, weight, variant)
            add(f"{weight.name}.weight", data, kind)
            rows.append(row)
            kinds[kind] += 1
        for name, tensor in plain.items():
            add(name, *_plain(source, name, tensor))
    for name, tensor in _rotary_factors(source, family).items():
        writer.add_tensor(name, tensor.numpy())
    most = kinds.most_common(1)[0][0]
    writer.add_file_type(FILE_TYPES[most])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with (folder / FILE).open("rb+") as f:
        os.fsync(f.fileno())  # before the folder gets its name
    return {"variant": most.lower(), "modules": rows, "notes": notes}


def _family(source: Source) -> Family:
    spec, config = source.spec, source.checkpoint.config
    if spec.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedModel(f"{source.folder}: {spec.model_type} cannot be exported to gguf; these can: {known}")
    width = geometry_of(config, spec).head_dim
    if getattr(config, "query_pre_attn_scalar", width) != width:
        what = f"query_pre_attn_scalar {config.query_pre_attn_scalar}, llama.cpp takes the head width, {width}"
        raise UnsupportedModel(f"{source.folder}: {spec.model_type} with {what}")
    if getattr(config, "mlp_bias", False):
        raise UnsupportedModel(f"{source.folder}: {spec.model_type} with mlp_bias, which gguf export does not know")
    return FAMILIES[spec.model_type]


def _architecture(gguf: Any, family: Family) -> Any:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)


def _add_parameters(writer: Any, source: Source, family: Family) -> list[str]:
    """The architecture's numbers; returns what llama.cpp does otherwise."""
    config = source.checkpoint.config
    g = geometry_of(config, source.spec)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(source.blocks)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(g.heads)
    writer.add_head_count_kv(g.kv_heads)
    writer.add_key_length(g.head_dim)
    writer.add_value_length(g.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(g.rotary_dim)
    _add_rotary(writer, source)
    for name, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if getattr(config, name, None):
            add(getattr(config, name))
    return _add_windows(writer, source, family)


def _add_windows(writer: Any, source: Source, family: Family) -> list[str]:
    config = source.checkpoint.config
    kinds = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    windowed = ["sliding" in kind for kind in kinds] or [window is not None] * source.blocks
    if window is None or not any(windowed):
        return []
    if not family.windows:
        return [f"llama.cpp lets {source.spec.model_type} attend to all tokens, this model to the last {window}"]
    writer.add_sliding_window(window)
    usual = [(i + 1) % family.windows > 0 for i in range(source.blocks)]
    if windowed != usual:
        writer.add_sliding_window_pattern(windowed)
    return []


def _rotary(source: Source) -> dict[str, dict[str, Any]]:
    """Parameters of the rotary embedding by kind of block; families with one kind have it under "full_attention"."""
    found = dict(source.checkpoint.config.rope_parameters)
    return found if "rope_theta" not in found and "rope_type" not in found else {"full_attention": found}


def _add_rotary(writer: Any, source: Source) -> None:
    kinds = _rotary(source)
    for kind, parameters in kinds.items():
        scaling = parameters.get("rope_type", "default")
        known = ("default", "linear", "llama3") if kind == "full_attention" else ("default",)
        if scaling not in known or (scaling == "llama3" and source.spec.model_type != "llama"):
            what = f"a rotary embedding of type {scaling!r}, which gguf export does not know"
            raise UnsupportedModel(f"{source.folder}: {source.spec.model_type} with {what}")
    full = kinds["full_attention"]
    writer.add_rope_freq_base(full["rope_theta"])
    if full.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if "sliding_attention" in kinds:
        writer.add_rope_freq_base_swa(kinds["sliding_attention"]["rope_theta"])


def _rotary_factors(source: Source, family: Family) -> dict[str, torch.Tensor]:
    """What llama.cpp divides each frequency by, under Llama 3's scaling."""
    full = _rotary(source)["full_attention"]
    if full.get("rope_type") != "llama3":
        return {}
    scaled = source.model.get_submodule(source.model.base_model_prefix).rotary_emb.inv_freq.float()  # [D / 2]
    plain = full["rope_theta"] ** -(torch.arange(scaled.numel()) / scaled.numel())
    return {"rope_freqs.weight": plain / scaled}


def _row_order(source: Source, family: Family, name: str) -> torch.Tensor | slice:
    """Where the rows of a tensor come from: of queries and keys, pairs (i, i + D/2) of a head's channels become neighbours."""
    path = name.rpartition(".")[0]
    if not family.interleaved or not path.endswith(source.spec.qkv_linears[:2]):
        return slice(None)
    g = geometry_of(source.checkpoint.config, source.spec)
    heads = g.heads if path.endswith(source.spec.qkv_linears[0]) else g.kv_heads
    rows = torch.arange(heads * g.head_dim)
    return rows.view(heads, 2, g.head_dim // 2).transpose(1, 2).flatten()  # [H, 2, D/2] -> [H, D/2, 2] -> [H D]


def _plain(source: Source, name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, str]:
    """A tensor that is no decoder linear, and its type: vectors in float32, as ggml's kernels want them."""
    if tensor.ndim > 1:
        return tensor, PLAIN[tensor.dtype]
    shift = source.spec.norm == "rmsnorm_plus_one" and name.endswith("norm.weight")
    return tensor.float() + float(shift), "F32"


def _stored(gguf: Any, weight: Weight, variant: str | None) -> tuple[torch.Tensor, str, dict[str, Any]]:
    """(data [R, ...], ggml's type, the report's row) of one linear."""
    C = weight.weight.shape[1]
    never = weight.codes is None and weight.why is None
    if variant in DTYPES or (variant is None and never) or C % gguf_blocks.BLOCK:
        dtype = DTYPES.get(variant, weight.weight.dtype if never else torch.float16)
        data, why = weight.weight.to(dtype), None
        if variant not in (None, *DTYPES) or (variant is None and not never):
            why = f"{C} channels are no whole number of blocks of {gguf_blocks.BLOCK}"
        kind = PLAIN[dtype]
        return data, kind, measured(weight, data, stored=kind.lower(), bits=8 * data.element_size(), why=why)
    kinds = [variant.upper()] if variant else ["Q8_0"] if weight.bits == 8 else ["Q4_0", "Q4_1"]
    for kind in kinds:
        data = None if weight.codes is None else FROM_CODES[kind](weight.codes)
        if data is not None:
            stored = "codes" if weight.why is None else "rounded"
            return data, kind, _row(gguf, weight, data, kind, stored, weight.why)
    kind = kinds[-1]
    why = weight.why
    if weight.codes is not None:
        aligned = weight.codes.run_length() % gguf_blocks.BLOCK == 0
        why = f"its codes do not fit {kind}" if aligned else "its groups are no whole blocks of 32 channels in order"
    data = torch.from_numpy(gguf.quantize(weight.weight.float().numpy(), gguf.GGMLQuantizationType[kind]))
    return data, kind, _row(gguf, weight, data, kind, "rounded", why)


def _row(gguf: Any, weight: Weight, data: torch.Tensor, kind: str, stored: str, why: str | None) -> dict[str, Any]:
    written = torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))
    bits = 8 if kind == "Q8_0" else 4
    row = measured(weight, written, stored=stored, bits=bits, group=gguf_blocks.BLOCK, why=why)
    return row | {"type": kind.lower()}
