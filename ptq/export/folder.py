"""The Hugging Face folder that an export writes: one shard a block, index, config, tokenizer and the export's report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ptq.checkpoint import COMPANIONS
from ptq.errors import BadInput
from ptq.export.codes import Weight, measured, weight_of, weights_of
from ptq.export.source import Source, block_of, head_of, others, outside, published_name
from ptq.ledger import write_json, write_tensors
from ptq.source import INDEX

REPORT = "export.json"

# Tensors of one linear, by what follows its name, and its row of the report.
Stored = tuple[dict[str, torch.Tensor], dict[str, Any]]


def new_folder(out: Path) -> Path:
    """OUT.partial, new and empty. Raises BadInput if it is there or cannot be made."""
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError as err:
        raise BadInput(f"{partial}: left behind by another run; remove it or choose another --out") from err
    except (NotADirectoryError, PermissionError) as err:
        raise BadInput(f"{partial}: cannot be made ({err.strerror}); choose another --out") from err
    return partial


def parts(source: Source) -> Iterator[tuple[Iterable[Weight], dict[str, torch.Tensor]]]:
    """(linears, all other tensors by name in the model) of each block, then of what is outside; a packed head is a linear there."""
    for i in range(source.blocks):
        block = block_of(source, i)
        yield weights_of(source.spec, f"{source.spec.blocks}.{i}", block), others(source, i, block)
    head = head_of(source)
    yield [] if head is None else [weight_of(source.head, head, None)], outside(source)


def write_shards(
    source: Source, folder: Path, store: Callable[[Weight], Stored], dtype: torch.dtype | None = None
) -> list[dict[str, Any]]:
    """Write every tensor under its published name, and the index; returns the linears' rows.

    Args:
        store: what becomes of a linear of a block. A packed head becomes numbers, which every engine takes.
        dtype: of every other tensor, None for its own.
    """
    rows, where, total = [], {}, 0
    for i, (weights, plain) in enumerate(parts(source)):
        tensors = {}
        for weight in weights:
            stored, row = _numbers(weight, dtype or source.dtype) if weight.name == source.head else store(weight)
            rows.append(row)
            name = published_name(source.spec, f"{weight.name}.weight").removesuffix("weight")
            tensors |= {name + leaf: tensor for leaf, tensor in stored.items()}
        for name, tensor in plain.items():
            cast = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            tensors[published_name(source.spec, name)] = tensor.to(cast)
        shard = f"model-{i + 1:05d}-of-{source.blocks + 1:05d}.safetensors"
        write_tensors(folder / shard, tensors)
        where |= dict.fromkeys(tensors, shard)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    return rows


def _numbers(weight: Weight, dtype: torch.dtype) -> Stored:
    written = weight.weight.to(dtype)
    name, bits = str(dtype).removeprefix("torch."), 8 * written.element_size()
    return {"weight": written}, measured(weight, written, stored=name, bits=bits, why="engines want a head of numbers")


def write_config(source: Source, folder: Path, config: dict[str, Any]) -> None:
    """config.json, and the source's tokenizer files, generation config and licence."""
    write_json(folder / "config.json", config)
    for name in COMPANIONS:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)


def finish(source: Source, folder: Path, name: str, facts: dict[str, Any], left_out: list[str]) -> dict[str, Any]:
    """Write export.json and return it. `facts`: variant, modules and notes."""
    import ptq

    report = {
        "format": name,
        **facts,
        "model_type": source.spec.model_type,
        "tool": {"ptq": ptq.__version__, "torch": torch.__version__},
        "left_out": left_out,
    }
    write_json(folder / REPORT, report)
    return report
