"""A compressed model whose blocks stream from disk computes what it computes in memory, and holds two blocks at most."""

from __future__ import annotations

import functools
import gc
import shutil
import threading
import time

import pytest
import torch
from lowbit import decode
from lowbit.cpu import decode as cpu
from lowbit.cpu import native
from lowbit.decode import Decoder
from lowbit.modules import Linear
from transformers import AutoConfig, AutoModelForCausalLM

import ptq
from ptq import bench, native_decode, stream
from ptq.cli import main
from ptq.errors import BadInput
from ptq.hf_quantizer import spec_of

needs_kernels = pytest.mark.skipif(not native.fast_avx2(), reason="no compiled kernels that this machine would run")
BLOCKS = 4
SIZES = {
    "llama": {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1},
    "opt": {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 192, "num_attention_heads": 2},
}


@pytest.fixture(scope="module")
def packed_folder(tokenizer, recipe_for, run, tmp_path_factory):
    """family -> folder of a W4A4KV4 model whose first tokens are kept as sinks, made once; LLaMA's head is packed too."""

    def make(family):
        folder = tmp_path_factory.mktemp("streamed")
        config = AutoConfig.for_model(family, vocab_size=300, num_hidden_layers=BLOCKS, **SIZES[family])
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "source")
        tokenizer.save_pretrained(folder / "source")
        options = {"clusters": {"wide": 0.16}, "weights": {"fine": 0.1, "head": 8 if family == "llama" else 16}}
        run(recipe_for(folder / "source", method="rptq+", preset="W4A4KV4", **options), folder / "out")
        return folder / "out"

    return functools.cache(make)


@pytest.fixture(params=sorted(SIZES))
def packed(request, packed_folder):
    return packed_folder(request.param)


@pytest.fixture
def llama(packed_folder):
    """One family, for what is the same in all."""
    return packed_folder("llama")


@pytest.fixture
def batch(tokens):
    """Three prompts, the second padded on the left."""
    ids = tokens[:3, :9].clone()
    mask = torch.ones_like(ids)
    ids[1, :3] = mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def most(monkeypatch):
    """How many blocks of a stream had tensors at most, and how many bytes these had: looked up when a block has been read, or was not."""
    seen, read = {"blocks": 0, "bytes": 0}, stream.BlockStream._read

    def watched(self, i):
        try:
            read(self, i)
        finally:
            held = [resident_bytes(block) for block in self.blocks]
            seen["blocks"] = max(seen["blocks"], sum(h > 0 for h in held))
            seen["bytes"] = max(seen["bytes"], sum(held))

    monkeypatch.setattr(stream.BlockStream, "_read", watched)
    return seen


def resident_bytes(block) -> int:
    """Of the block's linears, the layout of the kernels included."""
    linears = [module for module in block.modules() if isinstance(module, Linear)]
    tensors = [t for linear in linears for t in linear.buffers(recurse=False) if not t.is_meta]
    tensors += [plane for linear in linears if linear.planar is not None for plane in linear.planar.planes]
    return sum(t.numel() * t.element_size() for t in tensors)


def blocks_of(model):
    return list(model.get_submodule(spec_of(model.config).blocks))


@torch.no_grad()
def test_logits_and_tokens_are_those_of_the_model_in_memory(packed, batch, most):
    whole, streamed = ptq.load(packed), ptq.load(packed, stream=True)
    assert torch.equal(streamed(**batch).logits, whole(**batch).logits)
    more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    more |= {"output_logits": True, "return_dict_in_generate": True}
    found, wanted = (model.generate(**batch, **more) for model in (streamed, whole))
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, wanted.logits, strict=True))
    layers = zip(found.past_key_values.layers, wanted.past_key_values.layers, strict=True)
    assert all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in layers)
    assert 1 <= most["blocks"] <= 2  # often one: tiny blocks may be done before the next has been read
    # the layouts are counted too; the blocks have the same shapes, but for their fine groups
    assert most["bytes"] <= 2 * max(resident_bytes(block) for block in blocks_of(whole))


