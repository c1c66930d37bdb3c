"""Make the bundled tiny OPT: train it on plain text, give it synthetic channel outliers, write it in fp16.

    python scripts/train_tiny_opt.py TEXT [TEXT ...] --out ptq/assets/tiny-opt --excerpts ptq/assets

The outliers are synthetic because a model this small does not grow them, and they are what RPTQ (arXiv 2304.01089) is
for. They leave the computed function as it was: this script checks that before it writes anything.
"""

import argparse
import copy
import hashlib
import json
import math
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

VOCAB, POSITIONS = 3072, 512
BATCH_TOKENS, CROP = 512, 256
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 1e-3, 100, 0.1
HELD_OUT_BYTES, VALIDATION_BYTES = 260_000, 20_000
VALIDATE_EVERY = 100
SPECIALS = ["<s>", "<pad>", "</s>"]
PAD, BOS_EOS = 1, 2  # OPT begins a text with </s> and ends it with the same token


def read_text(path):
    """Return (credit, body) of one text file; a Project Gutenberg header and licence are cut off.

    Raises ValueError when only one of the two Project Gutenberg markers is there.
    """
    text = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    start = re.search(r"^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG.*$", text, re.M)
    end = re.search(r"^\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG.*$", text, re.M)
    if start is None and end is None:
        return path.name, text.strip() + "\n"
    if start is None or end is None or end.start() < start.end():
        raise ValueError(f"{path.name}: needs both Project Gutenberg markers, start found: {start is not None}, "
                         f"end found: {end is not None}; mend the file or remove both markers")
    body = re.sub(r"^End of (?:the )?Project Gutenberg.*$", "", text[start.end():end.start()], flags=re.M)
    header = dict(re.findall(r"^(Title|Author|Translators?): (.+)$", text[:start.start()], re.M))
    translator = header.get("Translators", header.get("Translator"))
    credit = f"{header.get('Author', 'unknown author')}, *{header.get('Title', path.name)}*"
    credit += f", translated by {translator}" if translator else ""
    return f"{credit} (Project Gutenberg text, header and licence removed)", body.strip() + "\n"


def cut_tail(text, n_bytes):
    """Split text at the paragraph boundary that leaves the last n_bytes bytes or a little more; return (head, tail)."""
    paragraphs = text.strip("\n").split("\n\n")
    first, size = len(paragraphs), 0
    while size < n_bytes and first > 1:
        first -= 1
        size += len(paragraphs[first].encode()) + 2
    if size < n_bytes:
        raise ValueError(f"text of {len(text.encode())} bytes cannot spare its last {n_bytes}; give more text")
    head, tail = ("\n\n".join(part).strip("\n") + "\n" for part in (paragraphs[:first], paragraphs[first:]))
    return head, tail


def split_text(text):
    """Return (train, validation, calibration, evaluation); the last two choose no weight."""
    rest, held_out = cut_tail(text, HELD_OUT_BYTES)
    train, validation = cut_tail(rest, VALIDATION_BYTES)
    calibration, evaluation = cut_tail(held_out, len(held_out.encode()) // 2)
    return train, validation, calibration, evaluation


def train_tokenizer(text):
    """Return a byte-level BPE tokenizer with OPT's special ids, learned from text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIALS, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer):
    """Return the transformers tokenizer around a tokenizers one."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>",
                                   model_max_length=POSITIONS)


