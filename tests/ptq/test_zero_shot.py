"""Zero-shot tasks: one forward a choice as the oracle, the prompts written out, and lm-evaluation-harness itself.

pip install lm-eval
pytest -m peers tests/ptq/test_zero_shot.py
"""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import build_model, build_tokenizer
from tokenizers import processors

import ptq
from ptq.cli import main
from ptq.errors import BadInput, NumericalFailure
from ptq.tasks import TASKS, read_task
from ptq.zero_shot import context_length, describe, encode_pair, log_likelihoods, score_task

TINY_OPT = Path(ptq.__file__).parent / "assets" / "tiny-opt"

# Rows as the hub has them; one context of each kind is longer than the 64 positions of the tiny models.
LONG = "The general looked at the wide field and at the few men whom the winter had left him. " * 3
ROWS = {
    "lambada": [
        {"text": "He gave the letter to his sister, and she gave it to her brother"},
        {"text": "“Où est le prince?” she asked. Nobody had seen the prince"},
        {"text": LONG + "He had no other men"},
        {"text": "and so the war was the war"},
    ],
    "piqa": [
        {"goal": "cut a rope", "sol1": "with a knife", "sol2": "with a spoon ", "label": 0},
        {"goal": "cross a river ", "sol1": "walk over the clouds above it", "sol2": "take a boat", "label": 1},
        {"goal": LONG, "sol1": "wait", "sol2": "send  a letter — to the Emperor’s général", "label": 1},
    ],
    "arc_easy": [
        {"question": "What shines?", "choices": {"text": ["a stone", "the sun", "mud", "7"], "label": [*"ABCD"]}, "answerKey": "B"},
        {"question": "Which is cold?", "choices": {"text": ["ice", "fire", "steam"], "label": [*"123"]}, "answerKey": "1"},
        {"question": LONG, "choices": {"text": ["few", "many", "all", "no"], "label": [*"ABCD"]}, "answerKey": "A"},
    ],
    "hellaswag": [
        {"activity_label": "Riding", "ctx_a": "A man sits on a horse.", "ctx_b": "the horse", "label": "2",
         "endings": ["flies away.", "reads a book to him.", "runs over the field.", "is a [substeps] table."]},
        {"activity_label": "Health", "ctx_a": "How to sleep [header] Go to bed. [title] Read.", "ctx_b": "", "label": "0",
         "endings": [" [title] Close  your eyes.", "Run. [step] Shout.", "Eat a horse.", "Go to war."]},
        {"activity_label": "War", "ctx_a": LONG, "ctx_b": "he", "label": "3", "endings": ["ran.", "sat.", "slept.", "wept bitterly."]},
    ],
    "winogrande": [
        {"sentence": "Pierre thanked Andrew because _ had saved him.", "option1": "Pierre", "option2": "Andrew", "answer": "2"},
        {"sentence": LONG + "The king fled from the count, as _  was afraid.", "option1": "king", "option2": "count", "answer": "1"},
        {"sentence": "_ won, though Anna hated Mary_Ann.", "option1": "Anna", "option2": "Mary", "answer": "2"},
    ],
}  # fmt: skip


HORSE = ["flies away.", "reads a book to him.", "runs over the field.", "is a table."]
SLEEP = [" Close your eyes.", "Run. Shout.", "Eat a horse.", "Go to war."]  # stripped first, its bracket cut then


def write(folder, name, rows):
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / f"{name}_rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf8")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in ROWS.items():
        write(folder, name, rows)
    return folder


@pytest.fixture(scope="module", params=["llama", "opt", "bloom"])
def model(request):
    return build_model(request.param)


def tokenizer_with_bos():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def one_forward(model, tokenizer, context, continuation, longest):
    """The formula on one unpadded sequence, token by token, in Python floats: log-likelihood and whether greedy."""
    ids, start = tokenizer(context + continuation)["input_ids"], len(tokenizer(context.rstrip())["input_ids"])
    cut = max(0, len(ids) - longest - 1)
    return one_forward_ids(model, ids[cut:start], ids[start:])


def one_forward_ids(model, context, continuation):
    ids, count = [*context, *continuation], len(continuation)
    with torch.no_grad():
        p = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0].double().softmax(-1)
    places = range(len(ids) - count, len(ids))
    return sum(math.log(p[t - 1, ids[t]]) for t in places), all(int(p[t - 1].argmax()) == ids[t] for t in places)


