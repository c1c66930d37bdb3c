"""Zero-shot tasks: how each makes contexts, continuations and the right answer of one row, and where its rows lie.

Prompts are those of lm-evaluation-harness (v0.4; tasks lambada_openai, piqa, arc_easy, hellaswag, winogrande), without
examples. A row is either as the hub publishes it or prepared: the right choice's index under `gold`, ARC's `choices` a
list, HellaSwag's `query` and `choices` preprocessed already.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq.errors import BadInput
from ptq.recipe_build import suggest


@dataclass(frozen=True)
class Item:
    """One question. `pairs` holds (context, continuation) of each choice; a last-word item has a single one."""

    pairs: tuple[tuple[str, str], ...]
    gold: int
    lengths: tuple[int, ...]  # characters of each choice, which normalized accuracy divides by


@dataclass(frozen=True)
class Task:
    """What makes an item of a row, and the hub's data set, configuration and split that hold the rows."""

    item: Callable[[dict[str, Any]], Item]
    hub: tuple[str, str | None, str]
    normalized: bool = False  # lm-evaluation-harness reports acc_norm
    last_word: bool = False  # one continuation an item, right when greedy decoding writes it


@dataclass(frozen=True)
class Questions:
    """The items of one task, the number of rows they are the first of, and where these come from."""

    task: str
    items: tuple[Item, ...]
    rows: int
    source: str
    sha256: str | None  # of the file's bytes; None for rows from the hub


def read_task(name: str, *, folder: str | None = None, limit: int | None = None, offline: bool = False) -> Questions:
    """The first `limit` items (default: all) of a task.

    Without a folder they come from the hub. In a folder they lie in its only file NAME*.jsonl, or in that of a folder
    just below, one JSON object a line.
    Raises BadInput: unknown task, no such file or several, not JSON, a key that is missing or of another type, no
    choice that could be right, a choice without text, hub out of reach.
    """
    if name not in TASKS:
        raise BadInput(f"unknown task {name!r}{suggest(name, TASKS)}")
    if limit is not None and limit < 1:
        raise BadInput(f"task {name}: the number of items, {limit}, must be at least 1")
    if folder is None:
        source, digest, rows = TASKS[name].hub[0], None, _hub_rows(name, offline)
    else:
        path = _task_file(name, Path(folder))
        content = path.read_bytes()
        source, digest, rows = path.name, hashlib.sha256(content).hexdigest(), _json_rows(path, content)
    if not rows:
        raise BadInput(f"{source}: holds no item of task {name}")
    items = tuple(_item(name, row, f"{source}: item {number}") for number, row in enumerate(rows[:limit], 1))
    return Questions(name, items, len(rows), source, digest)


def _lambada(row: dict[str, Any]) -> Item:
    context, _, word = _text(row, "text").rpartition(" ")
    return Item(((context, f" {word}"),), 0, (len(word),))


def _piqa(row: dict[str, Any]) -> Item:
    choices = [_text(row, "sol1"), _text(row, "sol2")]
    return _choices(f"Question: {_text(row, 'goal')}\nAnswer:", choices, _index(row, "label"))


def _arc_easy(row: dict[str, Any]) -> Item:
    choices = row["choices"]
    if isinstance(choices, dict):
        choices, gold = choices["text"], choices["label"].index(row["answerKey"])
    else:
        gold = _index(row, "gold")
    return _choices(f"Question: {_text(row, 'question')}\nAnswer:", choices, gold)


def _hellaswag(row: dict[str, Any]) -> Item:
    if "query" in row:
        return _choices(_text(row, "query"), row["choices"], _index(row, "gold"))
    context = f"{_text(row, 'activity_label')}: {_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
    return _choices(_cleaned(context), [_cleaned(ending) for ending in row["endings"]], _index(row, "label"))


def _winogrande(row: dict[str, Any]) -> Item:
    """Partial scoring (arXiv 1806.02847): what follows the blank is scored after each filling of it."""
    before, blank, after = _text(row, "sentence").partition("_")
    if not blank:
        raise ValueError("no blank '_' in its sentence")
    gold = _index(row, "gold") if "gold" in row else _index(row, "answer") - 1
    options = [_text(row, "option1"), _text(row, "option2")]
    pairs = tuple((before + option, f" {after.strip()}") for option in options)
    return Item(pairs, gold, tuple(len(option) for option in options))


def _choices(context: str, choices: list[str], gold: int) -> Item:
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise TypeError("its choices are no list of strings")
    if len(choices) < 2:
        raise ValueError(f"{len(choices)} choices leave nothing to choose from")
    return Item(tuple((context, f" {choice}") for choice in choices), gold, tuple(len(choice) for choice in choices))


def _cleaned(text: str) -> str:
    """lm-evaluation-harness's preprocessing of HellaSwag: the brackets are artifacts of WikiHow."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise TypeError(f"{key!r} is no string")
    return row[key]


def _index(row: dict[str, Any], key: str) -> int:
    """The index under `gold`, or under the hub's `key`; the hub writes some as strings."""
    value = row["gold"] if "gold" in row else row[key]
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"the right choice {value!r} is no index")
    return int(value)


TASKS: dict[str, Task] = {
    "lambada": Task(_lambada, ("EleutherAI/lambada_openai", "default", "test"), last_word=True),
    "piqa": Task(_piqa, ("baber/piqa", None, "validation"), normalized=True),
    "arc_easy": Task(_arc_easy, ("allenai/ai2_arc", "ARC-Easy", "test"), normalized=True),
    "hellaswag": Task(_hellaswag, ("Rowan/hellaswag", None, "validation"), normalized=True),
    "winogrande": Task(_winogrande, ("allenai/winogrande", "winogrande_xl", "validation")),
}


def _item(name: str, row: Any, where: str) -> Item:
    try:
        item = TASKS[name].item(row)
    except KeyError as err:
        raise BadInput(f"{where}: no key {err}, which task {name} reads; give the hub's rows or prepared ones") from err
    except (AttributeError, TypeError, ValueError) as err:
        raise BadInput(f"{where}: not of task {name}: {err}") from err
    if not 0 <= item.gold < len(item.pairs):
        raise BadInput(f"{where}: the right choice {item.gold} is none of the {len(item.pairs)} choices, from 0")
    for context, continuation in item.pairs:
        if not context.strip() or not continuation.strip():
            raise BadInput(f"{where}: an empty continuation or context, nothing to score: {(context, continuation)!r}")
    return item


def _task_file(name: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise BadInput(f"--task-files {folder}: no such folder")
    found = sorted([*folder.glob(f"{name}*.jsonl"), *folder.glob(f"*/{name}*.jsonl")])
    if len(found) != 1:
        several = f"several files: {', '.join(str(path) for path in found)}" if found else f"no file {name}*.jsonl"
        raise BadInput(f"--task-files {folder}: {several}; task {name} needs one")
    return found[0]


def _json_rows(path: Path, content: bytes) -> list[Any]:
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as err:
            raise BadInput(f"{path}: line {number} is not JSON: {err}") from err
    return rows


def _hub_rows(name: str, offline: bool) -> list[Any]:
    repo, config, split = TASKS[name].hub
    if offline:
        raise BadInput(f"task {name}: {repo} lies on the hub (offline); give local files with --task-files FOLDER")
    try:
        from datasets import load_dataset

        return list(load_dataset(repo, config, split=split))
    except ModuleNotFoundError as err:
        raise BadInput(f"task {name}: reading {repo} needs datasets: pip install datasets") from err
    except (OSError, ValueError) as err:
        raise BadInput(f"task {name}: {repo}: {type(err).__name__} from the hub; give --task-files FOLDER") from err
