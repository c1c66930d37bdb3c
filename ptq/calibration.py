"""Text -> whole windows of tokens -> a fingerprint. Nothing is padded, so no padding reaches a statistic."""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from ptq.errors import BadInput
from ptq.texts import joined, protocol_rules, read_text, token_ids


@dataclass(frozen=True)
class Calibration:
    """The windows a run is calibrated on, with what a report needs to name them.

    tokens: int64 [nsamples, seqlen]. fingerprint: sha256 (hex) of the token ids, row by row, as little-endian int64.
    source: as asked for. text_sha256: of each source's file bytes, joined by "," for a mix.
    dropped: always 0, windows are whole.
    """

    tokens: torch.Tensor
    fingerprint: str
    source: str
    text_sha256: str
    requested: int
    used: int
    dropped: int
    mode: str


def calibration_windows(
    tokenizer,
    source: str,
    *,
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    mode: str = "random",
    offline: bool = False,
) -> Calibration:
    """Cut `nsamples` windows of `seqlen` tokens from a text (see ptq.texts.read_text) or from a mix "a,b,c" of texts.

    mode: "random" starts each window at a random token, as GPTQ does (arXiv 2210.17323, its code); windows may overlap.
        "first" takes consecutive windows from the start.
    A mix takes equal shares in the order given; a remainder goes one each to the first texts, so that exactly nsamples
    are used. Documents (.jsonl, c4) are joined by an empty line and packed, short ones too, where GPTQ skips them.
    Windows are mid-text: a BOS that the tokenizer puts at the start of the text is there once, not in each window.
    Raises BadInput: text too short, sizes below 1, unknown mode.
    """
    if nsamples < 1 or seqlen < 1:
        raise BadInput(f"nsamples {nsamples} and seqlen {seqlen} must both be at least 1")
    if mode not in CUTS:
        raise BadInput(f"unknown calibration mode {mode!r}; known: {', '.join(CUTS)}")
    names = [source] if Path(source).exists() else [name.strip() for name in source.split(",")]
    shares = _shares(nsamples, names)
    rules = protocol_rules("plain")
    windows, hashes = [], []
    for name, share in zip(names, shares, strict=True):
        text = read_text(name, split="train", offline=offline)
        ids = token_ids(tokenizer, joined(text, rules[text.kind]))
        # each text gets its own generator: adding a text to a mix leaves the windows of the others where they were
        windows.append(CUTS[mode](ids, share, seqlen, random.Random(seed), name))
        hashes.append(text.sha256)
    tokens = torch.cat(windows)  # [nsamples, T]
    digest = fingerprint(tokens)
    return Calibration(tokens, digest, source, ",".join(hashes), nsamples, used=len(tokens), dropped=0, mode=mode)


def fingerprint(tokens: torch.Tensor) -> str:
    """sha256 (hex) of integer token ids [N, T], row by row, as little-endian int64."""
    return hashlib.sha256(tokens.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def _shares(nsamples: int, names: list[str]) -> list[int]:
    if nsamples < len(names):
        raise BadInput(f"nsamples {nsamples} is too few for a mix of {len(names)} texts; raise it to {len(names)}")
    share, rest = divmod(nsamples, len(names))
    return [share + (i < rest) for i in range(len(names))]


def _random_windows(ids: torch.Tensor, count: int, seqlen: int, rng: random.Random, name: str) -> torch.Tensor:
    if len(ids) < seqlen + 1:
        need = f"random windows of seqlen {seqlen} need {seqlen + 1}"
        raise BadInput(f"{name}: {len(ids)} tokens, {need}; lower seqlen or give more text")
    starts = [rng.randint(0, len(ids) - seqlen - 1) for _ in range(count)]
    return torch.stack([ids[start : start + seqlen] for start in starts])  # [T_all] -> [count, T]


def _first_windows(ids: torch.Tensor, count: int, seqlen: int, rng: random.Random, name: str) -> torch.Tensor:
    need = count * seqlen
    if len(ids) < need:
        fit = len(ids) // seqlen
        raise BadInput(f"{name}: {len(ids)} tokens, {count} windows of seqlen {seqlen} need {need}; at most {fit} fit")
    return ids[:need].view(count, seqlen)  # [T_all] -> [count, T]


CUTS = {"random": _random_windows, "first": _first_windows}
