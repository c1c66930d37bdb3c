"""What makes a run resumable: a folder beside the output that always holds a consistent prefix of the work.

After block i the folder holds the shards of blocks 0..i, the live activations that leave block i (recomputing them would not give the
same bits), and a manifest that names both. The manifest is replaced last and atomically, so a run killed at any moment leaves the
state of the last whole block.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ptq import distributed
from ptq.errors import BadInput

MANIFEST = "ledger.json"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it appears whole or not at all."""
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)


def write_json(path: Path, data: Any) -> None:
    """JSON, whole or not at all."""
    write_whole(path, (json.dumps(data, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Safetensors on the CPU, whole or not at all."""
    partial = path.with_name(f".{path.name}.tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata={"format": "pt"})
    with partial.open("rb+") as f:  # the manifest that names this file must not reach the disk before it
        os.fsync(f.fileno())
    partial.replace(path)


def refuse_existing(out: Path, *, resume: bool = False) -> None:
    """BadInput if OUT is there. A run that was killed right after it appeared left its manifest in it: a resume removes that."""
    if not out.exists():
        return
    if resume and _is_manifest(out / MANIFEST):
        (out / MANIFEST).unlink()
        raise BadInput(f"{out}: this run is complete, nothing is left to resume")
    raise BadInput(f"{out}: exists already; choose another --out or remove it")


def _is_manifest(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf8")).keys() == {"identity", "completed", "records"}
    except (OSError, ValueError, AttributeError):
        return False


class Ledger:
    """The folder OUT.partial of one run. `completed` blocks are done; `records` holds one JSON value a block."""

    def __init__(self, folder: Path, identity: dict[str, str], completed: int, records: list[Any]):
        self.folder, self.identity, self.completed, self.records = folder, identity, completed, records

    @classmethod
    def open(cls, out: Path, identity: dict[str, str], *, resume: bool) -> Ledger:
        """Start a run in OUT.partial (made by `entering`), or continue the one that is there. The first of several processes looks.

        Args:
            identity: what the result depends on, name -> value (recipe, model, calibration tokens, software).

        Raises:
            BadInput: OUT exists; OUT.partial exists and `resume` is off; nothing to resume; the run there differs; or the
                processes' identities do.
        """
        changed = distributed.differing(identity)
        if changed:
            what = "all need the same files, software and kind of machine"
            raise BadInput(f"the processes of this run differ in {', '.join(changed)}; {what}")
        if distributed.rank() == 0:
            refuse_existing(out, resume=resume)
        folder = out.with_name(f"{out.name}.partial")
        found = cls(folder, identity, 0, [])
        if distributed.rank() == 0:
            if resume:
                found = cls._continue(folder, identity)
            elif folder.exists():
                raise BadInput(f"{folder}: an unfinished run is there; continue it with --resume or remove the folder")
        found.completed = int(distributed.total(torch.tensor(found.completed)))
        return found

    @classmethod
    def _continue(cls, folder: Path, identity: dict[str, str]) -> Ledger:
        try:
            state = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
            theirs, completed, records = dict(state["identity"]), int(state["completed"]), list(state["records"])
        except FileNotFoundError as err:
            mend = f"remove {folder} and leave --resume out" if folder.exists() else "leave --resume out"
            raise BadInput(f"{folder}: no unfinished run to resume; {mend}") from err
        except (ValueError, KeyError, TypeError, OSError) as err:
            raise BadInput(f"{folder}/{MANIFEST}: cannot be read ({err}); remove {folder} and start again") from err
        changed = [k for k in sorted(identity.keys() | theirs.keys()) if identity.get(k) != theirs.get(k)]
        if changed:
            what = "; ".join(f"{k} was {theirs.get(k)}, is {identity.get(k)}" for k in changed)
            raise BadInput(f"{folder}: this is another run: {what}; repeat the same command or remove the folder")
        return cls(folder, identity, completed, records)

    def entering(self, first: list[torch.Tensor]) -> list[torch.Tensor]:
        """The hidden states that enter the next block, one [B, T, C] a micro-batch: `first`, kept here, for block 0.

        Raises:
            BadInput: the folder cannot be made, or the states of a run to resume cannot be read.
        """
        path = self._activations(self.completed)
        began = self.completed == 0 and not path.is_file()
        if began and distributed.rank() == 0:
            self._make()
        distributed.wait()  # the others write into what the first has made
        if began:
            write_tensors(path, {str(i): x for i, x in enumerate(first)})
            return first
        try:
            tensors = load_file(path)
            return [tensors[str(i)] for i in range(len(tensors))]
        except (SafetensorError, OSError, KeyError) as err:
            raise BadInput(f"{path}: cannot be read ({err}); remove {self.folder} and start again") from err

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as err:
            raise BadInput(f"{self.folder}: cannot be made ({err.strerror}); choose another --out") from err
        self._save()

    def complete(self, states: list[torch.Tensor], record: Any) -> None:
        """Block `completed` is done: its shard is written, `states` leave it, `record` describes it.

        Each process keeps its own states; the manifest goes on when all have, and what was before goes when the manifest has gone on.
        """
        write_tensors(self._activations(self.completed + 1), {str(i): x for i, x in enumerate(states)})
        self.completed += 1
        self.records.append(record)
        distributed.wait()
        if distributed.rank() == 0:
            self._save()
        distributed.wait()
        self._activations(self.completed - 1).unlink(missing_ok=True)

    def finish(self, out: Path) -> None:
        """Drop the state and let the output appear."""
        for path in self.folder.glob("activations-*.safetensors"):
            path.unlink(missing_ok=True)  # another process may be removing its own
        for path in self.folder.glob(".*.tmp"):
            path.unlink()
        self.folder.rename(out)
        (out / MANIFEST).unlink()  # last: without it a run killed before the rename could not be resumed

    def _activations(self, i: int) -> Path:
        whose = "" if distributed.size() == 1 else f"-{distributed.rank():05d}"
        return self.folder / f"activations-{i:05d}{whose}.safetensors"

    def _save(self) -> None:
        state = {"identity": self.identity, "completed": self.completed, "records": self.records}
        write_json(self.folder / MANIFEST, state)