@torch.no_grad()
@pytest.mark.parametrize("few", [2, 1])
def test_a_divided_prefill_is_that_of_its_parts(packed, batch, few, monkeypatch):
    """Kernels may round a sequence that is alone differently in the last place, so the parts are what it must equal."""
    for module in (stream, native_decode):  # native calls divide a prefill in other ways
        monkeypatch.setattr(module, "decode_natively", lambda *_, **more: "not now")
    monkeypatch.setattr(stream, "MICRO_BATCH_TOKENS", few * batch["input_ids"].shape[1])
    whole, streamed = ptq.load(packed), ptq.load(packed, stream=True)
    parts = [{name: t[start : start + few] for name, t in batch.items()} for start in range(0, 3, few)]
    # states, not logits: a packed head multiplies few tokens in another way than many
    found = streamed.base_model(**batch, use_cache=True)
    wanted = [whole.base_model(**part, use_cache=True) for part in parts]
    assert torch.equal(found.last_hidden_state, torch.cat([part.last_hidden_state for part in wanted]))
    for i, layer in enumerate(found.past_key_values.layers):
        apart = [part.past_key_values.layers[i] for part in wanted]
        assert torch.equal(layer.keys, torch.cat([part.keys for part in apart]))
        assert torch.equal(layer.values, torch.cat([part.values for part in apart]))
        sinks = [part.spared.at[rows].tolist() for part in apart for rows in part.spared.rows]
        assert sinks == [layer.spared.at[rows].tolist() for rows in layer.spared.rows] and sinks[0] != sinks[1]
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(streamed.generate(**batch, **how), whole.generate(**batch, **how))


@torch.no_grad()
def test_a_cache_that_holds_tokens_is_continued(packed, batch, monkeypatch):
    monkeypatch.setattr(
        stream, "MICRO_BATCH_TOKENS", 8
    )  # both of four tokens at once, and none of what cannot be divided
    ids, outs = batch["input_ids"][::2], []
    for model in (ptq.load(packed), ptq.load(packed, stream=True)):
        first = model(ids[:, :4], use_cache=True)
        outs.append(model(ids[:, 4:], past_key_values=first.past_key_values).logits)
    assert torch.equal(*outs)


@pytest.fixture
def events(monkeypatch):
    """What a streamed model does: the number of sequences of each native step taken, "block" for each block run by its modules."""
    seen, step, step_on, forward = [], Decoder.step, Decoder.step_on, stream._forward

    def counted(self, hidden, *args, **more):
        out = step(self, hidden, *args, **more)
        seen.append(len(hidden))
        return out

    def counted_on(self, cache, seat, hidden, turn, **more):
        out = step_on(self, cache, seat, hidden, turn, **more)
        seen.append(len(hidden))
        return out

    monkeypatch.setattr(Decoder, "step", counted)
    monkeypatch.setattr(Decoder, "step_on", counted_on)
    monkeypatch.setattr(stream, "_forward", lambda *args, **more: seen.append("block") or forward(*args, **more))
    return seen


@torch.no_grad()
@needs_kernels
def test_all_steps_are_native_but_a_prefill_whose_sinks_do_not_come_first(packed, batch, events):
    model, how = ptq.load(packed, stream=True), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    model.generate(**batch, **how)
    assert events == ["block"] * BLOCKS + [3] * 3
    events.clear()
    model.generate(batch["input_ids"][::2], **how)
    assert events == [2] * 4


@torch.no_grad()
@needs_kernels
def test_a_prefill_in_parts_reads_each_block_once(packed, batch, events, monkeypatch):
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 4)
    whole, streamed, ids = ptq.load(packed), ptq.load(packed, stream=True), batch["input_ids"][::2]
    read, wait = [], stream.BlockStream._wait_for
    monkeypatch.setattr(stream.BlockStream, "_wait_for", lambda self, i: read.append(i) or wait(self, i))
    found, wanted = (model(ids, use_cache=True) for model in (streamed, whole))
    assert read == [*range(BLOCKS)] and events == [2, 2]
    assert torch.equal(found.logits, wanted.logits)
    layers = zip(found.past_key_values.layers, wanted.past_key_values.layers, strict=True)
    assert all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in layers)


@torch.no_grad()
@needs_kernels
@pytest.mark.parametrize("held", [0, 4])
def test_a_native_pass_that_is_broken_off_leaves_the_cache_as_it_was(packed, batch, held, events, monkeypatch):
    ids, run, calls = batch["input_ids"][::2], cpu.run, []
    models = ptq.load(packed, stream=True), ptq.load(packed)
    cache, wanted = (model(ids[:, :4], use_cache=True).past_key_values for model in models)
    if not held:
        cache, wanted = (models[0](ids, use_cache=True).past_key_values for _ in models)
        for one in (cache, wanted):
            one.reset()

    def interrupt(*args, **more):
        calls.append(run(*args, **more))
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(cpu, "run", interrupt)
    rotations = list(cache.rotations)
    with pytest.raises(KeyboardInterrupt):
        models[0](ids[:, held:], past_key_values=cache)
    assert cache.get_seq_length() == held and cache.rotations == rotations
    found, wanted = (model(ids[:, held:], past_key_values=c).logits for model, c in zip(models, (cache, wanted)))
    assert torch.equal(found, wanted)


