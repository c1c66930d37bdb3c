"""vLLM's linear layers on packed weights: one `lowbit.Linear` for each linear that vLLM has fused into a layer.

Imported by vLLM's plugin loader alone (`ptq.vllm_plugin.register`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import lowbit
import torch
from lowbit import integer
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ptq.consistency import check_packed
from ptq.hf import QUANT_METHOD
from ptq.vllm_plugin import check_runs, parts_of

PLACES = {"q": 0, "k": 1, "v": 2, None: 0}  # vLLM's names for the parts of a fused layer; others are numbers


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfig):
    """The `quantization_config` of a compressed folder, for vLLM."""

    def __init__(self, modules: dict[str, Any]):
        super().__init__()
        self.modules = {name: spec for name, spec in modules.items() if spec["kind"] == "linear"}

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # PyTorch operations only

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        check_runs(config)
        return cls(config["modules"])

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        specs = parts_of(prefix, self.packed_modules_mapping, self.modules)
        if specs is None:
            return UnquantizedLinearMethod()
        if get_tensor_model_parallel_world_size() > 1:
            raise ValueError(
                f"{prefix}: packed linears are not split over devices; leave out --tensor-parallel-size, or ptq export --format "
                "compressed-tensors"
            )
        return PackedLinearMethod(prefix, specs)


class PackedLinearMethod(LinearMethodBase):
    """Creates, fills and runs `layer.parts`; vLLM finds tensors by parameters, so each name has an empty one until all are loaded."""

    def __init__(self, prefix: str, specs: list[dict[str, Any]]):
        self.prefix, self.specs = prefix, specs

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make empty packed linears, and for each name of their tensors a parameter by which vLLM finds the loader of all parts."""
        self.dtype = params_dtype
        shapes = [(input_size, rows) for rows in output_partition_sizes]
        likes = [nn.Linear(*shape, bias=False, device="meta", dtype=params_dtype) for shape in shapes]
        layer.parts = nn.ModuleList(lowbit.build(spec, like) for spec, like in zip(self.specs, likes, strict=True))
        layer.absent = {(i, name) for i, part in enumerate(layer.parts) for name, _ in part.named_buffers()}
        for name in sorted({name for _, name in layer.absent}):
            owner, leaf = _owner(layer, name)
            place = nn.Parameter(torch.empty(0), requires_grad=False)
            place.weight_loader = partial(self._load, layer, name)
            owner.register_parameter(leaf, place)

    def _load(self, layer: nn.Module, name: str, _: nn.Parameter, tensor: torch.Tensor, shard_id: Any = None) -> None:
        i = PLACES.get(shard_id, shard_id)
        held = dict(layer.parts[i].named_buffers()).get(name)
        if held is None or held.shape != tensor.shape:
            shape = "nothing" if held is None else list(held.shape)
            raise ValueError(f"{self.prefix}, part {i}: {name} is {list(tensor.shape)}, the config says {shape}")
        held.copy_(tensor)
        layer.absent.discard((i, name))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Take the parameters away, check what was loaded and lay it out for the kernels; ValueError for a tensor that is missing."""
        if layer.absent:
            i, name = min(layer.absent)
            raise ValueError(
                f"{self.prefix}, part {i}: {name} is missing ({len(layer.absent)}); the checkpoint is corrupt"
            )
        for name in {name for part in layer.parts for name, _ in part.named_buffers()}:
            owner, leaf = _owner(layer, name)
            del owner._parameters[leaf]
        check_packed(layer.parts, self.prefix)
        for part in layer.parts:
            if part.sparse is not None:
                part.skip_zeros_()
        integer.take(list(layer.parts), dtype=self.dtype)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = torch.cat([part(x) for part in layer.parts], -1) if len(layer.parts) > 1 else layer.parts[0](x)
        return y if bias is None else y + bias


def _owner(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module of `layer` that holds parameter `name`, made where it is not there, and the last part of the name."""
    path, _, leaf = name.rpartition(".")
    if path and not hasattr(layer, path):
        layer.add_module(path, nn.Module())
    return (getattr(layer, path) if path else layer), leaf