# --- prompts


@pytest.mark.parametrize(
    ("name", "number", "pairs", "gold"),
    [
        ("lambada", 0, [("He gave the letter to his sister, and she gave it to her", " brother")], 0),
        ("piqa", 0, [("Question: cut a rope\nAnswer:", f" with a {end}") for end in ("knife", "spoon ")], 0),
        ("arc_easy", 1, [("Question: Which is cold?\nAnswer:", f" {end}") for end in ("ice", "fire", "steam")], 0),
        ("hellaswag", 0, [("Riding: A man sits on a horse. The horse", f" {end}") for end in HORSE], 2),
        ("hellaswag", 1, [("Health: How to sleep Go to bed.. Read.", f" {end}") for end in SLEEP], 0),
        ("winogrande", 2, [(name, " won, though Anna hated Mary_Ann.") for name in ("Anna", "Mary")], 1),
    ],
)  # fmt: skip
def test_prompts_are_those_of_the_harness(files, name, number, pairs, gold):
    item = read_task(name, folder=str(files)).items[number]
    assert (list(item.pairs), item.gold) == (pairs, gold)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("arc_easy", {"question": "q", "choices": ["a", "b"], "gold": 1}),
        ("piqa", {"goal": "q", "sol1": "a", "sol2": "b", "gold": 1}),
        ("hellaswag", {"query": "q [kept]", "choices": ["a", "b"], "gold": 1}),
        ("winogrande", {"sentence": "so _ won", "option1": "a", "option2": "b", "gold": 1}),
    ],
)
def test_prepared_rows_carry_the_index_of_the_right_choice(tmp_path, name, row):
    item = read_task(name, folder=str(write(tmp_path, name, [row]))).items[0]
    assert item.gold == 1 and len(item.pairs) == 2
    if name == "hellaswag":
        assert item.pairs[1] == ("q [kept]", " b")


# --- scores


@pytest.mark.parametrize("name", TASKS)
def test_scores_are_those_of_one_forward_a_choice(model, tokenizer, files, name):
    questions = read_task(name, folder=str(files))
    longest = context_length(model, tokenizer)
    result = score_task(model, tokenizer, questions, batch_size=3)
    right, normalized, likelihoods = [], [], []
    for item in questions.items:
        found = [one_forward(model, tokenizer, *pair, longest) for pair in item.pairs]
        values = [value for value, _ in found]
        likelihoods.append(values[0])
        right.append(found[0][1] if name == "lambada" else values.index(max(values)) == item.gold)
        scaled = [value / (len(continuation) - 1) for value, (_, continuation) in zip(values, item.pairs)]
        normalized.append(scaled.index(max(scaled)) == item.gold)
    count = len(right)
    assert result["accuracy"] == pytest.approx(sum(right) / count)
    assert result.get("accuracy_norm") == (
        pytest.approx(sum(normalized) / count) if name in ("piqa", "arc_easy", "hellaswag") else None
    )
    if name == "lambada":
        # float32 log-softmax of a dozen tokens is good to about 1e-5 nats
        assert result["perplexity"] == pytest.approx(math.exp(-sum(likelihoods) / count), rel=1e-4)
    assert (result["items"], result["rows"], result["source"]) == (count, count, f"{name}_rows.jsonl")


@pytest.mark.parametrize("make_tokenizer", [build_tokenizer, tokenizer_with_bos])
def test_log_likelihoods_of_any_batch_are_those_of_one_forward(model, make_tokenizer, files):
    tokenizer = make_tokenizer()
    longest = context_length(model, tokenizer)
    pairs = [pair for name in TASKS for item in read_task(name, folder=str(files)).items for pair in item.pairs]
    requests = [encode_pair(tokenizer, *pair) for pair in pairs]
    expected = [one_forward(model, tokenizer, *pair, longest) for pair in pairs]
    lengths = {len(context) + len(continuation) for context, continuation in requests}
    assert min(lengths) <= 40 and max(lengths) > 65  # padding and truncation both take place
    for batch_size in (1, 5, len(requests)):
        scores = log_likelihoods(model, requests, longest=longest, batch_size=batch_size)
        for (likelihood, greedy), (value, first) in zip(scores, expected):
            assert likelihood == pytest.approx(value, rel=1e-5, abs=1e-5)  # float32 sums in another order
            assert greedy == first


