"""Evaluate a model folder: perplexity of a text, how far it is from a reference, and zero-shot accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from ptq import perplexity
from ptq.checkpoint import load, load_tokenizer
from ptq.errors import BadInput
from ptq.folders import model_folder, read_json
from ptq.pipeline import pick_device
from ptq.tasks import TASKS, Questions, read_task
from ptq.texts import read_text
from ptq.zero_shot import describe as describe_task
from ptq.zero_shot import score_task


class Evaluation(TypedDict, total=False):
    """What `ptq eval --json` writes; a key is there if it was asked for.

    perplexity, and its standard error over windows (None for one window). kl: mean KL(reference || model) in nats a token.
    top1_agreement: share of tokens that both rank first. protocol: text, its sha256, windows and their length. tokens: predicted.
    tasks: by name, what `ptq.zero_shot.score_task` returns.
    """

    perplexity: float
    perplexity_stderr: float | None
    kl: float
    top1_agreement: float
    protocol: dict[str, Any]
    tokens: int
    tasks: dict[str, dict[str, Any]]


def evaluate(
    model: str | Path,
    *,
    text: str | None = None,
    protocol: str | None = None,
    seqlen: int | None = None,
    windows: int | None = None,
    batch_size: int = 4,
    against: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    task_files: str | Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    offline: bool = False,
) -> Evaluation:
    """Evaluate a model folder, compressed or full precision: `ptq eval` as a function, with the same numbers.

    Args:
        model: a model folder.
        text: a name ("bundled", "wikitext2", "ptb", "c4") or a file; None is "bundled", or no text beside `tasks`.
        protocol: "plain" (the default), "rptq" or "sparsegpt".
        seqlen: tokens a window, by default 2048 or all that the model takes. windows: only the first so many.
        batch_size: windows, or choices of tasks, at a time.
        against: the folder of a reference model with the same tokens; adds kl and top1_agreement.
        tasks: names of zero-shot tasks. task_files: the folder of their items, None for the hub. limit: only the first items of each.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N". offline: no network.

    Raises:
        BadInput, NumericalFailure (`ptq.errors`): one line each, for a bad folder, name or option, an option that would do nothing, and
            numbers that are not finite.
    """
    folder = model_folder(model)
    reference_folder = model_folder(against) if against else None
    questions = _questions(tasks, task_files=task_files, limit=limit, offline=offline)
    about_text = {"protocol": protocol, "seqlen": seqlen, "windows": windows, "against": against}
    if text is None and questions:
        _refuse(about_text, "is about a text, and --tasks alone evaluates none; add --text NAME|PATH")
    target = pick_device(device)
    tokenizer = load_tokenizer(folder)
    cut = None
    if text is not None or not questions:
        named = "plain" if protocol is None else protocol
        source = read_text("bundled" if text is None else text, protocol=named, offline=offline)
        length = default_seqlen(folder) if seqlen is None else seqlen
        cut = perplexity.windows_for(tokenizer, source, protocol=named, seqlen=length, limit=windows)
    if reference_folder and load_tokenizer(reference_folder).get_vocab() != tokenizer.get_vocab():
        raise BadInput(
            f"--against {against}: its vocabulary is not that of {folder}; give a model with the same tokens"
        )
    loaded = load(folder, device=target)
    found: Evaluation = {}
    if cut is not None:
        reference = load(reference_folder, device=target) if reference_folder else None
        found = _of_text(perplexity.evaluate(loaded, cut, batch_size=batch_size, reference_model=reference))
    if questions:
        scores = [score_task(loaded, tokenizer, each, batch_size=batch_size) for each in questions]
        found["tasks"] = {score["task"]: score for score in scores}
    return found


def describe(found: Evaluation) -> str:
    """One line for the text, and one for each task."""
    lines = [perplexity.describe(found)] if "perplexity" in found else []
    return "\n".join(lines + [describe_task(score) for score in found.get("tasks", {}).values()])


def default_seqlen(folder: Path) -> int:
    """2048, as in both papers, or `max_position_embeddings` where that is less; the protocol says which."""
    limit = read_json(folder / "config.json").get("max_position_embeddings")
    return min(2048, limit) if isinstance(limit, int) and limit > 1 else 2048


def _questions(
    tasks: Sequence[str] | None, *, task_files: str | Path | None, limit: int | None, offline: bool
) -> list[Questions]:
    """The items of each task, read before any model is loaded."""
    if tasks is None:
        _refuse({"task-files": task_files, "limit": limit}, f"is about tasks; add --tasks {','.join(TASKS)}")
        return []
    where = None if task_files is None else str(task_files)
    return [read_task(name, folder=where, limit=limit, offline=offline) for name in dict.fromkeys(tasks)]


def _refuse(options: dict[str, Any], why: str) -> None:
    """BadInput for the first option that was given and would do nothing."""
    for name, value in options.items():
        if value is not None:
            raise BadInput(f"--{name} {why}")


def _of_text(result: dict[str, Any]) -> Evaluation:
    found: Evaluation = {"perplexity": result["perplexity"], "perplexity_stderr": result["perplexity_stderr"]}
    if "kl" in result:
        found |= {"kl": result["kl"], "top1_agreement": result["top1_agreement"]}
    return found | {"protocol": result["protocol"], "tokens": result["tokens"]}
