"""lowbit's operators and what torch.compile makes of packed modules: the numbers and shapes of the functions themselves."""

from __future__ import annotations

import pytest
import torch
from lowbit import ActivationQuantizer, Linear, Norm, integer, library, reference, sinks
from lowbit.cpu import native
from lowbit.cpu import planar as cpu

needs_kernels = pytest.mark.skipif(not native.fast_avx2(), reason="no compiled kernels that this machine would run")
C, R = 160, 24  # a last tile of 32 channels, a last unit of one tile
SIZES, GROUPS = torch.tensor([64, 96]), torch.tensor([64, 64, 32])
BITS = torch.tensor([4, 8], dtype=torch.uint8)


@pytest.fixture(autouse=True)
def no_grad():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def inputs(*shape):
    return torch.randn(*shape, C, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 4, C)


def quantizers():
    scale, zero = torch.tensor([0.3, 0.1]), torch.tensor([7.0, 120.0])
    return {
        "none": None,
        "token": ActivationQuantizer("token", token_bits=8),
        "tile": ActivationQuantizer.tiles(BITS, SIZES),
        "static": ActivationQuantizer.static(scale, zero, BITS, SIZES),
    }


def linear(mode="none", *, bits=4, fine=None, **options):
    random = torch.Generator().manual_seed(0)
    new = Linear(C, R, input_quantizer=quantizers()[mode], **options)
    new.weight, new.bias = torch.zeros(R, C), torch.randn(R, generator=random)
    codes = torch.randint(2**bits, (R, C), generator=random, dtype=torch.uint8)
    scale = torch.rand(R, 3, generator=random).add_(0.1).half()
    new.pack_(codes, scale, torch.randint(2**bits, (R, 3), generator=random), GROUPS, bits, fine=fine)
    return new.eval()


