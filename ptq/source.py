"""Open a model folder or hub id: config, and tensors read one at a time from safetensors.

Nothing in a checkpoint is trusted: shard names must be plain file names inside the folder, headers are checked against the
file sizes, weights must be finite, and pickled weights are refused.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ptq.errors import BadInput

HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
    "README.md",
]
# Subfolders hold other formats, and consolidated files the same weights once more.
NOT_HUB_FILES = ["*/*", "consolidated*"]
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a config and safetensors; `where` and `shapes` map a tensor's name to its file and shape."""

    folder: Path
    config: Any
    where: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    files: tuple[dict[str, Any], ...]

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Tensors by name, floating ones cast to `dtype` if given.

        Raises:
            BadInput: a name that is not there, an unreadable file, or NaN or infinite weights (with their count).
        """
        out = {}
        for name in names:
            tensor = self.read_part(name)
            out[name] = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
        return out

    def read_part(self, name: str, index: tuple[int | slice, ...] = ()) -> torch.Tensor:
        """tensor[index] of the tensor `name`; no more than that part is brought into memory.

        Raises:
            BadInput: as `read`.
        """
        if name not in self.where:
            raise BadInput(f"{self.folder}: tensor {name} is missing from the safetensors files")
        try:
            with safe_open(self.where[name], framework="pt") as f:
                tensor = f.get_slice(name)[index] if index else f.get_tensor(name)
        except (SafetensorError, OSError) as err:
            raise BadInput(f"{self.where[name]}: cannot read {name}: {err}; fetch the file again") from err
        if bad := not_finite(tensor):
            raise BadInput(f"{self.where[name]}: {name} has {bad} NaN or infinite of {tensor.numel()} weights")
        return tensor


def not_finite(x: torch.Tensor) -> int:
    """How many entries are NaN or infinite."""
    if not x.is_floating_point() or bool(torch.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)))):
        return 0  # a finite sum has finite terms, and is faster to have than a test of each
    return x.numel() - int(torch.isfinite(x).sum())


def resolve(model: str, *, revision: str | None = None, offline: bool = False, trust_remote_code: bool = False) -> Path:
    """The local folder of `model`: the folder itself, or the hub snapshot of an id; its code only if that is trusted.

    Raises:
        BadInput: neither a folder nor a hub id that can be had, or a revision of a folder.
    """
    path = Path(model)
    if path.is_dir():
        if revision is not None:
            raise BadInput(f"{model}: a local folder has no revision {revision!r}; leave --revision out")
        return path
    if path.exists() or model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise BadInput(f"{model}: not a model folder (a folder with config.json and *.safetensors)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = {"allow_patterns": HUB_FILES + ["*.py"] * trust_remote_code, "ignore_patterns": NOT_HUB_FILES}
    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=offline, **patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as err:
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise BadInput(f"{model}: no such folder, and the hub gave: {reason}") from err


def commit_of(folder: Path) -> str | None:
    """The commit of a hub snapshot (the cache names its folder so), None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def license_of(folder: Path) -> str | None:
    """The licence that a folder's model card declares in its YAML header, None if it declares none."""
    import yaml

    card = folder / "README.md"
    parts = card.read_text(encoding="utf8", errors="replace").split("---", 2) if card.is_file() else []
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        header = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    found = header.get("license") if isinstance(header, dict) else None
    return found if isinstance(found, str) else None


def open_checkpoint(folder: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Read the config and every safetensors header of `folder`.

    Raises:
        BadInput: no config, no safetensors, a truncated or corrupt file, or a checkpoint that is already quantized.
    """
    config = read_config(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method", "unknown method")
        raise BadInput(f"{folder}: already quantized ({method}); give the full-precision checkpoint")
    return Checkpoint(folder, config, *read_headers(folder))


def read_headers(folder: Path) -> tuple[dict[str, Path], dict[str, tuple[int, ...]], tuple[dict[str, Any], ...]]:
    """(tensor name -> file, tensor name -> shape, facts of each file) from the headers of a folder's safetensors.

    Raises:
        BadInput: no safetensors, a truncated or corrupt file, or a tensor that is in two files.
    """
    where, shapes, files = {}, {}, []
    for path in _shards(folder):
        found, facts = _header(path)
        files.append(facts)
        for name, shape in found.items():
            if name in where:
                raise BadInput(f"{folder}: tensor {name} is in both {where[name].name} and {path.name}")
            where[name], shapes[name] = path, shape
    return where, shapes, tuple(files)


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a folder; remote code runs only when asked for."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder}: no config.json, so not a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, StrictDataclassError) as err:
        from ptq.errors import UnsupportedModel

        reason = " ".join(str(err).split())
        unknown = "model type" in reason or "trust_remote_code" in reason
        raise (UnsupportedModel if unknown else BadInput)(f"{folder}/config.json: {reason[:300]}") from err


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as err:
            raise BadInput(f"{index}: not a safetensors index: {err}") from err
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise BadInput(f"{index}: shard name {name!r} is not a plain *.safetensors file name")
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        other = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        found = (
            f"found {', '.join(other[:3])}: pickled weights are refused, convert them to safetensors"
            if other
            else "found none"
        )
        raise BadInput(f"{folder}: needs model.safetensors or {INDEX}; {found}")
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise BadInput(
            f"{folder}: shard {missing[0]} is missing ({len(missing)} of {len(names)}); fetch the checkpoint again"
        )
    return [folder / n for n in names]


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 0 < length <= size - 8:
            raise BadInput(
                f"{path}: not a safetensors file or truncated (header of {length} in {size} bytes); fetch it again"
            )
        raw = f.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    except (ValueError, LookupError, AttributeError, TypeError) as err:
        raise BadInput(f"{path}: corrupt safetensors header: {err}") from err
    if end + 8 + length != size:
        raise BadInput(f"{path}: truncated: {size} bytes, its header promises {end + 8 + length}; fetch the file again")
    return shapes, {"name": path.name, "bytes": size, "header_sha256": hashlib.sha256(raw).hexdigest()}