def test_a_word_is_right_only_if_each_of_its_tokens_ranks_first():
    model, context = build_model("llama"), (40, 41, 42)
    with torch.no_grad():
        last = model.model(torch.tensor([context]), use_cache=False).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()
        model.lm_head.weight[50] = last  # after the context token 50 ranks first
    requests = [(context, (50,)), (context, (51,)), (context[:2], (42, 50)), (context[:2], (42, 51))]
    greedy = [first for _, first in log_likelihoods(model, requests, longest=64, batch_size=4)]
    assert greedy == [one_forward_ids(model, *request)[1] for request in requests]
    assert greedy[:2] == [True, False] and not greedy[3]


def test_the_first_of_equal_choices_is_taken(tmp_path, model, tokenizer):
    rows = [{"question": "q", "choices": ["the same", "the same", "the same"], "gold": gold} for gold in (0, 1, 2, 0)]
    questions = read_task("arc_easy", folder=str(write(tmp_path, "arc_easy", rows)))
    for batch_size in (1, 2, 8):
        result = score_task(model, tokenizer, questions, batch_size=batch_size)
        assert (result["accuracy"], result["accuracy_norm"], result["majority"]) == (0.5, 0.5, 0.5)


def test_standard_errors_are_the_formula_and_one_item_has_none(tmp_path, tokenizer):
    model = build_model("opt")
    rows = [{"question": "q", "choices": ["same", "same"], "gold": gold} for gold in (0, 0, 0, 1, 1)]
    folder = str(write(tmp_path, "arc_easy", rows))
    result = score_task(model, tokenizer, read_task("arc_easy", folder=folder))
    hits = [1, 1, 1, 0, 0]
    spread = math.sqrt(sum((hit - 0.6) ** 2 for hit in hits) / 4)  # the sample's, as the harness takes it
    assert result["accuracy_stderr"] == pytest.approx(spread / math.sqrt(5))
    one = score_task(model, tokenizer, read_task("arc_easy", folder=folder, limit=1))
    assert one["accuracy_stderr"] is None and (one["items"], one["rows"]) == (1, 5)
    assert "first 1 of 5 items" in describe(one) and "\n" not in describe(one)


def test_the_majority_of_lambada_is_its_most_frequent_word(tmp_path, tokenizer):
    rows = [{"text": f"so said {word}"} for word in ("she", "he", "she", "they")]
    result = score_task(
        build_model("opt"), tokenizer, read_task("lambada", folder=str(write(tmp_path, "lambada", rows)))
    )
    assert result["majority"] == 0.5
    assert "perplexity of the last word" in describe(result)


# --- the boundary between context and continuation


def test_spaces_at_the_end_of_the_context_go_to_the_continuation():
    tokenizer = build_tokenizer()
    plain, moved = (encode_pair(tokenizer, *pair) for pair in [("The", " channels"), ("The ", "channels")])
    assert plain == moved
    assert tokenizer.decode(plain[1]) == " channels"


def test_the_bos_stays_with_the_context():
    context, continuation = encode_pair(tokenizer_with_bos(), "The", " channels")
    assert context[0] == 1 and 1 not in continuation


# --- what is refused


def refuse(folder, name, rows, match):
    with pytest.raises(BadInput, match=match) as caught:
        read_task(name, folder=str(write(folder, name, rows)))
    assert "\n" not in str(caught.value)


PIQA = {"goal": "g", "sol1": "a", "sol2": "b", "gold": 0}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("piqa", {"sol2": None}, "item 2: not of task piqa: 'sol2' is no string"),
        ("piqa", {"sol2": ""}, "item 2: an empty continuation"),
        ("piqa", {"gold": 2}, "item 2: the right choice 2 is none of the 2 choices"),
        ("piqa", {"gold": -1}, "the right choice -1"),
        ("piqa", {"gold": 0.0}, "the right choice 0.0 is no index"),
        ("piqa", {"gold": "first"}, "invalid literal"),
        ("arc_easy", {"question": "q", "choices": ["a"]}, "1 choices leave nothing"),
        ("arc_easy", {"question": "q", "choices": "ab"}, "no list of strings"),
        ("arc_easy", {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}, "'C' is not in list"),
        ("winogrande", {"sentence": "no blank", "option1": "a", "option2": "b"}, "no blank '_'"),
        ("winogrande", {"sentence": "ends with _", "option1": "a", "option2": "b"}, "an empty continuation"),
        ("lambada", {"text": "word"}, "an empty continuation or context"),
        ("lambada", {"text": "a blank at the end "}, "an empty continuation"),
    ],
)  # fmt: skip
def test_an_item_that_cannot_be_scored_is_refused(tmp_path, name, change, message):
    good = ROWS[name][0]
    refuse(tmp_path, name, [good, {**PIQA, **change}], message)


