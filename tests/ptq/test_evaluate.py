"""Perplexity against the formula written plainly, and the protocols' windows."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from ptq.errors import BadInput, NumericalFailure
from ptq.perplexity import Windows, describe, evaluate, windows_for
from ptq.texts import Text

WORDS = "the cat sat on a mat and saw ten small birds fly over an old red barn at dawn".split()
VOCABULARY = 280


def prose(seed, count):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def make_tokenizer(bos):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator([prose(0, 2000)], trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos=False)


def tiny_opt(seed=0):
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)  # far from uniform, so that a wrong formula shows
    return model


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    return model


def plain_windows(tokens):
    keys = {"protocol": "plain", "text": "t", "sha256": "0" * 64, "join": "", "limited": False, "bos": False}
    return Windows(tokens, keys | {"seqlen": tokens.shape[1], "windows": len(tokens), "text_starts_with_bos": False})


def random_windows(count, length, seed=0):
    return plain_windows(torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed)))


def window_losses(model, tokens):
    """The formula, one token at a time, in Python floats."""
    losses = []
    for row in tokens:
        with torch.no_grad():
            p = model(row[None], use_cache=False).logits[0].double().softmax(-1)
        losses.append(-sum(math.log(p[t, row[t + 1]]) for t in range(len(row) - 1)) / (len(row) - 1))
    return losses


@pytest.mark.parametrize("make", [tiny_opt, tiny_llama])
def test_perplexity_and_its_error_are_the_formulas(make):
    model, windows = make(), random_windows(5, 13)
    result = evaluate(model, windows, batch_size=2)
    losses = window_losses(model, windows.tokens)
    mean = sum(losses) / 5
    spread = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 4)
    # float32 log-softmax of logits near 4 is good to about 1e-6 per token
    assert result["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert result["perplexity_stderr"] == pytest.approx(math.exp(mean) * spread / math.sqrt(5), rel=1e-4)
    assert (result["tokens"], result["windows"]) == (5 * 12, 5)
    assert result["protocol"] is windows.protocol


def test_uniform_logits_give_the_vocabulary_size():
    model = tiny_opt()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = evaluate(model, random_windows(3, 11))
    assert result["perplexity"] == pytest.approx(VOCABULARY, rel=1e-6)  # float32 log of 280


def test_identical_windows_have_no_spread_and_one_window_has_no_error():
    tokens = random_windows(1, 17).tokens
    assert evaluate(tiny_opt(), plain_windows(tokens.repeat(4, 1)))["perplexity_stderr"] == pytest.approx(0, abs=1e-4)
    assert evaluate(tiny_opt(), plain_windows(tokens))["perplexity_stderr"] is None


def test_neither_batch_size_nor_chunking_of_positions_changes_the_number(monkeypatch):
    model, other, windows = tiny_llama(0), tiny_llama(1), random_windows(5, 30)
    whole = evaluate(model, windows, batch_size=5, reference_model=other)
    monkeypatch.setattr("ptq.perplexity.POSITIONS", 7)
    pieces = evaluate(model, windows, batch_size=1, reference_model=other)
    for key in ("perplexity", "perplexity_stderr", "kl", "top1_agreement"):
        assert pieces[key] == pytest.approx(whole[key], rel=1e-5), key  # matmuls of other shapes round differently


def test_against_itself_there_is_no_divergence_and_full_agreement():
    model = tiny_opt()
    result = evaluate(model, random_windows(3, 12), reference_model=model)
    assert (result["kl"], result["top1_agreement"]) == (0, 1)


def test_divergence_and_agreement_are_the_formulas_with_the_reference_first():
    model, reference, windows = tiny_opt(0), tiny_opt(1), random_windows(3, 12)
    result = evaluate(model, windows, reference_model=reference)
    with torch.no_grad():
        q = model(windows.tokens).logits[:, :-1].double().log_softmax(-1)
        p = reference(windows.tokens).logits[:, :-1].double().log_softmax(-1)
    assert result["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert result["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_a_token_that_the_reference_rules_out_keeps_the_divergence_finite():
    def masked(ids, use_cache):
        logits = torch.zeros(*ids.shape, 4)
        logits[..., 3] = -math.inf
        return SimpleNamespace(logits=logits)

    def uniform(ids, use_cache):
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 4))

    windows = plain_windows(torch.tensor([[0, 1, 2, 0]]))
    assert evaluate(uniform, windows, reference_model=masked)["kl"] == pytest.approx(math.log(4 / 3))
    assert evaluate(masked, windows, reference_model=masked)["kl"] == 0


def test_dropout_is_off_and_the_mode_is_given_back():
    model, windows = tiny_opt(), random_windows(2, 20)
    expected = evaluate(model, windows)["perplexity"]
    model.train()
    assert evaluate(model, windows)["perplexity"] == expected
    assert model.training


def test_nan_logits_stop_with_the_windows_named():
    model = tiny_opt()
    model.lm_head.weight.data[5] = math.nan
    with pytest.raises(NumericalFailure, match="windows 0 to 1") as caught:
        evaluate(model, random_windows(3, 8), batch_size=2)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("make", [tiny_opt, tiny_llama])
def test_windows_longer_than_the_positions_and_foreign_tokens_are_refused(make):
    with pytest.raises(BadInput, match="seqlen 65 exceeds .* 64"):
        evaluate(make(), random_windows(1, 65))
    with pytest.raises(BadInput, match="token id 280 is outside .* 280"):
        evaluate(make(), plain_windows(torch.full((1, 4), VOCABULARY)))
    with pytest.raises(BadInput, match="batch_size 0"):
        evaluate(make(), random_windows(1, 4), batch_size=0)


def text_of(*parts, kind="text"):
    return Text("made up", kind, parts, "ab" * 32)


def test_whole_windows_in_order_and_the_rest_left_out(tokenizer):
    text = text_of(prose(3, 100))
    ids = tokenizer(text.parts[0])["input_ids"]
    windows = windows_for(tokenizer, text, "rptq", seqlen=30)
    count = len(ids) // 30
    assert count >= 3 and len(ids) % 30
    assert windows.tokens.flatten().tolist() == ids[: count * 30]
    assert windows_for(tokenizer, text, "rptq", 30, limit=2).tokens.flatten().tolist() == ids[:60]
    assert windows.protocol["windows"] == count and windows.protocol["sha256"] == "ab" * 32


@pytest.mark.parametrize(("protocol", "join"), [("rptq", "\n\n"), ("sparsegpt", " ")])
def test_the_two_papers_join_ptb_differently(tokenizer, protocol, join):
    sentences = ["the cat sat", "on a mat", "and saw ten small birds"] * 3
    windows = windows_for(tokenizer, text_of(*sentences, kind="ptb"), protocol, seqlen=8)
    assert windows.tokens.flatten().tolist() == tokenizer(join.join(sentences))["input_ids"][: windows.tokens.numel()]
    assert windows.protocol["join"] == join


def test_sparsegpt_documents_stop_after_256_windows(tokenizer):
    text = text_of(*[prose(i, 5) for i in range(300)], kind="documents")
    windows = windows_for(tokenizer, text, "sparsegpt", seqlen=4)
    assert windows.tokens.shape == (256, 4)
    assert windows.tokens.flatten().tolist() == tokenizer(" ".join(text.parts))["input_ids"][:1024]


def test_rptq_documents_are_the_crops_of_its_code(tokenizer):
    documents = [prose(i, 3 + 20 * (i % 2)) for i in range(600)]
    windows = windows_for(tokenizer, text_of(*documents, kind="documents"), "rptq", seqlen=12)
    random.seed(0)
    expected = []
    for _ in range(256):
        while True:
            ids = tokenizer(documents[random.randint(0, len(documents) - 1)])["input_ids"]
            if len(ids) > 12:
                break
        start = random.randint(0, len(ids) - 12 - 1)
        expected.append(ids[start : start + 12])
    assert windows.tokens.tolist() == expected
    few = windows_for(tokenizer, text_of(*documents, kind="documents"), "rptq", seqlen=12, limit=5)
    assert few.tokens.tolist() == expected[:5]


def test_too_few_long_documents_are_counted_and_plain_packs_them(tokenizer):
    text = text_of(*[prose(i, 3) for i in range(20)], prose(99, 60), kind="documents")
    with pytest.raises(BadInput, match="1 of 21 documents .* 256 crops need 256; .*--protocol plain"):
        windows_for(tokenizer, text, "rptq", seqlen=24)
    packed = windows_for(tokenizer, text, "plain", seqlen=24)
    assert packed.tokens.flatten().tolist() == tokenizer("\n\n".join(text.parts))["input_ids"][: packed.tokens.numel()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seqlen": 5000}, "tokens make no window of seqlen 5000"),
        ({"seqlen": 1}, "seqlen 1 must be at least 2"),
        ({"limit": 0}, "the number of windows, 0,"),
        ({"protocol": "gptq"}, "unknown protocol 'gptq'"),
    ],
)
def test_windows_that_cannot_be_made_are_refused(tokenizer, options, message):
    with pytest.raises(BadInput, match=message):
        windows_for(tokenizer, text_of(prose(3, 100)), **options)


def test_bos_stands_at_the_start_of_the_text_only_and_is_reported():
    tokenizer = make_tokenizer(bos=True)
    windows = windows_for(tokenizer, text_of(prose(3, 60)), "plain", seqlen=8)
    assert (windows.tokens == 0).nonzero().tolist() == [[0, 0]]
    assert windows.protocol["bos"] is False and windows.protocol["text_starts_with_bos"] is True


def test_the_line_carries_the_protocol_and_result_survives_json(tokenizer):
    windows = windows_for(tokenizer, text_of(prose(3, 100)), "sparsegpt", seqlen=16, limit=3)
    result = evaluate(tiny_opt(), windows, reference_model=tiny_opt(1))
    line = describe(json.loads(json.dumps(result)))
    assert "\n" not in line
    number = f"{result['perplexity']:.4f}"
    for part in (number, "sparsegpt protocol", "made up", "abababababab", "first 3 x 16", "no BOS", "KL"):
        assert part in line
