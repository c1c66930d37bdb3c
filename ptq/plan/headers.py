"""A checkpoint of which only the headers are read: its tensors have shapes and dtypes and no memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ptq.errors import BadInput
from ptq.source import Checkpoint

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WORDS = {dtype: word for word, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Headers(Checkpoint):
    """A checkpoint whose tensors are read as empty ones on the meta device."""

    dtypes: dict[str, torch.dtype]

    def read_part(self, name: str, index: tuple[int | slice, ...] = ()) -> torch.Tensor:
        """tensor[index] of the tensor `name`, without memory."""
        return torch.empty(self.shapes[name], dtype=self.dtypes[name], device="meta")[index]


def headers_of(checkpoint: Checkpoint) -> Headers:
    """The same checkpoint, tensors empty.

    Raises:
        BadInput: a file that cannot be read, or a tensor of a dtype that no run takes.
    """
    dtypes = {}
    for path in sorted(set(checkpoint.where.values())):
        try:
            with safe_open(path, framework="pt") as f:
                words = {name: f.get_slice(name).get_dtype() for name in f.keys()}
        except (SafetensorError, OSError) as err:
            raise BadInput(f"{path}: cannot be read: {err}; fetch the file again") from err
        odd = next((name for name, word in words.items() if word not in DTYPES), None)
        if odd is not None:
            raise BadInput(f"{path}: {odd} is {words[odd]}, which is not one of {', '.join(DTYPES)}")
        dtypes |= {name: DTYPES[word] for name, word in words.items()}
    return Headers(**vars(checkpoint), dtypes=dtypes)


def file_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of a safetensors file of `tensors`, as `ptq.ledger.write_tensors` makes it: length, header, padding, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": WORDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-text // 8) * 8 + end
