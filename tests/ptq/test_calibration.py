"""Calibration windows: what tokens they hold, how many, and that the same seed gives the same bytes."""

import hashlib
import json
import logging
import random
import struct

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ptq.calibration import calibration_windows
from ptq.errors import BadInput

WORDS = "the cat sat on a mat and saw ten small birds fly over an old red barn at dawn".split()


def prose(seed, count=3000):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator([prose(0)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(prose(1), encoding="utf-8")
    return path


def test_random_windows_are_slices_of_the_tokenized_text_from_pythons_generator(tokenizer, book):
    made = calibration_windows(tokenizer, str(book), nsamples=5, seqlen=16, seed=3)
    ids = tokenizer(book.read_text(encoding="utf-8"))["input_ids"]
    rng = random.Random(3)
    expected = []
    for _ in range(5):
        start = rng.randint(0, len(ids) - 16 - 1)
        expected.append(ids[start : start + 16])
    assert made.tokens.dtype == torch.int64
    assert made.tokens.tolist() == expected
    assert (made.requested, made.used, made.dropped, made.mode) == (5, 5, 0, "random")
    assert made.text_sha256 == hashlib.sha256(book.read_bytes()).hexdigest()


def test_first_windows_follow_each_other_from_the_start(tokenizer, book):
    made = calibration_windows(tokenizer, str(book), nsamples=4, seqlen=9, mode="first")
    ids = tokenizer(book.read_text(encoding="utf-8"))["input_ids"]
    assert made.tokens.flatten().tolist() == ids[: 4 * 9]


def test_fingerprint_is_the_sha256_of_the_ids_and_follows_the_seed(tokenizer, book):
    first, again, other = (calibration_windows(tokenizer, str(book), nsamples=3, seqlen=8, seed=s) for s in (7, 7, 8))
    ids = first.tokens.flatten().tolist()
    assert first.fingerprint == hashlib.sha256(struct.pack(f"<{len(ids)}q", *ids)).hexdigest()
    assert first.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize(("nsamples", "shares"), [(128, (43, 43, 42)), (4, (2, 1, 1)), (3, (1, 1, 1))])
def test_a_mix_uses_exactly_nsamples(tokenizer, tmp_path, nsamples, shares):
    """The RPTQ code's mix of 128 takes 3 x 42 windows and leaves two rows of zeros."""
    paths = []
    for i, word in enumerate(("cat", "mat", "barn")):
        paths.append(tmp_path / f"{word}.txt")
        paths[i].write_text(f"{word} " * 200, encoding="utf-8")
    made = calibration_windows(tokenizer, ",".join(map(str, paths)), nsamples=nsamples, seqlen=12)
    assert made.tokens.shape == (nsamples, 12) and made.used == nsamples
    counts = [sum(word in tokenizer.decode(row) for row in made.tokens) for word in ("cat", "mat", "barn")]
    assert tuple(counts) == shares
    assert made.text_sha256.count(",") == 2


def test_windows_of_a_text_do_not_move_when_it_joins_a_mix(tokenizer, book, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(prose(2), encoding="utf-8")
    alone = calibration_windows(tokenizer, str(book), nsamples=2, seqlen=8, seed=1)
    mixed = calibration_windows(tokenizer, f"{other},{book}", nsamples=4, seqlen=8, seed=1)
    assert torch.equal(mixed.tokens[2:], alone.tokens)


def test_short_documents_are_packed_not_skipped(tokenizer, tmp_path):
    path = tmp_path / "short.jsonl"
    documents = [f"cat {i} sat on" for i in range(40)]
    path.write_text("\n".join(json.dumps({"text": d}) for d in documents), encoding="utf-8")
    made = calibration_windows(tokenizer, str(path), nsamples=2, seqlen=64, mode="first")
    assert made.tokens.flatten().tolist() == tokenizer("\n\n".join(documents))["input_ids"][:128]


def test_a_path_with_a_comma_is_one_file_when_it_exists(tokenizer, tmp_path):
    path = tmp_path / "a,b.txt"
    path.write_text(prose(4), encoding="utf-8")
    assert calibration_windows(tokenizer, str(path), nsamples=1, seqlen=8).used == 1


def test_the_shortest_text_that_random_takes_is_one_token_longer_than_a_window(tokenizer, book):
    count = len(tokenizer(book.read_text(encoding="utf-8"))["input_ids"])
    assert calibration_windows(tokenizer, str(book), nsamples=2, seqlen=count - 1).tokens.shape == (2, count - 1)
    with pytest.raises(BadInput, match=rf"{count} tokens, .* need {count + 1}"):
        calibration_windows(tokenizer, str(book), nsamples=2, seqlen=count)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nsamples": 100_000, "seqlen": 8, "mode": "first"}, "need 800000; at most"),
        ({"nsamples": 0}, "nsamples 0"),
        ({"seqlen": 0}, "seqlen 0"),
        ({"mode": "last"}, "unknown calibration mode 'last'"),
    ],
)
def test_bad_sizes_are_refused_with_the_numbers(tokenizer, book, options, message):
    with pytest.raises(BadInput, match=message):
        calibration_windows(tokenizer, str(book), **options)


def test_a_mix_with_fewer_samples_than_texts_is_refused(tokenizer, book):
    with pytest.raises(BadInput, match="nsamples 1 is too few"):
        calibration_windows(tokenizer, f"{book},bundled", nsamples=1, seqlen=8)


def test_a_text_longer_than_the_model_warns_of_nothing(tokenizer, book, caplog):
    logger = logging.getLogger("transformers")
    logger.propagate = True
    tokenizer.deprecation_warnings.clear()  # said once per tokenizer, and another test may have been first
    try:
        calibration_windows(tokenizer, str(book), nsamples=1, seqlen=8)
        assert "longer than the specified maximum" not in caplog.text
        tokenizer(book.read_text(encoding="utf-8"))
        assert "longer than the specified maximum" in caplog.text
    finally:
        logger.propagate = False