def encode(tokenizer, text):
    """Return the token ids of text, int64 [T], without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def build_model():
    """Return an untrained fp32 OPT of about 5.7 million parameters."""
    config = OPTConfig(vocab_size=VOCAB, hidden_size=256, num_hidden_layers=6, ffn_dim=1024, num_attention_heads=4,
                       max_position_embeddings=POSITIONS, word_embed_proj_dim=256, do_layer_norm_before=True,
                       activation_function="relu", dropout=0.0, attention_dropout=0.0, tie_word_embeddings=True,
                       pad_token_id=PAD, bos_token_id=BOS_EOS, eos_token_id=BOS_EOS)
    return OPTForCausalLM(config)


def draw_batch(ids, length, generator):
    """Return random crops of ids, int64 [B, length], B * length = BATCH_TOKENS; about half of them begin with </s>."""
    n = BATCH_TOKENS // length
    starts = torch.randint(len(ids) - length + 1, (n, 1), generator=generator)
    crops = ids[starts + torch.arange(length)]  # [B, 1] + [T] -> [B, T]
    crops[torch.rand(n, generator=generator) < 0.5, 0] = BOS_EOS
    return crops


@torch.no_grad()
def perplexity(model, ids, seqlen):
    """Token perplexity of ids [T]: whole non-overlapping windows, no BOS, each predicts its last seqlen - 1 tokens."""
    model.eval()
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)  # [T] -> [B, T]
    losses = [model(input_ids=w, labels=w).loss.double() for w in windows.split(BATCH_TOKENS // seqlen)]
    sizes = torch.tensor([len(w) for w in windows.split(BATCH_TOKENS // seqlen)], dtype=torch.float64)
    return math.exp((torch.stack(losses) @ sizes / sizes.sum()).item())


def make_optimizer(model):
    """Return AdamW (decay on matrices only) and its schedule: linear warmup, then constant."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARMUP))


@torch.no_grad()
def update_average(average, model, step):
    """Move average towards model so that step t weighs about t^9: it covers roughly the last tenth of the steps."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 10 / (step + 9))


def train(model, train_ids, validation_ids, *, steps, seed, keep):
    """Train model in place; call keep(averaged model, facts) whenever the average validates better than ever before.

    The learning rate stays constant and the weights are averaged instead, so nothing before step n depends on the
    number of steps asked for: a run that was cut short kept exactly what a run of that many steps would have.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer, schedule = make_optimizer(model)
    average, best, began = copy.deepcopy(model), math.inf, time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        # every fourth batch is long, so that the upper half of the positions learns too
        batch = draw_batch(train_ids, POSITIONS if step % 4 == 0 else CROP, generator)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        update_average(average, model, step)
        if step % VALIDATE_EVERY == 0 or step == steps:
            found, seconds = perplexity(average, validation_ids, CROP), time.monotonic() - began
            print(f"step {step}/{steps}  loss {loss.item():.3f}  validation perplexity {found:.2f}  {seconds:.0f} s",
                  flush=True)
            if found < best:
                best = found
                keep(average, {"steps": step, "train_tokens": len(train_ids), "validation_perplexity": found,
                               "seed": seed})


def save_trained(model, tokenizer, facts, folder):
    """Write the weights as trained (fp32, no synthetic outliers) with the facts of their training."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def channel_factors(n, generator, *, spread, share, low, high):
    """Return n positive factors, float32 [n]: log-normal, a share of them multiplied by U(low, high)."""
    factors = torch.exp(spread * torch.randn(n, generator=generator))
    wild = torch.randperm(n, generator=generator)[: max(1, round(share * n))]
    factors[wild] *= low + (high - low) * torch.rand(len(wild), generator=generator)
    return factors.clamp(1 / 8, 100)


@torch.no_grad()
def widen_channels(model, seed, *, spread=0.8, share=0.02, low=15.0, high=60.0, v_spread=0.5, v_low=6.0, v_high=12.0):
    """Give the inputs of an OPT's linears heavy-tailed channel ranges, in place, without changing its function.

    A producer's channel is multiplied by a positive factor, its consumers' column divided by it: the norms and q/k/v,
    fc1; fc1 and fc2 (ReLU is positively homogeneous); v and out_proj (attention is linear in v).
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.decoder.layers:
        q, k, v, out = (getattr(layer.self_attn, f"{name}_proj") for name in ("q", "k", "v", "out"))
        for producer, consumers in ((layer.self_attn_layer_norm, (q, k, v)), (layer.final_layer_norm, (layer.fc1,)),
                                    (layer.fc1, (layer.fc2,)), (v, (out,))):
            is_v = producer is v
            factors = channel_factors(len(producer.bias), generator, share=share, spread=v_spread if is_v else spread,
                                      low=v_low if is_v else low, high=v_high if is_v else high)
            producer.weight.mul_(factors if producer.weight.ndim == 1 else factors[:, None])
            producer.bias.mul_(factors)
            for consumer in consumers:
                consumer.weight.div_(factors)  # [R, C] / [C]


