"""transformers' quantizer plugin for the packed format."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lowbit
import torch
from lowbit import integer
from lowbit.experts import Experts
from lowbit.sinks import attach as spare_sinks
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ptq import offload
from ptq.architectures import FAMILIES, Spec, has_experts
from ptq.consistency import check_filled, check_names, check_packed
from ptq.hf import FORMAT_VERSION, MODEL_TYPE_PREFIX, QUANT_METHOD
from ptq.sites import block_sites, norm_of
from ptq.source import read_headers
from ptq.trim import give_back


class PtqConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed checkpoint.

    modules: full module name -> what the lowbit module is (`lowbit.modules`); softmax_bits, kv_bits: 16 for full precision.
    """

    def __init__(
        self,
        modules: dict[str, Any] | None = None,
        softmax_bits: int = 16,
        kv_bits: int = 16,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
    ):
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"packed format version {format_version!r}, this release of ptq-toolkit reads {FORMAT_VERSION}"
            )
        self.quant_method, self.format_version = QUANT_METHOD, format_version
        self.softmax_bits, self.kv_bits, self.modules = softmax_bits, kv_bits, modules or {}


class PtqQuantizer(HfQuantizer):
    """Builds the lowbit modules before the weights are read, and the packed KV cache after."""

    requires_calibration = True

    def update_attn_implementation(self, config: Any) -> Any:
        """Quantized probabilities need the attention function that quantizes them."""
        if self.quantization_config.softmax_bits < 16:  # set only for families whose attention is pluggable
            config._attn_implementation = _attention_name()
        return config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        spec = spec_of(model.config)
        take_experts_apart(model, spec)
        for name, module_spec in self.quantization_config.modules.items():
            owner, _, leaf = name.rpartition(".")
            parent = model.get_submodule(owner)
            with torch.device("meta"):
                new = lowbit.build(module_spec, getattr(parent, leaf))
            setattr(parent, leaf, new)
            if not parent._buffers:  # transformers would initialize missing weights of its children, which are packed
                parent._is_hf_initialized = True
        for block in model.get_submodule(spec.blocks):
            block.get_submodule(spec.output.rpartition(".")[0]).softmax_bits = self.quantization_config.softmax_bits
        if kwargs.get("device_map") is not None:
            if kwargs.get("checkpoint_files"):  # `check_filled` finds nothing out once tensors have moved
                folder = Path(kwargs["checkpoint_files"][0]).parent
                _, shapes, _ = read_headers(folder)
                check_names(model, shapes, folder)
            offload.show_parameters(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        check_filled(model, model.name_or_path)
        offload.settle(model)
        check_packed(model, model.name_or_path)
        waiting = make_fast(model, spec_of(model.config))
        self.attach(model)
        if model.dtype == torch.float32 and on_cpu(model):  # native calls read addresses
            from ptq.native_decode import decode_natively

            make = partial(offload.streamed_decoder, waiting) if waiting else None
            decode_natively(model, spec_of(model.config), make=make)

    def attach(self, model: nn.Module) -> None:
        """Give `model` its attention function, sinks and packed cache; of its tensors only the activations' grids are read."""
        if self.quantization_config.softmax_bits < 16 and model.config._attn_implementation != _attention_name():
            model.set_attn_implementation(_attention_name())
        sinks = max((m.sinks for m in model.modules() if isinstance(m, lowbit.ActivationQuantizer)), default=0)
        if sinks:
            spare_sinks(model.get_submodule(spec_of(model.config).blocks.rpartition(".")[0]), sinks)
        from lowbit.cache import attach_packed_cache

        from ptq.kv import packed_kv_grids

        grids = packed_kv_grids(model, spec_of(model.config), self.quantization_config.kv_bits)
        if grids is not None:
            attach_packed_cache(model, list(model.get_submodule(spec_of(model.config).blocks)), grids)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def make_fast(model: nn.Module, spec: Spec) -> dict[lowbit.Linear, bool]:
    """Let linears leave out zeros where that is faster, and run on integer kernels where all of an input site can.

    Returns:
        the linears whose tensors are offloaded, and whether each runs on integer kernels.
    """
    blocks, waiting = list(model.get_submodule(spec.blocks)), {}
    for part in [*blocks, model.get_output_embeddings()]:
        with offload.at_hand(part):
            skip_zeros(part)
            if part in blocks:
                run_block_on_integers(part, spec, model.dtype)
            else:
                run_head_on_integers(model)
        waiting |= offload.let_go(part)
        give_back()
    return waiting


def on_cpu(model: nn.Module) -> bool:
    """Whether all of it computes on the CPU, wherever its tensors wait."""
    devices = {t.device.type for t in (*model.parameters(), *model.buffers())} - {"meta"}
    return devices | set(map(str, getattr(model, "hf_device_map", {}).values())) <= {"cpu", "disk"}


def run_head_on_integers(model: nn.Module) -> None:
    """Let a packed output head run on integer kernels."""
    head = model.get_output_embeddings()
    if isinstance(head, lowbit.Linear):
        integer.take([head], dtype=model.dtype)


def run_block_on_integers(block: nn.Module, spec: Spec, dtype: torch.dtype = torch.float32) -> None:
    """Let every input site of a block run on integer kernels whose linears all can. dtype: of activations."""
    for site in block_sites(spec, block):
        linears, norm = [block.get_submodule(path) for path in site.linears], norm_of(block, site)
        if site.router is None and all(isinstance(linear, lowbit.Linear) for linear in linears):
            integer.take(linears, norm if isinstance(norm, lowbit.Norm) else None, dtype=dtype)


def skip_zeros(model: nn.Module) -> None:
    """Let every sparse linear of a model or block leave out zeros where that is faster."""
    for module in model.modules():
        if isinstance(module, lowbit.Linear) and module.sparse is not None:
            module.skip_zeros_()


def _attention_name() -> str:
    """Registers the attention function. Not at the top: this module is imported while transformers is, perhaps by lowbit."""
    from lowbit.attention import NAME

    return NAME


def take_experts_apart(model: nn.Module, spec: Spec) -> None:
    """Give each expert linears of its own, as the packed format has them; transformers' module holds them fused."""
    for block in model.get_submodule(spec.blocks):
        if has_experts(spec, block):
            owner, _, leaf = spec.experts.module.rpartition(".")
            parent = block.get_submodule(owner)
            setattr(parent, leaf, Experts.full_precision(getattr(parent, leaf)))


def spec_of(config: Any) -> Spec:
    """The family's spec of a compressed model's config."""
    return FAMILIES[config.model_type.removeprefix(MODEL_TYPE_PREFIX)]
