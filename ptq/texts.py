"""Where text comes from, and how each named evaluation protocol turns it into one string or into crops.

The two papers evaluate "PTB" and "C4" differently, so their tables do not compare; both are kept as named protocols:

- rptq (the code of arXiv 2304.01089): WikiText-2 test, rows joined by an empty line; PTB validation, lines joined by an
  empty line; C4: 256 random crops of long validation documents, drawn from seed 0.
- sparsegpt (the code of arXiv 2301.00774): WikiText-2 as above; PTB test, lines joined by a blank; C4: the first 1100
  validation documents joined by a blank, the first 256 windows of that.
- plain: each text's test split (C4: validation), joined by an empty line, all of it.

Any other text is taken whole under every protocol.
"""

import difflib
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

import torch

from ptq.errors import BadInput

ASSETS = Path(__file__).parent / "assets"
BUNDLED = {"train": "calibration.txt", "test": "evaluation.txt"}


@dataclass(frozen=True)
class Text:
    """A text as read, not yet joined: `parts` are its rows, lines or documents; `sha256` is of the file's bytes."""

    name: str
    kind: str  # "wikitext", "ptb", "documents" or "text"; the key into a protocol
    parts: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class Rule:
    """What a protocol does with one kind of text. Example: Rule("validation", crops=256)."""

    split: str
    join: str = "\n\n"
    documents: int | None = None  # only the first so many
    windows: int | None = None  # only the first so many
    crops: int | None = None  # random crops of single documents instead of windows over the joined text


WIKITEXT, WHOLE = Rule("test"), Rule("test", join="")
PROTOCOLS = {
    "rptq": {
        "wikitext": WIKITEXT,
        "ptb": Rule("validation"),
        "documents": Rule("validation", crops=256),
        "text": WHOLE,
    },
    "sparsegpt": {
        "wikitext": WIKITEXT,
        "ptb": Rule("test", join=" "),
        "documents": Rule("validation", join=" ", documents=1100, windows=256),
        "text": WHOLE,
    },
    "plain": {"wikitext": WIKITEXT, "ptb": Rule("test"), "documents": Rule("validation"), "text": WHOLE},
}


def read_text(source: str, *, split: str = "test", protocol: str = "plain", offline: bool = False) -> Text:
    """Read `source`: a text's name (wikitext2, ptb, c4 from the hub; bundled) or a local file.

    split: "train" (calibration) or "test" (evaluation: the protocol says which split of a hub text that is). A local
        file is its own split. Training documents of c4 are the first 10,000 of shard 0, not all 356,317.
    Local files: `wiki.*.raw` is read as the rows Hugging Face publishes, `ptb.*.txt` as sentences, one a line; .jsonl,
        .json (both also .gz) and .parquet hold documents under the key `text`; anything else is one UTF-8 text, as is.
    Raises BadInput: unknown name, unreadable file, hub out of reach.
    """
    rules = protocol_rules(protocol)
    if split not in BUNDLED:
        raise BadInput(f"split {split!r} is neither 'train' nor 'test'")
    if source == "bundled":
        return _read_file(ASSETS / BUNDLED[split], name=source)
    if source in HUB:
        place = HUB[source]
        wanted = split if split == "train" else rules[place.kind].split
        path = _from_hub(source, place, wanted, offline)
        first = place.train_documents if wanted == "train" else None
        return _parse(path, f"{source}/{wanted}", place.kind, place.reader, place.column, first)
    return _read_file(Path(source), name=Path(source).name)


