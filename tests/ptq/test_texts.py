"""Reading texts: rows as Hugging Face publishes them, documents, and errors that name what to mend."""

import gzip
import hashlib
import json

import pyarrow
import pyarrow.parquet
import pytest

from ptq import texts
from ptq.errors import BadInput
from ptq.texts import PROTOCOLS, joined, read_text


def write(path, content):
    path.write_bytes(content.encode("utf-8"))
    return str(path)


def test_wikitext_raw_is_joined_as_hugging_face_rows(tmp_path):
    # U+2028 and U+0085 end a line for str.splitlines, but not in the published rows
    raw = " \n = Title = \n \n A line\u2028with \u0085 odd ends . \n\nlast \n"
    text = read_text(write(tmp_path / "wiki.test.raw", raw), protocol="rptq")
    rows = ["", " = Title = \n", "", " A line\u2028with \u0085 odd ends . \n", "", "last \n"]
    assert text.kind == "wikitext"
    assert joined(text, PROTOCOLS["rptq"]["wikitext"]) == "\n\n".join(rows)
    assert text.sha256 == hashlib.sha256(raw.encode("utf-8")).hexdigest()


def test_wikitext_raw_with_carriage_returns_is_refused_with_their_count(tmp_path):
    path = write(tmp_path / "wiki.valid.raw", " a \r\n b \r\n c \n")
    with pytest.raises(BadInput, match=r"wiki\.valid\.raw: 2 carriage returns"):
        read_text(path)


def test_plain_text_is_taken_byte_for_byte(tmp_path):
    content = "one\r\ntwo\r\n\n\nthree"
    text = read_text(write(tmp_path / "book.txt", content))
    assert joined(text, PROTOCOLS["plain"]["text"]) == content


@pytest.mark.parametrize(("protocol", "join"), [("rptq", "\n\n"), ("sparsegpt", " "), ("plain", "\n\n")])
def test_ptb_sentences_are_stripped_and_joined_as_the_protocol_says(tmp_path, protocol, join):
    text = read_text(write(tmp_path / "ptb.test.txt", " no it was n't \n but \n"), protocol=protocol)
    assert joined(text, PROTOCOLS[protocol][text.kind]) == f"no it was n't{join}but"


def test_a_corrupt_gz_is_refused(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b"x")[:10] + b"\xff" * 20)  # a good header, then no deflate block
    with pytest.raises(BadInput, match="a.json.gz: cannot be read as documents: Error -3"):
        read_text(str(path))


def test_every_document_format_gives_the_same_documents(tmp_path):
    documents = ["first\ndocument", "zweites, größer", "third"]
    lines = "\n".join(json.dumps({"text": d, "url": "x"}) for d in documents)
    sources = [
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "a.json", lines),
        write(tmp_path / "b.json", json.dumps([{"text": d} for d in documents])),
        str(tmp_path / "a.json.gz"),
        str(tmp_path / "a.parquet"),
    ]
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(lines.encode("utf-8")))
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "a.parquet")
    for source in sources:
        text = read_text(source)
        assert (text.kind, text.parts) == ("documents", tuple(documents)), source


def test_sparsegpt_takes_the_first_1100_documents_joined_by_blanks(tmp_path):
    path = write(tmp_path / "c4.jsonl", "\n".join(json.dumps({"text": f"d{i}"}) for i in range(1200)))
    assert joined(read_text(path), PROTOCOLS["sparsegpt"]["documents"]) == " ".join(f"d{i}" for i in range(1100))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "a.txt: cannot be read as text: .*utf-8"),
        ("a.txt", b" \n", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "line 2 has no string under 'text'"),
        ("a.jsonl", b"{oops\n", "cannot be read as documents"),
        ("a.json", b'[{"text": null}]', "item 0 has no string"),
        ("a.parquet", b"not parquet", "cannot be read as documents"),
        ("a.jsonl.gz", b"not gzip", "cannot be read as documents"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        read_text(str(tmp_path / name))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_parquet_without_the_text_column_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="no column 'text' among body"):
        read_text(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "wikitxt2"}, "did you mean 'wikitext2'"),
        ({"source": "wikitext2", "protocol": "rtpq"}, "did you mean 'rptq'"),
        ({"source": "."}, "is a folder"),
        ({"source": "bundled", "split": "valid"}, "'valid'"),
    ],
)
def test_unknown_names_suggest_the_nearest(arguments, message):
    with pytest.raises(BadInput, match=message):
        read_text(**arguments)


@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4"])
def test_hub_text_offline_and_not_cached_says_to_pass_a_file(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match="not in the local cache .offline.; pass a path to a local file"):
        read_text(name, offline=True)


def test_every_protocol_names_a_hub_file_for_every_kind_it_reads():
    for protocol, rules in PROTOCOLS.items():
        for name, place in texts.HUB.items():
            assert rules[place.kind].split in place.files, (protocol, name)
            assert "train" in place.files, name


def test_bundled_reads_one_file_for_calibration_and_another_for_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "ASSETS", tmp_path)
    write(tmp_path / "calibration.txt", "for calibration")
    write(tmp_path / "evaluation.txt", "for evaluation")
    assert read_text("bundled", split="train").parts == ("for calibration",)
    assert read_text("bundled", split="test").parts == ("for evaluation",)