def calls(tokens=5):
    """name -> arguments of an operator, with and without what it may be given."""
    weight = linear(fine=torch.tensor([True, False, False]))
    assert integer.take([weight])
    w, x = weight.planar, inputs(tokens)
    static, tile = (quantizers()[mode] for mode in ("static", "tile"))
    codes = cpu.quantize_tiles(x, BITS, tile.sizes.long(), repeats=w.repeats)
    twice = [t if t is None else torch.cat([t, t]) for t in codes]
    stored = list(w.planes), w.scale, w.tables
    return [
        ("quantize_static", (x, static.scale, static.zero, BITS, SIZES, None)),
        ("quantize_tiles", (x, BITS, SIZES, w.repeats)),
        ("quantize_tiles", (x, BITS // 2, SIZES, None)),
        ("quantize_token", (x, 4, w.repeats)),
        ("planar_linear", (*codes, *stored, weight.bias, 4, 1)),
        ("spare", (torch.ones(tokens, R), torch.arange(tokens) == 0, x, *stored, w.repeats, weight.bias, 4)),
        ("planar_linear", (*twice[:2], None, twice[3], *stored, None, 4, 2)),
    ]


@needs_kernels
def test_operators_keep_what_they_promise():
    for name, arguments in [*calls(), calls(tokens=1)[4]]:
        torch.library.opcheck(getattr(torch.ops.lowbit, name).default, arguments)


@needs_kernels
def test_operators_return_what_the_functions_return():
    x, sizes = inputs(5), SIZES
    w = linear("tile")
    assert integer.take([w])
    static = quantizers()["static"]
    for name, arguments in {
        "quantize_static": (x, static.scale, static.zero, BITS, sizes),
        "quantize_tiles": (x, BITS, sizes),
        "quantize_token": (x, 8),
    }.items():
        found, expected = (getattr(home, name)(*arguments) for home in (library, cpu))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert torch.equal(
            library.planar_linear(*found, w.planar, w.bias), cpu.planar_linear(*expected, w.planar, w.bias)
        )
    assert cpu.quantize_token(x, 4)[2] is None and not library.quantize_token(x, 4)[2].any()


@needs_kernels
def test_planes_of_another_weight_are_refused():
    name, arguments = calls()[4]
    planes, scale, tables = arguments[4:7]
    for wrong in (([planes[0][:, 1:].contiguous()], scale, tables), (planes, scale, tables[:1]), ([], scale, tables)):
        with pytest.raises(ValueError, match="are not those of one 4-bit PlanarWeight"):
            torch.ops.lowbit.planar_linear(*arguments[:4], *wrong, *arguments[7:])


@pytest.mark.parametrize(
    "mode, on_kernels", [("tile", False), *(pytest.param(mode, True, marks=needs_kernels) for mode in quantizers())]
)
def test_a_packed_linear_compiles_in_one_graph(mode, on_kernels):
    module = linear(mode, bits=3 if mode == "token" else 4)
    assert not on_kernels or integer.take([module])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for shape in ((1, 1), (2, 5)):
        assert torch.equal(compiled(inputs(*shape)), module(inputs(*shape)))


@pytest.mark.parametrize("on_kernels", [False, pytest.param(True, marks=needs_kernels)])
def test_spared_sinks_compile_in_one_graph_whoever_announces_them(on_kernels):
    module, x = linear("tile"), inputs(2, 5)
    module.input_quantizer.sinks = 1
    assert not on_kernels or integer.take([module])

    def announced(rows):
        sinks.announce(rows)
        y = module(x)
        sinks.announce(None)
        return y

    inside = torch.compile(announced, fullgraph=True, backend="aot_eager")
    alone = torch.compile(module, fullgraph=True, backend="aot_eager")
    for count in (1, 2):  # how many are spared is no part of the graph
        rows = sinks.leading(2, 5, count).clone()
        expected = announced(rows)
        assert torch.equal(inside(rows), expected)
        sinks.announce(rows)
        assert torch.equal(alone(x), expected)
    sinks.announce(None)
    with pytest.raises(ValueError, match="known are none"):
        module(x)


@needs_kernels
def test_the_operators_are_in_the_graph():
    module, seen = linear("tile"), []
    assert integer.take([module])

    def look(graph, example):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(module, fullgraph=True, backend=look)(inputs(2, 5))
    assert [name for name in seen if "lowbit" in name] == ["lowbit.quantize_tiles", "lowbit.planar_linear"]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_norm_that_permutes_rotates_and_rounds_compiles_in_one_graph():
    norm = Norm(C, kind="rmsnorm", eps=1e-5, permuted=True, rotation=32, quantizer=quantizers()["tile"]).eval()
    norm.weight = torch.randn(C, generator=torch.Generator().manual_seed(2))
    norm.permutation = torch.randperm(C, generator=torch.Generator().manual_seed(3)).int()
    x = inputs(2, 3)
    assert torch.equal(torch.compile(norm, fullgraph=True, backend="aot_eager")(x), norm(x))


def test_a_compiled_tile_has_the_extremes_of_a_tile():
    x = inputs(3)
    x[0, 3], x[1, 70], x[2, 100] = float("nan"), float("inf"), float("-inf")
    for sizes in (SIZES, torch.tensor([80, 80])):
        expected = reference.tile_extremes(x, sizes)
        found = torch.compile(reference.tile_extremes, fullgraph=True, backend="eager")(x, sizes)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@needs_kernels
def test_kernels_follow_pytorchs_threads(monkeypatch):
    module, seen = linear("tile"), []
    assert integer.take([module])
    library_call = cpu._function

    def spy(*which):
        call = library_call(*which)
        return lambda path, threads, *rest: seen.append(threads) or call(path, threads, *rest)

    monkeypatch.setattr(cpu, "_function", spy)
    one = module(inputs(7))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(module(inputs(7)), one)
    finally:
        torch.set_num_threads(before)
    assert seen == [before, 2]
