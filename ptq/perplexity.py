"""Perplexity under named protocols, and KL divergence and top-1 agreement with a reference model."""

import math
import random
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ptq.errors import BadInput, NumericalFailure
from ptq.texts import Rule, Text, joined, protocol_rules, token_ids

POSITIONS = 256  # rows of the vocabulary that are held in float32 at a time


@dataclass(frozen=True)
class Windows:
    """int64 token windows [N, T] and the protocol that made them, which every printed perplexity carries."""

    tokens: torch.Tensor
    protocol: dict


def windows_for(tokenizer, text: Text, protocol: str = "rptq", seqlen: int = 2048, limit: int | None = None) -> Windows:
    """Cut a text (ptq.texts.read_text) into the windows [N, seqlen] of a named protocol; `limit` keeps the first few.

    Joined texts give consecutive windows without overlap, their last partial window left out, as in both papers' code.
    The windows carry no BOS of their own; one that the tokenizer puts at the start of the text stays there.
    Raises BadInput: unknown protocol, seqlen below 2, limit below 1, no full window, too few long documents to crop.
    """
    rule = protocol_rules(protocol)[text.kind]
    if seqlen < 2 or (limit is not None and limit < 1):
        raise BadInput(f"seqlen {seqlen} must be at least 2 and the number of windows, {limit}, at least 1")
    cut = _crops if rule.crops else _consecutive
    tokens = cut(tokenizer, text, rule, seqlen, math.inf if limit is None else limit)
    return Windows(
        tokens,
        {
            "protocol": protocol,
            "text": text.name,
            "sha256": text.sha256,
            "join": None if rule.crops else rule.join,
            "seqlen": seqlen,
            "windows": len(tokens),
            "limited": limit is not None and len(tokens) == limit,
            "bos": False,
            "text_starts_with_bos": int(token_ids(tokenizer, "a")[0]) == getattr(tokenizer, "bos_token_id", None),
        },
    )


@torch.inference_mode()
def evaluate(model, windows: Windows, *, batch_size: int = 4, reference_model=None) -> dict:
    """Perplexity of a causal LM, called as `model(ids, use_cache=False).logits` [B, T, V], on windows [N, T].

    perplexity = exp(mean over windows of the mean over T - 1 predicted tokens of -log p), in float32, sums in float64.
    perplexity_stderr = perplexity * sd(window means) / sqrt(N), the delta method over windows; None for one window.
    With a reference model also kl, the mean of KL(reference || model) in nats per predicted token, and top1_agreement,
    the share of predicted tokens where both rank the same token first.
    Returns perplexity, perplexity_stderr, tokens (predicted), windows, protocol (a dict), and those two if asked for.
    Raises BadInput (window longer than the config allows, token outside the vocabulary, batch_size below 1) and
    NumericalFailure (logits that are not finite, perplexity beyond float64).
    """
    if batch_size < 1:
        raise BadInput(f"batch_size {batch_size} must be at least 1")
    models = [model] if reference_model is None else [model, reference_model]
    for candidate in models:
        check_fits(candidate, windows.tokens)
    scores = []
    with in_eval_mode(models):
        for start in range(0, len(windows.tokens), batch_size):
            batch = windows.tokens[start : start + batch_size]
            scores.append(_score_batch(models, batch))
            if not all(value.isfinite().all() for value in scores[-1].values()):
                where = f"windows {start} to {start + len(batch) - 1}"
                raise NumericalFailure(f"logits are not finite in {where}; run a wider dtype or compress less")
    means = {name: torch.cat([score[name] for score in scores]) for name in scores[0]}  # each float64 [N]
    return _summary(means, windows)


def describe(result: Mapping[str, Any]) -> str:
    """A result of `evaluate` in one line: the numbers, then the protocol they hold under."""
    p = result["protocol"]
    stderr = result["perplexity_stderr"]
    spread = "" if stderr is None else f" +- {stderr:.4f}"
    against = f", KL {result['kl']:.5f} nats, top-1 agreement {result['top1_agreement']:.2%}" if "kl" in result else ""
    cut = "random crops of long documents" if p["join"] is None else f"join {p['join']!r}"
    count = f"{'first ' if p['limited'] else ''}{p['windows']} x {p['seqlen']} tokens"
    bos = "BOS only where a text starts" if p["text_starts_with_bos"] else "no BOS"
    where = f"{p['protocol']} protocol, {p['text']}, sha256 {p['sha256'][:12]}, {cut}, {count}, {bos}"
    return f"perplexity {result['perplexity']:.4f}{spread}{against} ({where})"


