"""Write compressed checkpoints, and load any checkpoint to run it.

A compressed folder is a Hugging Face folder: one shard a block (written as soon as the block is done, so that a model larger than memory
streams through), a shard with the rest, the index, the config with its `quantization_config`, tokenizer files, recipe, report and card.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from lowbit.modules import Linear, Norm
from safetensors import safe_open
from torch import nn

import rptq
from ptq.architectures import Spec
from ptq.consistency import refuse_keys
from ptq.errors import BadInput
from ptq.hf import FORMAT_VERSION, MODEL_TYPE_PREFIX, QUANT_METHOD
from ptq.layout import source_tensors
from ptq.ledger import write_json, write_tensors, write_whole
from ptq.plots import FILE as RANGES
from ptq.recipe import Recipe, prunes
from ptq.recipe_build import dump_yaml
from ptq.reorder import Orders, order_of
from ptq.source import INDEX, Checkpoint, read_config, read_headers, resolve

# What belongs beside the weights; everything else in a source folder stays where it is.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
)


class Writer:
    """Writes one compressed checkpoint into `folder`, a block at a time.

    Packed, tensors have their names in the model. Dense (pruned weights as they are), the names and layout of the source.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        model: nn.Module,
        spec: Spec,
        recipe: Recipe,
        names: dict[str, str],
    ):
        self.folder, self.checkpoint, self.model = folder, checkpoint, model
        self.spec, self.recipe, self.names = spec, recipe, names
        self.dense = prunes(recipe) and recipe.pruning.storage == "dense"
        self.blocks = len(model.get_submodule(spec.blocks))

    def shard(self, i: int) -> Path:
        """File of block i; number `blocks` is the shard with everything outside the blocks."""
        return self.folder / f"model-{i + 1:05d}-of-{self.blocks + 1:05d}.safetensors"

    def write_block(self, i: int, block: nn.Module, ranges: dict[str, rptq.ChannelRange], orders: Orders) -> None:
        """The block's tensors, and its channel ranges (in the original channel order)."""
        if self.dense:
            tensors = source_tensors(block, self.model, self.spec, i, self.names, self.checkpoint)
        else:
            tensors = {f"{self.spec.blocks}.{i}.{name}": t for name, t in block.state_dict().items()}
        write_tensors(self.shard(i), tensors)
        facts = {}
        for name, found in ranges.items():
            facts |= {f"blocks.{i}.{name}.min": found.min, f"blocks.{i}.{name}.max": found.max}
            order = order_of(orders, name)
            if order is not None:
                facts |= {f"blocks.{i}.{name}.permutation": order.perm, f"blocks.{i}.{name}.sizes": order.sizes}
        if facts:
            write_tensors(self._ranges(i), facts)

    def module_specs(self, i: int, block: nn.Module) -> dict[str, Any]:
        """What the config must say of each lowbit module of the block; nothing of a dense one."""
        modules = block.named_modules(prefix=f"{self.spec.blocks}.{i}")
        return {name: m.spec() for name, m in modules if isinstance(m, (Linear, Norm)) and not self.dense}

    def write_rest(self, head: dict[str, Linear]) -> None:
        """Embeddings, final norm and head, as they are in the source, but for the packed linears of `head` by name."""
        rest = {n: source for n, source in self.names.items() if not n.startswith(f"{self.spec.blocks}.")}
        rest = {n: source for n, source in rest.items() if n.rpartition(".")[0] not in head}
        read = self.checkpoint.read(rest.values())
        tensors = read if self.dense else {name: read[source] for name, source in rest.items()}
        for name, linear in head.items():
            tensors |= {f"{name}.{local}": tensor for local, tensor in linear.state_dict().items()}
        write_tensors(self.shard(self.blocks), tensors)

    def finish(self, report: dict[str, Any], card: str, specs: dict[str, Any]) -> None:
        """Everything beside the shards: index, config, tokenizer, recipe, ranges, report and card."""
        self._write_index()
        self._write_config(specs)
        for name in COMPANIONS:
            if (self.checkpoint.folder / name).is_file():
                shutil.copyfile(self.checkpoint.folder / name, self.folder / name)
        self._join_ranges()
        write_whole(self.folder / "recipe.yaml", dump_yaml(self.recipe).encode())
        write_json(self.folder / "report.json", report)
        write_whole(self.folder / "README.md", card.encode())

    def weight_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(self.shard(i).stat().st_size for i in range(self.blocks + 1))

    def _ranges(self, i: int) -> Path:
        return self.folder / f"ranges-{i:05d}.safetensors"

    def _join_ranges(self) -> None:
        parts = [i for i in range(self.blocks) if self._ranges(i).is_file()]
        if parts and not (self.folder / RANGES).is_file():  # a finish that was killed may have removed some already
            ranges: dict[str, torch.Tensor] = {}
            for i in parts:
                with safe_open(self._ranges(i), framework="pt") as f:
                    ranges |= {name: f.get_tensor(name) for name in f.keys()}
            write_tensors(self.folder / RANGES, ranges)
        for i in parts:
            self._ranges(i).unlink()

    def _write_index(self) -> None:
        weight_map, total = {}, 0
        for i in range(self.blocks + 1):
            with safe_open(self.shard(i), framework="pt") as f:
                for name in f.keys():
                    weight_map[name] = self.shard(i).name
            total += self.shard(i).stat().st_size
        write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _write_config(self, specs: dict[str, Any]) -> None:
        config = json.loads((self.checkpoint.folder / "config.json").read_text(encoding="utf8"))
        config.pop("auto_map", None)  # the model runs no code of the source
        if self.dense:
            write_json(self.folder / "config.json", config)
            return
        config["model_type"] = MODEL_TYPE_PREFIX + self.checkpoint.config.model_type
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "softmax_bits": self.recipe.activations.softmax_bits if self.spec.attention_interface else 16,
            "kv_bits": self.recipe.activations.kv_bits,
            "modules": specs,
        }
        if self.recipe.weights.head < 16:
            config["tie_word_embeddings"] = False
        write_json(self.folder / "config.json", config)


