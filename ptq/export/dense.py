"""Plain safetensors: every weight as a number, under the names published checkpoints have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ptq.errors import BadInput
from ptq.export.codes import Weight, measured
from ptq.export.folder import Stored, write_config, write_shards
from ptq.export.source import Source, plain_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write(source: Source, folder: Path, variant: str | None) -> dict[str, Any]:
    """Write `source` into `folder` in the dtype `variant`, None for that of the model which was compressed.

    Raises:
        BadInput: a folder that is plain already, or weights beyond the range of the dtype.
    """
    if not source.packed:
        raise BadInput(f"{source.folder}: is plain safetensors already, nothing in it is packed; use it as it is")
    dtype = source.dtype if variant is None else DTYPES[variant]
    name = str(dtype).removeprefix("torch.")

    def store(weight: Weight) -> Stored:
        written = weight.weight.to(dtype)
        if not torch.isfinite(written).all():
            raise BadInput(f"{source.folder}: {weight.name} does not fit {name}; use --format dense:float32")
        row = measured(weight, written, stored=name, bits=8 * written.element_size())
        return {"weight": written.T if source.transposed else written}, row  # Conv1D: [R, C] -> [C, R]

    rows = write_shards(source, folder, store, None if variant is None else dtype)
    config = plain_config(source)
    if variant is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = name
    write_config(source, folder, config)
    return {"variant": name, "modules": rows, "notes": []}
