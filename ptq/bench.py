"""How fast models generate: each contender in a process of its own, one after another, round after round.

Rounds let slow phases of a machine hit all contenders alike; a process each makes the peak of memory that contender's own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptq.errors import BadInput
from ptq.memory import peak_bytes

RATES = ("prefill_tokens_per_second", "decode_tokens_per_second", "generation_tokens_per_second")


@dataclass(frozen=True)
class Contender:
    """One thing to time.

    kind: "transformers" (a model folder) or "llama_cpp" (a GGUF file). dtype: of torch, None for the folder's own way.
    stream: its blocks stay on disk (`ptq.stream`).
    """

    name: str
    kind: str
    path: str
    dtype: str | None = None
    stream: bool = False


@dataclass(frozen=True)
class Load:
    """What each contender does: read `prefill` tokens, then generate `decode` more one by one, `batch` sequences at once."""

    prefill: int = 512
    decode: int = 128
    batch: int = 1
    threads: int = 1
    device: str = "cpu"


def contenders(folder: Path, against: Path | None, gguf: Path | None, *, stream: bool = False) -> list[Contender]:
    """The folder itself, streamed if wished, the full-precision model as transformers runs it, and llama.cpp on a file.

    Raises:
        BadInput: llama.cpp is asked for and not installed.
    """
    found = [Contender("compressed", "transformers", str(folder), stream=stream)]
    if against is not None:
        kinds = ("float32", "bfloat16")
        found += [Contender(f"transformers_{kind}", "transformers", str(against), kind) for kind in kinds]
    if gguf is not None:
        if importlib.util.find_spec("llama_cpp") is None:
            raise BadInput("--gguf: llama.cpp is not installed; pip install llama-cpp-python")
        found.append(Contender("llama_cpp", "llama_cpp", str(gguf)))
    return found


def bench(found: list[Contender], load: Load, *, rounds: int, say=lambda text: None) -> dict[str, dict[str, Any]]:
    """By contender: medians over the rounds of tokens a second (prefill, decode, and generated over the time of both, FlexGen's
    throughput), the largest peak of memory in bytes, and the bytes of its files.

    Raises:
        BadInput: a contender fails, with what it said last.
    """
    runs: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in found}
    for i in range(rounds):
        for contender in found:
            say(f"round {i + 1} of {rounds}: {contender.name}")
            runs[contender.name].append(_in_a_process(contender, load))
    return {contender.name: _summary(contender, load, runs[contender.name]) for contender in found}


def _summary(contender: Contender, load: Load, runs: list[dict[str, float]]) -> dict[str, Any]:
    found = {key: statistics.median(run[key] for run in runs) for key in ("prefill_seconds", "decode_seconds")}
    read, written = load.prefill * load.batch, load.decode * load.batch
    both = found["prefill_seconds"] + found["decode_seconds"]
    # the first new token comes out of the prefill
    rates = (read / found["prefill_seconds"], (written - load.batch) / found["decode_seconds"], written / both)
    peak = max(int(run["peak_bytes"]) for run in runs)
    return {**dict(zip(RATES, rates)), "peak_bytes": peak, "file_bytes": file_bytes(Path(contender.path))}


def file_bytes(path: Path) -> int:
    """Of a model folder its safetensors, else of the file."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _in_a_process(contender: Contender, load: Load) -> dict[str, float]:
    job = json.dumps({"contender": asdict(contender), "load": asdict(load)})
    environment = {**os.environ, "OMP_NUM_THREADS": str(load.threads)}
    command = [sys.executable, "-m", "ptq.bench", job]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BadInput(f"{contender.name} ({contender.path}): {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run(contender: Contender, load: Load) -> dict[str, float]:
    """Time one contender in this process: `prefill_seconds`, `decode_seconds`, `peak_bytes`."""
    timed = {"transformers": _run_transformers, "llama_cpp": _run_llama_cpp}[contender.kind]
    return timed(contender, load)


def _run_transformers(contender: Contender, load: Load) -> dict[str, float]:
    import torch

    from ptq import checkpoint

    torch.set_num_threads(load.threads)
    dtype = getattr(torch, contender.dtype) if contender.dtype else None
    model = checkpoint.load(contender.path, device=load.device, dtype=dtype, stream=contender.stream)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (load.batch, load.prefill), generator=random).to(load.device)
    cuda = torch.device(load.device).type == "cuda"

    def now() -> float:
        if cuda:
            torch.cuda.synchronize(load.device)
        return time.perf_counter()

    def generate(ids, tokens: int) -> tuple[float, float]:
        start = now()
        out = model(ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)  # [B, 1, V] -> [B, 1]
        middle = now()
        for _ in range(tokens - 1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)  # [B, 1, V] -> [B, 1]
        return middle - start, now() - middle

    with torch.inference_mode():
        generate(ids[:, : min(8, load.prefill)], 3)  # first calls allocate and compile
        prefill, decode = generate(ids, load.decode)
    peak = torch.cuda.max_memory_allocated(load.device) if cuda else peak_bytes()
    return {"prefill_seconds": prefill, "decode_seconds": decode, "peak_bytes": peak}


def _run_llama_cpp(contender: Contender, load: Load) -> dict[str, float]:
    import llama_cpp
    import numpy

    options = {"n_threads": load.threads, "n_threads_batch": load.threads, "n_ctx": load.prefill + load.decode + 8}
    model = llama_cpp.Llama(contender.path, n_batch=load.prefill, logits_all=False, verbose=False, **options)
    ids = numpy.random.default_rng(0).integers(0, model.n_vocab(), load.prefill).tolist()

    def next_token() -> int:
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(numpy.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())

    def generate(ids: list[int], tokens: int) -> tuple[float, float]:
        model.reset()
        start = time.perf_counter()
        model.eval(ids)
        token = next_token()
        middle = time.perf_counter()
        for _ in range(tokens - 1):
            model.eval([token])
            token = next_token()
        return middle - start, time.perf_counter() - middle

    generate(ids[:8], 3)
    prefill, decode = generate(ids, load.decode)
    return {"prefill_seconds": prefill, "decode_seconds": decode, "peak_bytes": peak_bytes()}


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    try:
        print(json.dumps(run(Contender(**told["contender"]), Load(**told["load"]))))
    except Exception as err:  # the parent shows the last line
        sys.exit(f"{type(err).__name__}: {' '.join(str(err).split())}")
