"""Forwards that stop at each site: both strategies give the same bits, in order, and an error leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from greenlet import getcurrent
from tiny_models import VOCAB
from torch import nn

from ptq.architectures import spec_for
from ptq.architectures.families import LLAMA
from ptq.blocks import load_block, record_calls, run_block, skeleton, tensor_names
from ptq.sequential import Forwards, run_again, run_paused
from ptq.sites import InputSite, block_sites
from ptq.source import open_checkpoint

STRATEGIES = [run_paused, run_again]
EXAMPLES = ["opt", "llama", "gptj", "bloom", "gemma2", "gpt2", "mixtral", "qwen2_moe"]
SITES = {
    "gptj": ["R1", "R3", "R5"],  # one norm feeds attention and MLP
    "mixtral": ["R1", "R3", "R4", *(f"{site}.e{e}" for e in range(4) for site in ("R4", "R5"))],
    "qwen2_moe": ["R1", "R3", "R4", "R5", *(f"{site}.e{e}" for e in range(4) for site in ("R4", "R5"))],
}
BATCHES = torch.randint(3, VOCAB, (5, 12), generator=torch.Generator().manual_seed(0)).split(2)  # 2, 2 and 1 windows


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def opened(model_folder):
    """family -> (a fresh block 0, its sites, one forward a micro-batch)."""

    def made(family):
        checkpoint = open_checkpoint(model_folder(family))
        model = skeleton(checkpoint)
        spec = spec_for(checkpoint.config, model)
        model.set_attn_implementation("eager")
        names = tensor_names(model, spec, checkpoint)
        options = {"device": torch.device("cpu"), "dtype": torch.float32}
        states, calls = record_calls(model, spec, names, checkpoint, list(BATCHES), **options)
        block = load_block(model, spec, 0, names, checkpoint, device="cpu")
        forwards = [lambda x=x: run_block(block, x, calls[0][x.shape[0]]) for x in states]
        return block, block_sites(spec, block), forwards

    return made


def halve(block, site):
    """Stands for compression: changes the site's linears so that all that follows changes."""
    for path in site.linears:
        linear = block.get_submodule(path)
        linear.weight = linear.weight * torch.tensor([1.0, 0.0]).repeat(linear.in_features // 2)


class Watch:
    """Writes down what a strategy does to a block; counts how often each linear has run."""

    def __init__(self, block, sites):
        self.block, self.seen, self.finished, self.runs = block, [], [], {}
        self.before = {}
        paths = [path for site in sites for path in site.linears]
        self.handles = [block.get_submodule(p).register_forward_hook(self.count(p)) for p in paths]

    def count(self, path):
        def hook(*_):
            self.runs[path] = self.runs.get(path, 0) + 1

        return hook

    def measure(self, site, x):
        self.seen.append((site.name, x.clone()))

    def finish(self, site):
        self.finished.append(site.name)
        self.before |= {path: self.runs.get(path, 0) for path in site.linears}
        halve(self.block, site)


def walk(opened, family, strategy):
    block, sites, forwards = opened(family)
    watch = Watch(block, sites)
    (outputs,) = strategy([Forwards(block, forwards)], sites, measure=watch.measure, finish=watch.finish)
    return watch, outputs, forwards


@pytest.mark.parametrize("family", EXAMPLES)
def test_both_strategies_give_the_same_bits(family, opened):
    (paused, left, forwards), (again, left_again, _) = (walk(opened, family, strategy) for strategy in STRATEGIES)
    assert [name for name, _ in paused.seen] == [name for name, _ in again.seen]
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(paused.seen, again.seen, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(left, left_again, strict=True))
    # and those bits are what the compressed block makes of the inputs, batch by batch
    assert all(torch.equal(x, forward()) for x, forward in zip(left, forwards, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", EXAMPLES)
def test_every_site_is_finished_once_in_order_before_its_linears_run(family, strategy, opened):
    watch, _, _ = walk(opened, family, strategy)
    assert watch.finished == SITES.get(family, ["R1", "R3", "R4", "R5"])
    assert set(watch.before.values()) == {0}
    if strategy is run_paused:  # every linear once a batch; of the experts, those that a batch's tokens chose
        assert set(watch.runs.values()) <= {1, 2, 3} and watch.runs[next(iter(watch.before))] == 3
    dense = [name for name, _ in watch.seen if ".e" not in name]
    assert [dense.count(name) for name in dict.fromkeys(dense)] == [3] * len(set(dense))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_site_sees_what_the_compressed_sites_before_it_make(strategy, opened):
    watch, _, forwards = walk(opened, "llama", strategy)
    inputs, block = {}, watch.block

    def look(name):
        return lambda _, args: inputs.setdefault(name, []).append(args[0])

    for site in block_sites(LLAMA, block):
        block.get_submodule(site.linears[-1]).register_forward_pre_hook(look(site.name))
    for forward in forwards:  # the block as it is now, all compressed
        forward()
    for name, x in watch.seen:
        assert torch.equal(inputs[name].pop(0), x)
    untouched, _, forwards = opened("llama")
    x = []
    untouched.self_attn.o_proj.register_forward_pre_hook(lambda _, args: x.append(args[0]))
    forwards[0]()
    assert not torch.allclose(x[0], next(x for name, x in watch.seen if name == "R3"))  # so compression was seen


class Broken(Exception):
    pass


def fail_on(count, what=lambda *_: None):
    """`what`, but the call number `count` raises."""
    calls = []

    def run(*args):
        calls.append(args)
        if len(calls) == count:
            raise Broken
        return what(*args)

    return run


def remember(greenlets, forward):
    """`forward`, writing down the greenlet that it runs in."""

    def run():
        greenlets.append(getcurrent())
        return forward()

    return run


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["opt", "llama", "gptj", "qwen2_moe"])
def test_a_second_block_goes_beside_the_first(family, strategy, opened):
    block, sites, forwards = opened(family)
    other, _, its_forwards = opened(family)
    expected = [forward() for forward in its_forwards]
    alone = {}
    strategy(
        [Forwards(other, its_forwards)],
        sites,
        measure=lambda site, x: alone.setdefault(site.name, []).append(x),
        finish=lambda site: None,
    )
    watch, beside = Watch(block, sites), {}

    def measure(site, x, *full):
        watch.measure(site, x)
        assert bool(full) == (site.expert is None)
        beside.setdefault(site.name, []).extend(full)

    runs = [Forwards(block, forwards), Forwards(other, its_forwards)]
    outputs, full_outputs = strategy(runs, sites, measure=measure, finish=watch.finish)
    for name, inputs in beside.items():  # which shows that each came with its own micro-batch, too
        assert all(torch.equal(x, y) for x, y in zip(inputs, alone[name] if ".e" not in name else [], strict=True))
    assert all(torch.equal(x, y) for x, y in zip(full_outputs, expected, strict=True))
    assert all(torch.equal(x, forward()) for x, forward in zip(outputs, forwards, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(outputs, full_outputs))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("place", ["measure", "finish", "first forward", "last forward", "inside a block"])
def test_an_error_unwinds_everything(place, strategy, opened):
    block, sites, forwards = opened("llama")
    expected = [forward() for forward in forwards]
    hooks = {name: list(m._forward_pre_hooks) for name, m in block.named_modules()}
    measure = fail_on(5) if place == "measure" else lambda *_: None
    finish = fail_on(3) if place == "finish" else lambda *_: None
    n, greenlets = {"first forward": 0, "last forward": 2}.get(place), []
    broken = [remember(greenlets, fail_on(1) if i == n else forward) for i, forward in enumerate(forwards)]
    act_fn = block.mlp.act_fn
    if place == "inside a block":  # between R4 and R5, with all forwards on their way
        block.mlp.act_fn = type("BrokenActivation", (nn.Module,), {"forward": fail_on(1)})()
    with pytest.raises(Broken):
        strategy([Forwards(block, broken)], sites, measure=measure, finish=finish)
    block.mlp.act_fn = act_fn
    assert {name: list(m._forward_pre_hooks) for name, m in block.named_modules()} == hooks
    assert all(g.dead for g in greenlets if g is not getcurrent())
    assert greenlets and (strategy is run_again) == (getcurrent() in greenlets)
    assert all(torch.equal(x, forward()) for x, forward in zip(expected, forwards))


def test_stopped_forwards_run_their_own_cleanup(opened):
    block, sites, forwards = opened("opt")
    ended = []

    def careful(forward):
        def run():
            try:
                return forward()
            finally:
                ended.append(True)

        return run

    with pytest.raises(Broken):
        run_paused([Forwards(block, [careful(f) for f in forwards])], sites, measure=lambda *_: None, finish=fail_on(2))
    assert ended == [True] * 3


def test_sites_in_the_wrong_order_are_an_error(opened):
    block, (first, second, *rest), forwards = opened("opt")
    with pytest.raises(RuntimeError, match="site R3 was reached after a later one"):
        run_paused([Forwards(block, forwards)], (second, first, *rest), measure=lambda *_: None, finish=lambda *_: None)


def test_a_router_is_watched_where_no_linear_shares_its_input(opened):
    block, sites, forwards = opened("mixtral")
    router = next(site for site in sites if site.router)
    assert router == InputSite("R4", (), "post_attention_layernorm", router="mlp.gate")
    watch = Watch(block, sites)
    run_paused([Forwards(block, forwards)], sites, measure=watch.measure, finish=watch.finish)
    tokens = {name: sum(x.shape[0] for s, x in watch.seen if s == name) for name, _ in watch.seen if ".e" in name}
    at_router = sum(x.numel() // x.shape[-1] for name, x in watch.seen if name == "R4")
    assert at_router == BATCHES[0].shape[1] * 5
    assert sum(n for name, n in tokens.items() if name.startswith("R4.e")) == 2 * at_router  # two experts a token
    assert all(tokens[f"R4.e{e}"] == tokens[f"R5.e{e}"] for e in range(4))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_site_that_no_forward_reaches_is_finished_all_the_same(strategy, opened):
    block, sites, forwards = opened("mixtral")
    block.mlp.gate.register_forward_hook(lambda _, args, out: (*out[:2], torch.tensor([0, 1]).expand_as(out[2])))
    watch = Watch(block, sites)
    strategy([Forwards(block, forwards)], sites, measure=watch.measure, finish=watch.finish)
    assert {name for name, _ in watch.seen} == {"R1", "R3", "R4", "R4.e0", "R5.e0", "R4.e1", "R5.e1"}
    assert watch.finished == SITES["mixtral"]