@torch.no_grad()
def test_a_block_that_no_native_call_can_run_is_left_to_the_modules(llama, batch, monkeypatch):
    wanted = ptq.load(llama).generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    model, run = ptq.load(llama, stream=True), stream.run_block_on_integers
    third = blocks_of(model)[2]

    def not_the_third(block, spec):
        if block is not third:
            run(block, spec)

    monkeypatch.setattr(stream, "run_block_on_integers", not_the_third)
    assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0), wanted)


@torch.no_grad()
def test_the_next_block_is_read_while_this_one_computes(llama, batch, monkeypatch):
    there, seen, read = threading.Event(), [], stream.BlockStream._read

    def watched(self, i):
        read(self, i)
        if i == 1:
            there.set()

    monkeypatch.setattr(stream.BlockStream, "_read", watched)
    model = ptq.load(llama, stream=True)

    def wait_for_the_next(*_):
        seen.append((there.wait(20), [resident_bytes(block) > 0 for block in blocks_of(model)]))

    blocks_of(model)[0].self_attn.register_forward_hook(wait_for_the_next)
    model(**batch, use_cache=False)  # no native call, which would run no hooks
    assert seen == [(True, [True, True, False, False])]


@torch.no_grad()
@pytest.mark.parametrize("damage", ["gone", "short", "other"])
def test_a_damaged_file_ends_the_pass_in_one_line_and_a_mended_one_is_read(llama, batch, damage, tmp_path, most):
    folder = shutil.copytree(llama, tmp_path / "model")
    model, shard = ptq.load(folder, stream=True), sorted(folder.glob("model-*.safetensors"))[2]
    wanted, content = model(**batch).logits, shard.read_bytes()
    shard.unlink()
    if damage == "short":
        shard.write_bytes(content[:-100])
    if damage == "other":  # as if another model were written over this one while it runs
        shard.write_bytes(content.replace(b'"shape":[128,', b'"shape":[64,2,'))
    with pytest.raises(BadInput, match="model-00003-of-00005.safetensors") as failed:
        model(**batch)
    assert "\n" not in str(failed.value)
    shard.write_bytes(content)
    assert torch.equal(model(**batch).logits, wanted) and most["blocks"] <= 2


@torch.no_grad()
def test_a_pass_that_is_broken_off_leaves_nothing_behind(llama, batch, most):
    model = ptq.load(llama, stream=True)
    wanted = model(**batch).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = blocks_of(model)[1].self_attn.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    handle.remove()
    assert torch.equal(model(**batch).logits, wanted) and most["blocks"] <= 2


@torch.no_grad()
def test_the_thread_ends_with_the_model(llama, batch):
    before = set(threading.enumerate())
    model = ptq.load(llama, stream=True)
    model(**batch)
    started = set(threading.enumerate()) - before
    assert len(started) == 1
    del model
    until = time.monotonic() + 20
    while any(thread.is_alive() for thread in started) and time.monotonic() < until:
        gc.collect()  # more than once: as long as it reads the next block, the thread holds it
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in started)


def test_the_command_says_the_same_with_and_without(llama, capsys):
    said = []
    for more in ([], ["--stream"]):
        words = ["generate", str(llama), "--prompt", "The channels of", "--max-new-tokens", "4", "--device", "cpu"]
        assert main([*words, *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_bench_times_a_streamed_batch(llama):
    (found,) = bench.contenders(llama, None, None, stream=True)
    assert found.stream
    timed = bench.run(found, bench.Load(prefill=9, decode=3, batch=2))
    assert all(timed[name] > 0 for name in ("prefill_seconds", "decode_seconds", "peak_bytes"))


def test_what_cannot_stream_is_refused(llama, model_folder, tmp_path, capsys):
    words = ["--prompt", "a", "--stream", "--device"]
    assert main(["generate", str(model_folder("llama")), *words, "cpu"]) == 2
    assert "only what ptq has compressed and packed can stream" in capsys.readouterr().err
    with pytest.raises(BadInput, match="not on cpu in torch.bfloat16; choose cpu"):
        ptq.load(llama, stream=True, dtype=torch.bfloat16)
    folder = shutil.copytree(llama, tmp_path / "model")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert main(["generate", str(folder), *words, "cpu"]) == 2
    err = capsys.readouterr().err
    assert "truncated" in err and err.count("\n") == 1


@torch.no_grad()
def test_a_compiled_model_computes_the_same(llama, batch):
    model = ptq.load(llama)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(**batch).logits, model(**batch).logits)  # the library's calls, traced, gave other numbers