@pytest.mark.parametrize("name", TASKS)
def test_each_key_that_lacks_is_named(tmp_path, name):
    for key in ROWS[name][0]:
        row = {k: v for k, v in ROWS[name][0].items() if k != key}
        refuse(tmp_path, name, [ROWS[name][0], row], f"item 2: no key '{key}', which task {name} reads")


def test_a_row_that_is_no_object_and_a_line_that_is_no_json(tmp_path):
    refuse(tmp_path, "piqa", [[1]], "item 1: not of task piqa")
    (tmp_path / "piqa_rows.jsonl").write_text('{"goal": \n')
    with pytest.raises(BadInput, match="line 1 is not JSON"):
        read_task("piqa", folder=str(tmp_path))
    (tmp_path / "piqa_rows.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="holds no item"):
        read_task("piqa", folder=str(tmp_path))


def test_the_file_of_a_task_is_the_only_one_of_its_name(tmp_path, files):
    with pytest.raises(BadInput, match="no such folder"):
        read_task("piqa", folder=str(tmp_path / "gone"))
    with pytest.raises(BadInput, match=r"no file piqa\*.jsonl"):
        read_task("piqa", folder=str(tmp_path))
    (tmp_path / "below").mkdir()
    write(tmp_path / "below", "piqa", [PIQA])
    assert len(read_task("piqa", folder=str(tmp_path)).items) == 1
    write(tmp_path, "piqa", [PIQA])
    with pytest.raises(BadInput, match="several files: .*below.*piqa_rows.jsonl"):
        read_task("piqa", folder=str(tmp_path))


def test_a_task_that_is_not_known_gets_the_nearest_name(files):
    with pytest.raises(BadInput, match="unknown task 'arc_eazy' .did you mean 'arc_easy'"):
        read_task("arc_eazy", folder=str(files))
    with pytest.raises(BadInput, match="must be at least 1"):
        read_task("piqa", folder=str(files), limit=0)
    with pytest.raises(BadInput, match="offline.*--task-files"):
        read_task("piqa", offline=True)


def test_what_has_no_token_or_does_not_fit_is_refused(tokenizer):
    for pair in [("The", ""), ("  ", "channels")]:
        with pytest.raises(BadInput, match="at least one token"):
            encode_pair(tokenizer, *pair)
    model = build_model("llama")
    with pytest.raises(BadInput, match="65 tokens exceeds the 64"):
        log_likelihoods(model, [((5,), (6,) * 65)], longest=64, batch_size=1)
    assert math.isfinite(log_likelihoods(model, [((5,), (6,) * 64)], longest=64, batch_size=1)[0][0])
    with pytest.raises(BadInput, match="token id 300 is outside"):
        log_likelihoods(model, [((5, 300), (6,))], longest=64, batch_size=1)


def test_nan_stops_with_the_item_named_and_the_mode_is_given_back(tokenizer, files):
    model = build_model("llama")
    questions = read_task("piqa", folder=str(files))
    model.train()
    score_task(model, tokenizer, questions)
    assert model.training
    model.lm_head.weight.data[5] = math.nan
    with pytest.raises(NumericalFailure, match="piqa_rows.jsonl: item 1"):
        score_task(model, tokenizer, questions)
    with pytest.raises(BadInput, match="batch_size 0"):
        score_task(model, tokenizer, questions, batch_size=0)


# --- the command


def test_the_command_scores_tasks_alone_or_beside_a_text(model_folder, text_file, files, tmp_path, capsys):
    folder, out = str(model_folder("opt")), tmp_path / "out.json"
    tasks = ["--tasks", "piqa,lambada", "--task-files", str(files), "--limit", "2"]
    assert main(["eval", folder, *tasks, "--json", str(out)]) == 0
    printed, found = capsys.readouterr().out.splitlines(), json.loads(out.read_text())
    assert [line.split(":")[0] for line in printed] == ["piqa", "lambada"] == list(found["tasks"])
    assert list(found) == ["tasks"] and found["tasks"]["piqa"]["items"] == 2
    assert main(["eval", folder, *tasks, "--text", str(text_file), "--windows", "2", "--json", str(out)]) == 0
    both = json.loads(out.read_text())
    assert list(both) == ["perplexity", "perplexity_stderr", "protocol", "tokens", "tasks"]
    assert both["tasks"] == found["tasks"] and both["protocol"]["windows"] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--limit", "3"], "--limit is about tasks"),
        (["--task-files", "x"], "--task-files is about tasks"),
        (["--tasks", "piqa", "--windows", "2"], "--windows is about a text"),
        (["--tasks", "piqa", "--against", "{folder}"], "--against is about a text"),
        (["--tasks", "piqa,hellaswog"], "unknown task 'hellaswog' (did you mean 'hellaswag'?)"),
        (["--tasks", ""], "unknown task ''"),
        (["--tasks", "piqa", "--text", ""], "is a folder (names: bundled"),
    ],
)
def test_options_that_would_do_nothing_are_refused(given, message, model_folder, files, capsys):
    folder = str(model_folder("opt"))
    more = [] if "about tasks" in message else ["--task-files", str(files)]
    assert main(["eval", folder, *[word.format(folder=folder) for word in given], *more]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


# --- the harness itself


def harness_results(model, tokenizer, files, work):
    """lm-evaluation-harness on the rows, through its own task files; only where the rows lie is another."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    shipped = Path(lm_eval.__file__).parent / "tasks"
    places = {"lambada": "lambada/lambada_openai", "arc_easy": "arc/arc_easy", "winogrande": "winogrande/default"}
    specs = []
    for name in TASKS:
        rows = dict.fromkeys(["train", "validation", "test"], str(files / f"{name}_rows.jsonl"))
        spec = {
            "include": str(shipped / f"{places.get(name, f'{name}/{name}')}.yaml"),
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": rows, "cache_dir": str(work / "cache")},
        }
        specs.append(work / f"{name}.yaml")
        specs[-1].write_text(json.dumps(spec))  # JSON is YAML
    engine = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
    names = [str(spec) for spec in specs]
    return lm_eval.simple_evaluate(engine, tasks=names, num_fewshot=0, log_samples=True, bootstrap_iters=10)


@pytest.mark.peers
@pytest.mark.parametrize("bundled", [True, False], ids=["tiny-opt", "llama of 64 positions, with BOS"])
def test_the_harness_scores_and_decides_the_same(files, tmp_path, bundled):
    pytest.importorskip("lm_eval")
    model = ptq.load(TINY_OPT) if bundled else build_model("llama")
    tokenizer = ptq.load_tokenizer(TINY_OPT) if bundled else tokenizer_with_bos()
    longest, theirs = context_length(model, tokenizer), harness_results(model, tokenizer, files, tmp_path)
    for name in TASKS:
        key = "lambada_openai" if name == "lambada" else name
        questions = read_task(name, folder=str(files))
        ours, table, samples = score_task(model, tokenizer, questions), theirs["results"][key], theirs["samples"][key]
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        assert [sample["doc_id"] for sample in samples] == list(range(len(questions.items)))
        for item, sample in zip(questions.items, samples):
            assert [tuple(pair) for pair in sample["arguments"]] == list(item.pairs)
            requests = [encode_pair(tokenizer, *pair) for pair in item.pairs]
            scores = log_likelihoods(model, requests, longest=longest, batch_size=2)
            for (likelihood, greedy), ((value, first),) in zip(scores, sample["resps"]):
                # float32 sums over up to a hundred tokens, in another order
                assert likelihood == pytest.approx(float(value), rel=1e-5) and greedy == (str(first) == "True")
        for metric, mine in {"acc": "accuracy", "acc_norm": "accuracy_norm"}.items():
            assert (f"{metric},none" in table) == (mine in ours)
            if mine in ours:
                assert table[f"{metric},none"] == pytest.approx(ours[mine])
                assert table[f"{metric}_stderr,none"] == pytest.approx(ours[f"{mine}_stderr"])
        if name == "lambada":
            assert table["perplexity,none"] == pytest.approx(ours["perplexity"], rel=1e-4)
