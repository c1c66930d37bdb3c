"""Zero-shot tasks, scored by the rules of lm-evaluation-harness: the log-likelihood of a continuation after its context.

The numbers equal that harness's (`--tasks lambada_openai,piqa,... --num_fewshot 0`) on the same items.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch

from ptq.errors import BadInput, NumericalFailure
from ptq.perplexity import check_fits, in_eval_mode
from ptq.tasks import TASKS, Item, Questions
from ptq.texts import token_ids

Request = tuple[tuple[int, ...], tuple[int, ...]]  # tokens of the context and of the continuation
Score = tuple[float, bool]  # log-likelihood in nats; whether each token of the continuation ranks first


def score_task(model, tokenizer, questions: Questions, *, batch_size: int = 4) -> dict[str, Any]:
    """Accuracy of a causal LM, called as `model(ids, use_cache=False).logits` [B, T, V], on the items of a task.

    accuracy: share of items whose right choice has the highest log-likelihood; the first of equal choices is taken.
    accuracy_norm (piqa, arc_easy, hellaswag): the same after each log-likelihood is divided by the choice's characters.
    lambada: share of items whose last word is what greedy decoding writes, and perplexity = exp(-mean log-likelihood)
    of that word, with its standard error by the delta method.
    Standard errors are sqrt(p (1 - p) / (n - 1)), None for one item. majority: what the most frequent answer scores,
    always the same position (for lambada: the same word).
    Raises BadInput (no token in a context or a continuation, continuation longer than the model takes, token outside
    the vocabulary, batch_size below 1) and NumericalFailure (log-likelihoods that are not finite, perplexity beyond
    float64).
    """
    if batch_size < 1:
        raise BadInput(f"batch_size {batch_size} must be at least 1")
    requests = [
        encode_pair(tokenizer, *pair, where=f"{questions.source}: item {number}")
        for number, item in enumerate(questions.items, 1)
        for pair in item.pairs
    ]
    longest = context_length(model, tokenizer)
    with in_eval_mode([model]):
        scores = iter(log_likelihoods(model, requests, longest=longest, batch_size=batch_size))
    grouped = [[next(scores) for _ in item.pairs] for item in questions.items]
    for number, found in enumerate(grouped, 1):
        if not all(math.isfinite(likelihood) for likelihood, _ in found):
            where = f"{questions.source}: item {number}"
            raise NumericalFailure(f"{where}: log-likelihood is not finite; run a wider dtype or compress less")
    return _summary(questions, grouped)


def encode_pair(tokenizer, context: str, continuation: str, *, where: str = "item") -> Request:
    """Tokens of context and continuation: both encoded as one text, which is cut after as many tokens as the context has.

    Spaces at the end of the context go to the continuation, as most tokenizers join a space to the word after it.
    Raises BadInput when either has no token.
    """
    kept = context.rstrip()
    start = token_ids(tokenizer, kept).tolist() if kept else []
    whole = token_ids(tokenizer, context + continuation).tolist()
    if not start or len(whole) <= len(start):
        pair = f"context {context[-40:]!r} and continuation {continuation[:40]!r}"
        raise BadInput(f"{where}: {pair}: each needs at least one token to be scored")
    return tuple(start), tuple(whole[len(start) :])


def context_length(model, tokenizer) -> int:
    """Tokens that the model takes at a time; an item that is longer loses the start of its context."""
    config = model.config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    most = tokenizer.model_max_length
    return int(most) if most < 1e30 else 2048  # transformers writes 1e30 where a tokenizer knows no length


@torch.inference_mode()
def log_likelihoods(model, requests: list[Request], *, longest: int, batch_size: int) -> list[Score]:
    """Score of each request, in their order. Equal requests are scored once, so that a tie is exactly a tie.

    Raises BadInput: a continuation longer than `longest`, a token outside the vocabulary.
    """
    found: dict[Request, Score] = {}
    order = sorted(set(requests), key=lambda request: (-len(request[0] + request[1]), request))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found |= zip(chosen, _score_batch(model, chosen, longest))
    return [found[request] for request in requests]


def describe(result: dict[str, Any]) -> str:
    """A result of `score_task` in one line: the numbers, then what they hold for."""

    def number(key: str) -> str:
        spread = result[f"{key}_stderr"]
        return f"{result[key]:.4f}" + ("" if spread is None else f" +- {spread:.4f}")

    normalized = f", normalized {number('accuracy_norm')}" if "accuracy_norm" in result else ""
    perplexity = f", perplexity of the last word {number('perplexity')}" if "perplexity" in result else ""
    part = "" if result["items"] == result["rows"] else f" of {result['rows']}"
    count = f"{'first ' if part else ''}{result['items']}{part} items"
    digest = "" if result["sha256"] is None else f", sha256 {result['sha256'][:12]}"
    numbers = f"{number('accuracy')}{normalized}, majority {result['majority']:.4f}{perplexity}"
    return f"{result['task']}: accuracy {numbers} (0-shot, {count}, {result['source']}{digest})"


def _score_batch(model, requests: list[Request], longest: int) -> list[Score]:
    rows = []
    for context, continuation in requests:
        if len(continuation) > longest:
            raise BadInput(f"a continuation of {len(continuation)} tokens exceeds the {longest} that the model takes")
        # the last token is only predicted, so one more than the model takes
        rows.append(torch.tensor((context + continuation)[-(longest + 1) :]))
    # padded at the right, where no token that counts can see it: causal attention needs no mask and positions stay
    batch = torch.nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True)  # [B, T]
    check_fits(model, batch)
    logits = model(batch.to(getattr(model, "device", batch.device)), use_cache=False).logits  # [B, T, V]
    scores = []
    for row, (_, continuation), one in zip(rows, requests, logits):
        count, last = len(continuation), len(row) - 1
        log_p = one[last - count : last].float().log_softmax(-1)  # [count, V]
        targets = row[-count:].to(log_p.device)
        likelihood = log_p.gather(-1, targets.unsqueeze(-1)).double().sum()  # [count, 1] -> []
        scores.append((float(likelihood), bool((log_p.argmax(-1) == targets).all())))
    return scores


def _summary(questions: Questions, scores: list[list[Score]]) -> dict[str, Any]:
    items, count = questions.items, len(questions.items)
    task = TASKS[questions.task]
    if task.last_word:
        right = [found[0][1] for found in scores]
        answers: Counter[object] = Counter(item.pairs[0][1] for item in items)
    else:
        right = [_best([one for one, _ in found]) == item.gold for item, found in zip(items, scores)]
        answers = Counter(item.gold for item in items)
    result = {"task": questions.task, "items": count, "rows": questions.rows, **_share("accuracy", right)}
    if task.normalized:
        result |= _share("accuracy_norm", [_normalized(item, found) for item, found in zip(items, scores)])
    result["majority"] = answers.most_common(1)[0][1] / count
    if task.last_word:
        result |= _perplexity([found[0][0] for found in scores])
    return result | {"source": questions.source, "sha256": questions.sha256}


def _normalized(item: Item, found: list[Score]) -> bool:
    return _best([one / length for (one, _), length in zip(found, item.lengths)]) == item.gold


def _best(values: list[float]) -> int:
    return values.index(max(values))


def _share(name: str, right: list[bool]) -> dict[str, float | None]:
    share, count = sum(right) / len(right), len(right)
    return {name: share, f"{name}_stderr": math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None}


def _perplexity(likelihoods: list[float]) -> dict[str, float | None]:
    values = torch.tensor(likelihoods, dtype=torch.float64)
    perplexity = float((-values.mean()).exp())
    if not math.isfinite(perplexity):
        raise NumericalFailure(f"mean loss {float(-values.mean()):.1f} nats: perplexity overflows; the model is broken")
    count = len(values)
    stderr = perplexity * float(values.std()) / math.sqrt(count) if count > 1 else None
    return {"perplexity": perplexity, "perplexity_stderr": stderr}