@torch.no_grad()
def check_same_function(plain_logits, model, batch):
    """Raise ValueError unless model's logits on batch [B, T] equal plain_logits [B, T, V] to 1e-4 of the largest."""
    error = ((model(input_ids=batch).logits - plain_logits).abs().max() / plain_logits.abs().max()).item()
    if not error <= 1e-4:
        raise ValueError(f"widening changed the logits by {error:.2e} of the largest, above 1e-4; use milder factors")


@torch.no_grad()
def round_to_fp16(model):
    """Round weights to fp16 values in place (still fp32); raise ValueError where a channel does not survive it."""
    for name, weight in model.named_parameters():
        rounded = weight.half().float()
        if not rounded.isfinite().all():
            raise ValueError(f"{name}: weight {weight.abs().max().item():.3g} overflows fp16; use milder factors")
        for dim in range(weight.ndim if weight.ndim > 1 else 0):
            # rounding to normal fp16 costs at most 2^-11; twice that means that a channel sank into the subnormals
            error = ((rounded - weight).norm(dim=dim) / weight.norm(dim=dim).clamp_min(1e-30)).max().item()
            if not error < 2**-10:
                raise ValueError(f"{name}: a channel loses {error:.2e} of its norm in fp16; use milder factors")
        weight.copy_(rounded)


