"""A Hugging Face tokenizer in GGUF's words: byte-level BPE ("gpt2") and SentencePiece's BPE with byte fallback ("llama")."""

from __future__ import annotations

import json
from typing import Any

from ptq.checkpoint import load_tokenizer
from ptq.errors import BadInput
from ptq.export.source import Source

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut before byte pairs are merged -> llama.cpp's name for it. "gpt-2" stands for ByteLevel's own pattern.
CUTS = {
    ("gpt-2",): "gpt-2",
    ("digits", "gpt-2"): "smollm",
    (_LLAMA3,): "llama-bpe",
    (_LLAMA3.replace("{1,3}", ""),): "qwen2",
}


def add_tokenizer(writer: Any, source: Source) -> None:
    """Add the tokenizer of the source's folder to a gguf.GGUFWriter.

    Raises:
        BadInput: no tokenizer.json, a kind of tokenizer or a way to cut text that llama.cpp has no name for here, or more tokens than
            the model has rows.
    """
    file = source.folder / "tokenizer.json"
    if not file.is_file():
        raise BadInput(f"{source.folder}: has no tokenizer.json, which gguf needs; save the tokenizer as a fast one")
    tokenizer = load_tokenizer(source.folder)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise BadInput(f"{file}: a {model['type']} tokenizer; gguf export knows BPE, byte-level or with byte fallback")
    tokens, types = _tokens(backend, source, str(file))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_cut(backend.get("pre_tokenizer"), str(file)))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special(writer, tokenizer)


def _tokens(backend: dict[str, Any], source: Source, file: str) -> tuple[list[str], list[int]]:
    """(text, type) of every row of the embedding, in order."""
    rows = source.checkpoint.config.vocab_size
    by_id = {number: token for token, number in backend["model"]["vocab"].items()}
    added = {token["id"]: token for token in backend["added_tokens"]}
    by_id |= {number: token["content"] for number, token in added.items()}
    if max(by_id) >= rows:
        raise BadInput(
            f"{file}: token {max(by_id)} has no row in the embedding of {rows}; use the model's own tokenizer"
        )
    unknown = backend["model"].get("unk_token")
    fallback = backend["model"].get("byte_fallback")
    tokens, types = [], []
    for number in range(rows):
        token = by_id.get(number)
        tokens.append(f"[PAD{number}]" if token is None else token)
        if token is None:
            types.append(UNUSED)
        elif fallback and token == unknown:
            types.append(UNKNOWN)
        elif number in added:
            types.append(CONTROL if added[number]["special"] else USER_DEFINED)
        else:
            types.append(BYTE if fallback and _is_byte(token) else NORMAL)
    return tokens, types


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece merges the pair of the highest score first: that of the earliest merge which makes a token."""
    rank = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), i)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _cut(pre: dict[str, Any] | None, file: str) -> str:
    """llama.cpp's name for a pre-tokenizer of tokenizer.json."""
    steps = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    found = []
    for step in steps:
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            found += ["gpt-2"] if step.get("use_regex", True) else []
        elif step["type"] == "Digits" and step.get("individual_digits"):
            found.append("digits")
        elif step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            found.append(step["pattern"].get("Regex", ""))
        else:
            found.append(step["type"])
    if tuple(found) not in CUTS:
        what = f"its pre-tokenizer ({', '.join(found) or 'none'}) is none that gguf export knows by llama.cpp's name"
        raise BadInput(f"{file}: {what}; known: {', '.join(CUTS.values())}")
    return CUTS[tuple(found)]


def _add_special(writer: Any, tokenizer: Any) -> None:
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            add(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