def protocol_rules(protocol: str) -> dict[str, Rule]:
    """The rules of a named protocol, by kind of text. Raises BadInput, with the nearest name, when there is none."""
    if protocol not in PROTOCOLS:
        raise BadInput(f"unknown protocol {protocol!r}{_nearest(protocol, PROTOCOLS)}; known: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]


def joined(text: Text, rule: Rule) -> str:
    """The one string that `rule` makes of `text`."""
    return rule.join.join(text.parts[: rule.documents])


def token_ids(tokenizer, string: str) -> torch.Tensor:
    """int64 [T]: `tokenizer(string)` with its own defaults, as in the papers' code; a BOS, if any, comes once."""
    # verbose=False: a whole text is longer than any model's context on purpose; windows are cut from it afterwards
    return torch.tensor(tokenizer(string, verbose=False)["input_ids"], dtype=torch.int64)


def _nearest(word: str, names) -> str:
    close = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _read_file(path: Path, *, name: str) -> Text:
    if not path.is_file():
        names = ["bundled", *HUB]
        what = "is a folder" if path.is_dir() else "no such file or text name"
        raise BadInput(f"{path}: {what}{_nearest(str(path), names)} (names: {', '.join(names)}; or a path to a file)")
    for pattern, kind, reader in LOCAL:
        if fnmatch(path.name.lower().removesuffix(".gz"), pattern):
            return _parse(path, name, kind, reader, "text", None)
    raise AssertionError("the last pattern of LOCAL matches every name")


def _parse(path: Path, name: str, kind: str, reader: Callable, column: str, first: int | None) -> Text:
    try:
        parts = tuple(islice(reader(path, column), first))
        digest = _sha256(path)
    except (OSError, EOFError, ValueError, zlib.error) as err:
        raise BadInput(f"{path}: cannot be read as {kind}: {' '.join(str(err).split())}") from err
    if not any(part.strip() for part in parts):
        raise BadInput(f"{path}: holds no text")
    return Text(name, kind, parts, digest)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends, split at "\\n" alone: other line ends inside a text are part of it."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="\n") as file:
        yield from file


def _whole(path: Path, column: str) -> Iterator[str]:
    yield "".join(_lines(path))


def _wikitext_rows(path: Path, column: str) -> Iterator[str]:
    """Hugging Face publishes each line with its end, and lines of blanks as empty strings."""
    lines = list(_lines(path))
    returns = sum(line.count("\r") for line in lines)
    if returns:
        raise BadInput(f"{path}: {returns} carriage returns, which shift perplexity; use the file with LF ends")
    yield from (line if line.strip() else "" for line in lines)


def _sentences(path: Path, column: str) -> Iterator[str]:
    yield from (line.strip() for line in _lines(path))


def _json_lines(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _field(json.loads(line), column, f"line {number}")


def _json_documents(path: Path, column: str) -> Iterator[str]:
    """A .json file is one array of objects, or one object a line."""
    content = "".join(_lines(path))
    if not content.lstrip().startswith("["):
        yield from _json_lines(path, column)
        return
    for number, item in enumerate(json.loads(content)):
        yield _field(item, column, f"item {number}")


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as err:
        raise BadInput(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from err
    file = pyarrow.parquet.ParquetFile(path)
    if column not in file.schema_arrow.names:
        raise ValueError(f"no column {column!r} among {', '.join(file.schema_arrow.names)}")
    rows = (row for batch in file.iter_batches(columns=[column]) for row in batch.to_pylist())
    for number, row in enumerate(rows):
        yield _field(row, column, f"row {number}")


def _field(item, column: str, where: str) -> str:
    value = item.get(column) if isinstance(item, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{where} has no string under {column!r}")
    return value


LOCAL: Sequence[tuple[str, str, Callable]] = (
    ("*wiki.*.raw", "wikitext", _wikitext_rows),
    ("*ptb.*.txt", "ptb", _sentences),
    ("*.jsonl", "documents", _json_lines),
    ("*.json", "documents", _json_documents),
    ("*.parquet", "documents", _parquet_rows),
    ("*", "text", _whole),
)


@dataclass(frozen=True)
class Hub:
    """Where a named text lies on the hub. Its files are read directly: no loading script, no prepared cache."""

    kind: str
    repo: str
    files: dict[str, str]
    reader: Callable
    column: str = "text"
    revision: str = "main"
    train_documents: int | None = None


HUB = {
    "wikitext2": Hub(
        "wikitext",
        "Salesforce/wikitext",
        {split: f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")},
        _parquet_rows,
    ),
    # the repository holds only a loading script, which datasets >= 4 refuses; the hub's own conversion holds the rows
    "ptb": Hub(
        "ptb",
        "ptb-text-only/ptb_text_only",
        {split: f"penn_treebank/{split}/0000.parquet" for split in ("train", "validation", "test")},
        _parquet_rows,
        column="sentence",
        revision="refs/convert/parquet",
    ),
    "c4": Hub(
        "documents",
        "allenai/c4",
        {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
        _json_lines,
        train_documents=10_000,
    ),
}


def _from_hub(name: str, place: Hub, split: str, offline: bool) -> Path:
    from huggingface_hub import hf_hub_download

    file = {"repo_id": place.repo, "filename": place.files[split], "revision": place.revision}
    try:
        return Path(hf_hub_download(**file, repo_type="dataset", local_files_only=offline))
    except OSError as err:
        why = "not in the local cache (offline)" if offline else f"{type(err).__name__} from the hub"
        where = f"{place.repo} {place.files[split]}"
        raise BadInput(f"text {name!r}: {where}: {why}; pass a path to a local file instead") from err