def write_card(folder, facts):
    """Write the model card."""
    rows = [f"| {name} | {seqlen} | {fp32:.3f} | {fp16:.3f} |" for name, seqlen, fp32, fp16 in facts["held_out"]]
    held_out = "\n".join(rows)
    credits = "\n".join(f"- {credit}" for credit in facts["credits"])
    tokens = facts["steps"] * BATCH_TOKENS
    (folder / "README.md").write_text(f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
library_name: transformers
---
# tiny-opt

An OPT of {facts["parameters"]:,} parameters (6 layers, width 256, 4 heads, 512 positions, tied embeddings, fp16),
trained from scratch so that quantization and pruning can be tried, tested and demonstrated in seconds and without
network. It writes English-looking prose that makes little sense; it is of no other use.

**Its channel outliers are synthetic.** A model this small does not grow the few activation channels, 50 to 100 times
wider than the others, that large OPT models have and that RPTQ (arXiv 2304.01089) is about. After training, channels of
both layer norms, of fc1 and of v were multiplied by heavy-tailed positive factors, and the weight columns that consume
them divided by the same factors. The function is preserved (fp32 logits agree to 1e-4; perplexities below), only the
ranges differ. What a method gains here shows that it handles such ranges; it measures nothing about a real large model.

## Text

{credits}

The text is in the public domain. Its last {HELD_OUT_BYTES // 1000} KB were held out before tokenizer and model were
trained: the first half is the calibration excerpt, the second the evaluation excerpt.

## Training

{facts["steps"]:,} steps of {BATCH_TOKENS} tokens (crops of {CROP}, every fourth batch of {POSITIONS}; half of the
crops begin with `</s>`): {tokens:,} tokens in all, {tokens / facts["train_tokens"]:.1f} passes over the
{facts["train_tokens"]:,} tokens of text. AdamW, learning rate {LEARNING_RATE} after {WARMUP} steps of warmup, weight
decay {WEIGHT_DECAY}, weights averaged over about the last tenth of the steps, no dropout (so few passes do not
overfit), fp32, seed {facts["seed"]}. Byte-level BPE of {VOCAB:,} tokens, learned from the same text.

## Perplexity

Per token of this tokenizer, so not comparable with models that have another one. All whole non-overlapping windows, no
BOS. Validation (a slice of its own, that chose the step), windows of {CROP}: {facts["validation_perplexity"]:.3f}.

| held-out text | window | fp32 before the outliers | fp16 weights as shipped |
|---|---|---|---|
{held_out}

SHA-256: calibration.txt `{facts["sha256"]["calibration"]}`, evaluation.txt `{facts["sha256"]["evaluation"]}`.

## Made by

`{facts["command"]}`

## Licence

Weights and tokenizer: Apache-2.0. Text: public domain.
""", encoding="utf-8")


def finish(model, tokenizer, texts, facts, out):
    """Widen the channels of the trained model, check that nothing else changed, and write the folder."""
    held_out = {name: encode(tokenizer, text) for name, text in texts.items()}
    cases = [(name, seqlen) for name in held_out for seqlen in (CROP, POSITIONS)]
    plain = [perplexity(model, held_out[name], seqlen) for name, seqlen in cases]
    batch = held_out["calibration"][: 2 * POSITIONS].view(2, POSITIONS)  # [2 * T] -> [2, T]
    with torch.no_grad():
        plain_logits = model(input_ids=batch).logits
    widen_channels(model, facts["seed"])
    check_same_function(plain_logits, model, batch)
    round_to_fp16(model)
    rounded = [perplexity(model, held_out[name], seqlen) for name, seqlen in cases]
    for (name, seqlen), before, after in zip(cases, plain, rounded):
        print(f"{name} seqlen {seqlen}: fp32 {before:.4f}, widened fp16 {after:.4f}")
        if abs(after / before - 1) > 0.005:
            raise ValueError(f"{name}: perplexity {before:.4f} became {after:.4f}, over 0.5% off; use milder factors")
    model.generation_config = GenerationConfig(bos_token_id=BOS_EOS, eos_token_id=BOS_EOS, pad_token_id=PAD)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_card(out, facts | {
        "held_out": [(*case, before, after) for case, before, after in zip(cases, plain, rounded)],
        "sha256": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
    })


def train_from_scratch(train_text, validation_text, args):
    """Return (model, tokenizer, facts): the weights with the best validation perplexity."""
    torch.manual_seed(args.seed)
    tokenizer, model = train_tokenizer(train_text), build_model()
    best = {}

    def keep(average, facts):
        best.update(model=copy.deepcopy(average), facts=facts)
        if args.keep_trained:
            save_trained(average, tokenizer, facts, args.keep_trained)

    train(model, encode(tokenizer, train_text), encode(tokenizer, validation_text), steps=args.steps, seed=args.seed,
          keep=keep)
    return best["model"], tokenizer, best["facts"]


def load_trained(folder):
    """Return (model, tokenizer, facts) that --keep-trained wrote."""
    model = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tokenizer = wrap_tokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")))
    return model, tokenizer, json.loads((folder / "training.json").read_text())


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("texts", nargs="+", type=Path, metavar="TEXT", help="public-domain UTF-8 text, joined in this order")
    add("--out", type=Path, required=True, help="folder of the finished model")
    add("--excerpts", type=Path, help="folder for calibration.txt and evaluation.txt, the held-out text")
    add("--steps", type=int, default=4000, help=f"optimizer steps of {BATCH_TOKENS} tokens")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--keep-trained", type=Path, metavar="DIR", help="also write the fp32 weights without outliers, best so far")
    add("--from-trained", type=Path, metavar="DIR", help="skip the training: begin with what --keep-trained wrote")
    return parser.parse_args()


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    credits, bodies = zip(*[read_text(path) for path in args.texts])
    train_text, validation_text, calibration, evaluation = split_text("\n\n".join(bodies))
    texts = {"calibration": calibration, "evaluation": evaluation}
    model, tokenizer, facts = load_trained(args.from_trained) if args.from_trained else train_from_scratch(
        train_text, validation_text, args)
    names = " ".join(path.name for path in args.texts)
    command = (f"python scripts/train_tiny_opt.py {names} --out ptq/assets/tiny-opt --excerpts ptq/assets "
               f"--steps {facts['steps']} --threads {args.threads} --seed {facts['seed']}")
    finish(model, tokenizer, texts, facts | {"credits": credits, "command": command}, args.out)
    if args.excerpts:
        args.excerpts.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (args.excerpts / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