def _consecutive(tokenizer, text: Text, rule: Rule, seqlen: int, limit: float) -> torch.Tensor:
    ids = token_ids(tokenizer, joined(text, rule))
    count = min(len(ids) // seqlen, rule.windows or math.inf, limit)
    if count == 0:
        what = f"{len(ids)} tokens make no window of seqlen {seqlen}"
        raise BadInput(f"{text.name}: {what}; lower seqlen or give more text")
    return ids[: count * seqlen].view(count, seqlen)  # [T_all] -> [N, T]


def _crops(tokenizer, text: Text, rule: Rule, seqlen: int, limit: float) -> torch.Tensor:
    """RPTQ's and GPTQ's C4: draw a document until one is long enough, then a start in it; always from seed 0."""
    count = min(rule.crops, limit)
    known: dict[int, torch.Tensor] = {}

    def document(i: int) -> torch.Tensor:
        if i not in known:
            known[i] = token_ids(tokenizer, text.parts[i])
        return known[i]

    # strictly longer: the papers' code fails on a draw of exactly seqlen tokens.
    # As many documents as crops: with fewer, the crops would mostly repeat each other.
    long = 0
    for i in range(len(text.parts)):
        long += len(document(i)) > seqlen
        if long == count:
            break
    else:
        raise BadInput(
            f"{text.name}: {long} of {len(text.parts)} documents are longer than seqlen {seqlen}, {count} crops need "
            f"{count}; lower seqlen or the number of windows, or pack documents with --protocol plain"
        )
    rng = random.Random(0)
    crops = []
    while len(crops) < count:
        ids = document(rng.randint(0, len(text.parts) - 1))
        if len(ids) > seqlen:
            start = rng.randint(0, len(ids) - seqlen - 1)
            crops.append(ids[start : start + seqlen])
    return torch.stack(crops)  # [N, T]


def check_fits(model, tokens: torch.Tensor) -> None:
    """BadInput unless the model takes tokens [N, T]: T within its positions, each within its vocabulary."""
    config = getattr(model, "config", None)
    if config is None:
        return
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and tokens.shape[1] > most:
        raise BadInput(f"seqlen {tokens.shape[1]} exceeds the model's max_position_embeddings {most}; lower seqlen")
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and int(tokens.max()) >= vocabulary:
        token = int(tokens.max())
        raise BadInput(f"token id {token} is outside the vocabulary of {vocabulary}; use the model's own tokenizer")


@contextmanager
def in_eval_mode(models):
    """Dropout would make the number random; each model goes back to the mode it came in."""
    training = [model for model in models if getattr(model, "training", False)]
    for model in training:
        model.eval()
    try:
        yield
    finally:
        for model in training:
            model.train()


def _score_batch(models, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Window means, each float64 [B]: nll, and with a second model kl and top1."""
    logits = [model(batch.to(getattr(model, "device", batch.device)), use_cache=False).logits for model in models]
    last = batch.shape[1] - 1
    sums: dict[str, torch.Tensor] = {}
    for start in range(0, last, POSITIONS):
        stop = min(start + POSITIONS, last)
        # the logits at t predict token t + 1, so the last position of a window predicts nothing
        rows = [one[:, start:stop].to(logits[0].device) for one in logits]  # each [B, POSITIONS, V]
        targets = batch[:, start + 1 : stop + 1].to(logits[0].device)  # [B, POSITIONS]
        for name, value in _token_scores(rows, targets).items():
            total = value.double().sum(dim=1).cpu()  # [B]
            sums[name] = sums[name] + total if name in sums else total
    return {name: total / last for name, total in sums.items()}


def _token_scores(rows: list[torch.Tensor], targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """rows: one or two logits [B, P, V]; targets int64 [B, P] -> per token [B, P]: nll, and with two: kl, top1."""
    log_q = rows[0].float().log_softmax(-1)
    scores = {"nll": -log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)}  # [B, P, 1] -> [B, P]
    if len(rows) == 2:
        log_p = rows[1].float().log_softmax(-1)
        p = log_p.exp()
        # a token the reference rules out adds nothing, though 0 * log 0 is not a number
        scores["kl"] = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
        scores["top1"] = rows[0].argmax(-1) == rows[1].argmax(-1)
    return scores


def _summary(means: dict[str, torch.Tensor], windows: Windows) -> dict:
    nll = means["nll"]
    perplexity = float(nll.mean().exp())
    if not math.isfinite(perplexity):
        raise NumericalFailure(f"mean loss {float(nll.mean()):.1f} nats: perplexity overflows; the model is broken")
    count, length = windows.tokens.shape
    result = {
        "perplexity": perplexity,
        "perplexity_stderr": perplexity * float(nll.std()) / math.sqrt(count) if count > 1 else None,
        "tokens": count * (length - 1),
        "windows": count,
        "protocol": windows.protocol,
    }
    if "kl" in means:
        result |= {"kl": float(means["kl"].mean()), "top1_agreement": float(means["top1"].mean())}
    return result