def load(
    folder: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    stream: bool = False,
    device_map: str | dict[str, Any] | None = None,
    offload_folder: str | Path | None = None,
) -> nn.Module:
    """A causal language model ready to run, from a compressed folder, a full-precision folder or a hub id.

    Args:
        folder: a path, or a hub id. device: where the model is to run.
        dtype: of activations and unpacked weights; default float32 on the CPU, else the checkpoint's.
        stream: leave the blocks on disk and read each when its turn comes (`ptq.stream`); compressed folders, on the CPU.
        device_map: instead of `device`, where each module goes, as in transformers: "auto", or names with "cpu", "disk" or an accelerator.
        offload_folder: where what goes to disk is written, if it cannot be read from `folder`.

    Raises:
        BadInput: not a model, a format version this release does not know, tensors that do not fit the config, or a map that cannot be.
    """
    from transformers import AutoModelForCausalLM

    path = resolve(str(folder))
    config = read_config(path)
    check_format(path, config)
    read_headers(path)
    if stream and device_map is not None:
        raise BadInput("a model streams or has a device map, not both: leave out stream or device_map")
    if dtype is None:
        dtype = torch.float32 if _on_cpu(device, device_map) else "auto"
    try:
        if stream:
            from ptq.stream import load_streamed

            return load_streamed(path, config, device=device, dtype=dtype)
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            device_map=device_map,
            offload_folder=offload_folder,
        )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise BadInput(f"{path}: cannot be loaded: {' '.join(str(err).split())[:300]}") from err
    problems = ("missing_keys", "unexpected_keys", "mismatched_keys")
    told = [p for p in problems if p != "unexpected_keys" or is_compressed(config)]
    refuse_keys({problem.replace("_", " "): info.get(problem) or () for problem in told}, path)
    return model.eval() if device_map is not None else model.eval().to(device)


def _on_cpu(device: str, device_map: str | dict[str, Any] | None) -> bool:
    """Whether nothing computes elsewhere."""
    if isinstance(device_map, dict):
        return {str(where) for where in device_map.values()} <= {"cpu", "disk"}
    if device_map is None or device_map == "cpu":
        return torch.device(device).type == "cpu"
    return not torch.accelerator.is_available()


def is_compressed(config: Any) -> bool:
    """Whether the config is that of a folder this package wrote."""
    return str(config.model_type).startswith(MODEL_TYPE_PREFIX)


def check_format(path: Path, config: Any) -> None:
    """BadInput unless the packed format is one this release reads."""
    if not is_compressed(config):
        return
    version = dict(getattr(config, "quantization_config", None) or {}).get("format_version")
    if version != FORMAT_VERSION:
        raise BadInput(
            f"{path}: packed format version {version!r}, this release reads {FORMAT_VERSION}; upgrade ptq-toolkit"
        )


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id. trust_remote_code: run code that ships with it.

    Raises:
        BadInput: no usable tokenizer files.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise BadInput(f"{folder}: no usable tokenizer: {' '.join(str(err).split())[:200]}") from err
    if tokenizer.vocab_size == 0:  # what transformers makes of a folder that has none
        raise BadInput(f"{folder}: no usable tokenizer: it knows no tokens; copy tokenizer.json and its companions there")
    return tokenizer
