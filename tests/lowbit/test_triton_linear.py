"""Linears on the Triton kernels, which Triton's interpreter runs on CPU tensors, against the reference; and who runs on what device."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from interpreter import interpret, launches_of, needs_triton
from lowbit import ActivationQuantizer, Linear, Norm, integer, planar_reference
from lowbit.coded import Coded
from lowbit.planar import EXACT, all_tiles
from lowbit.sinks import announce

C, R = 160, 24  # a last tile of 32 channels, a last unit of one tile
GROUPS, SIZES = torch.tensor([64, 64, 32]), torch.tensor([64, 96])
WIDTHS = torch.tensor([4, 8])
FINE = torch.tensor([False, True, True])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(*shape, channels=C):
    return torch.randn(*shape, channels, generator=seeded(1)) * torch.linspace(0.2, 4, channels)


def quantizer(mode, *, sizes=SIZES, widths=WIDTHS, sinks=0):
    if mode == "none":
        return None
    if mode == "token":
        return ActivationQuantizer("token", token_bits=int(widths[-1]), sinks=sinks)
    if mode == "tile":
        return ActivationQuantizer.tiles(widths, sizes, sinks=sinks)
    scale = torch.linspace(0.05, 0.9, len(sizes))
    return ActivationQuantizer.static(scale, torch.arange(len(sizes)) * 90 + 7.0, widths, sizes, sinks=sinks)


def linear(mode="none", bits=4, *, symmetric=False, fine=None, bias=True, **grid):
    random = seeded(bits)
    new = Linear(C, R, bias=bias, input_quantizer=quantizer(mode, **grid))
    codes = torch.randint(2**bits, (R, C), generator=random, dtype=torch.uint8)
    scale = torch.rand(R, 3, generator=random).add_(0.1).half()
    high = 2 ** (bits if fine is None else 2 * bits)
    zero = torch.full((R, 3), high // 2) if symmetric else torch.randint(2**bits, (R, 3), generator=random)
    if fine is not None:
        codes = torch.where(fine.repeat_interleave(GROUPS), codes * 2**bits + 5 % 2**bits, codes)
        zero = torch.where(fine, zero * 2**bits + 3, zero)
    new.weight = torch.zeros(R, C)
    new.pack_(codes, scale, zero, GROUPS, bits, fine=fine)
    if bias:
        new.bias = torch.randn(R, generator=random)
    return new


# name -> a linear, its input, and the tokens that are sinks.
WIDE = {"sizes": torch.tensor([64, 64, 32]), "widths": torch.tensor([8, 3, 6])}
LINEARS = {
    **{
        f"{mode}, W{bits}": (linear(mode, bits), inputs(2, 3), None)
        for mode in ("none", "token", "tile", "static")
        for bits in (2, 3, 4, 8)
    },
    **{f"{mode}, fine": (linear(mode, 2, fine=FINE), inputs(5), None) for mode in ("none", "token", "tile", "static")},
    "tile, a cluster a tile": (linear("tile", **WIDE), inputs(4), None),
    "static, a cluster a tile": (linear("static", **WIDE), inputs(4), None),
    "tile, symmetric": (linear("tile", symmetric=True, bias=False), inputs(1, 20), None),
    "none, no bias": (linear(bias=False), inputs(1, 1), None),
    "one token": (linear("static"), inputs(), None),
    **{f"{mode}, no token": (linear(mode), inputs(2, 0), None) for mode in ("none", "token", "tile", "static")},
    "tile, sinks": (linear("tile", sinks=1), inputs(2, 3), [0, 4]),
    "static, fine, sinks": (linear("static", 4, sinks=1), inputs(2, 3), [3]),
    **{
        f"{mode}, {str(dtype)[6:]}": (linear(mode), inputs(3).to(dtype), None)
        for mode in ("none", "tile", "static")
        for dtype in (torch.float16, torch.bfloat16)
    },
}
CHILD = """
import sys, torch
from dataclasses import replace
from lowbit import integer
from lowbit.cpu import planar as native
from lowbit.sinks import announce
def none(*_):
    raise AssertionError("a native kernel was called")
native._call = none
integer.KERNELS["cpu"] = replace(integer.KERNELS["cuda"], run_on=lambda device: True)
found = {}
with torch.no_grad():
    for name, (module, x, rows) in torch.load(sys.argv[1], weights_only=False).items():
        assert integer.take([module], dtype=x.dtype), name
        announce(rows)
        found[name] = module(x)
torch.save(found, sys.argv[2])
"""
CODES = """
import sys, torch
from lowbit.triton import linear
found = {}
for name, (function, arguments, repeats) in torch.load(sys.argv[1]).items():
    found[name] = getattr(linear, function)(*arguments, **({} if repeats is None else {"repeats": repeats}))
torch.save(found, sys.argv[2])
"""


def interpreted(code, given, folder):
    """What the child makes of `given`."""
    torch.save(given, folder / "in")
    interpret(code, folder, "in", "out")
    return torch.load(folder / "out")


def sinks_among(x, spared):
    rows = torch.zeros(x[..., 0].numel(), dtype=torch.bool)
    rows[spared] = True
    return rows


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    given = {n: (m, x, None if s is None else sinks_among(x, s)) for n, (m, x, s) in LINEARS.items()}
    return interpreted(CHILD, given, tmp_path_factory.mktemp("linears"))


@needs_triton
@pytest.mark.parametrize("name", LINEARS)
@torch.no_grad()
def test_a_linear_computes_what_the_reference_does(name, found):
    module, x, spared = LINEARS[name]
    if spared is not None:
        announce(sinks_among(x, spared))
    expected = module(x.float())
    announce(None)
    y = found[name]
    assert y.shape == expected.shape and y.dtype == x.dtype and module.planar is None
    if not y.numel():
        return
    # Codes are the reference's, so what differs is the order of float32 sums; without a grid a number is two int8 codes, 2^-15 of its
    # tile's largest off; and the result is rounded to its dtype.
    near = 2.0**-14 if "none" in name or spared else 1e-5
    near += 0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
    assert float((y.float() - expected).abs().max() / expected.abs().max()) < near


# channels -> sizes of clusters, some of one tile, some of more
CLUSTERS = {200: [128, 72], 330: [64, 192, 74], 64: [64], 1: [1], 2500: [1280, 1220], 190: [64, 64, 62]}


def code_cases():
    cases = {}
    for channels, sizes in CLUSTERS.items():
        bits, sizes = torch.tensor([8, 4, 3][: len(sizes)], dtype=torch.uint8), torch.tensor(sizes)
        scale, zero = torch.tensor([0.3, 0.1, 0.02])[: len(sizes)], torch.tensor([7.0, -300, 900])[: len(sizes)]
        for T in (0, 1, 5):
            x = inputs(T, channels=channels)
            if T == 5:
                x[1], x[2, -1], x[3, 0], x[4] = 0, torch.nan, torch.inf, x[4].abs()
            again = torch.tensor([0, all_tiles(channels, None) // 2 - 1]) if T == 1 else None
            cases[f"static {channels} {T}"] = "quantize_static", (x, scale, zero, bits, sizes), again
            cases[f"tiles {channels} {T}"] = "quantize_tiles", (x, bits, sizes), again
            cases[f"token {channels} {T}, 8 bits"] = "quantize_token", (x, 8), again
            cases[f"token {channels} {T}, 3 bits"] = "quantize_token", (x, 3), again
    return cases


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    exact = {f"exactly {T}": ("quantize_exactly", (inputs(T, channels=1100),), None) for T in (0, 1, 3)}
    return interpreted(CODES, code_cases() | exact, tmp_path_factory.mktemp("codes"))


@needs_triton
@pytest.mark.parametrize("name", code_cases())
def test_codes_and_grids_are_the_reference_s(name, codes):
    function, (x, *more), repeats = code_cases()[name]
    expected = getattr(planar_reference, f"{function}_planar")(x, *more)
    expected = planar_reference.repeat_tiles(expected, x.shape[1], repeats)
    for value, wanted in zip(codes[name], expected, strict=True):
        wanted = torch.zeros_like(value).where(~value.isnan(), value) if wanted is None else wanted
        torch.testing.assert_close(value, wanted, rtol=0, atol=0, equal_nan=True)


@needs_triton
@pytest.mark.parametrize("T", [0, 1, 3])
def test_numbers_without_a_grid_are_two_codes_each(T, codes):
    a, step, shift, count = codes[f"exactly {T}"]
    expected, steps = integer.exact_codes(inputs(T, channels=1100), EXACT)
    assert torch.equal(a, expected.flatten(0, 1)) and torch.equal(step, steps.flatten(0, 1)) and shift is None
    assert torch.equal(count, step * a.unflatten(1, (-1, 64)).sum(2))


def norm(kind, quantized, *, bias=False, permuted=False, rotation=1, channels=C):
    new = Norm(channels, kind=kind, eps=1e-5, bias=bias, permuted=permuted, rotation=rotation, quantizer=quantized)
    new.weight = torch.linspace(0.5, 1.5, channels)
    if bias:
        new.bias = torch.linspace(-0.3, 0.3, channels)
    if permuted:
        new.permutation = torch.randperm(channels, generator=seeded(5)).to(torch.int32)
    return new


def behind(before, *bits, fine=None):
    """`before` and linears that share its output."""
    return before, [linear(bits=b, fine=fine if i else None) for i, b in enumerate(bits)]


# name -> a norm and the linears behind it, its input, the tokens that are sinks, and whether the norm is in the quantizer's pass
NORMED = {
    "static": (behind(norm("layernorm", quantizer("static"), bias=True), 4, 4, 3), inputs(2, 3), None, True),
    "static, permuted, fine": (
        behind(norm("rmsnorm", quantizer("static"), permuted=True), 2, 2, fine=FINE), inputs(5), None, True,
    ),
    "a cluster a tile, permuted": (
        behind(norm("rmsnorm_plus_one", quantizer("tile", **WIDE), permuted=True), 4, 8), inputs(1, 1), None, True,
    ),
    "a cluster a tile, half": (
        behind(norm("rmsnorm", quantizer("tile", **WIDE)), 4, 4), inputs(3).half(), None, True,
    ),
    "clusters": (behind(norm("rmsnorm", quantizer("tile"), permuted=True), 4, 4, 4), inputs(2, 3), None, False),
    "token": (behind(norm("layernorm", quantizer("token")), 8, 4), inputs(4), None, False),
    "turned by 32": (behind(norm("rmsnorm", quantizer("static"), rotation=32), 4, 4), inputs(3), None, False),
    "no token": (behind(norm("rmsnorm", quantizer("static")), 4, 4), inputs(2, 0), None, True),
    "no token is a sink": (behind(norm("rmsnorm", quantizer("static", sinks=1)), 4, 4), inputs(2, 2), [], True),
    "sinks": (behind(norm("rmsnorm", quantizer("static", sinks=1)), 4, 4), inputs(2, 2), [1], None),
}  # fmt: skip
SHARED = """
import sys, torch
from dataclasses import replace
from lowbit import integer
from lowbit.sinks import announce
from lowbit.triton import linear, quantize
integer.KERNELS["cpu"] = replace(integer.KERNELS["cuda"], run_on=lambda device: True)
def counted(module, name):
    run = getattr(module, name)
    setattr(module, name, lambda *given, **more: calls.append((name, more.get("kind"))) or run(*given, **more))
counted(quantize, "norm_quantize"), counted(quantize, "quantize_clusters")
found = {}
with torch.no_grad():
    for name, ((norm, linears), x, rows) in torch.load(sys.argv[1], weights_only=False).items():
        assert integer.take(linears, norm, dtype=x.dtype), name
        calls = []
        announce(rows)
        y = norm(x)
        found[name] = [linear(y) for linear in linears], calls, y + 0
torch.save(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    given = {n: (m, x, None if s is None else sinks_among(x, s)) for n, (m, x, s, _) in NORMED.items()}
    return interpreted(SHARED, given, tmp_path_factory.mktemp("shared"))


@needs_triton
@pytest.mark.parametrize("name", NORMED)
@torch.no_grad()
def test_linears_behind_a_norm_share_its_codes(name, shared):
    (before, linears), x, spared, fused = NORMED[name]
    results, calls, plain = shared[name]
    announce(None if spared is None else sinks_among(x, spared))
    between = before(x.float())
    expected = [module(between) for module in linears]
    announce(None)
    if fused is None:  # rows that are sinks run apart, in each linear
        assert len(calls) == len(linears)
    else:
        assert [kind for _, kind in calls] == [before.kind if fused else None]
    unrounded = before.normalized(x)
    assert torch.equal(plain, unrounded) and plain.dtype == x.dtype
    for y, wanted in zip(results, expected, strict=True):
        assert y.shape == wanted.shape and y.dtype == x.dtype
        if y.numel():
            # float32 sums whose terms are many times their results, some with zero points of 97. In half precision the norm's output is
            # rounded to 2^-11, so that numbers at the edge between two codes fall to the other side.
            near = 2e-2 if x.dtype == torch.float16 else 2.0**-14 if spared else 5e-5
            assert float((y.float() - wanted).abs().max() / wanted.abs().max()) < near


@needs_triton
@pytest.mark.parametrize("name", [name for name, (*_, spared, _) in NORMED.items() if spared is None])
@torch.no_grad()
def test_a_norm_launches_one_quantizer_for_all_linears_behind_it(name, launches):
    (before, linears), x, _, fused = NORMED[name]
    device = torch.device("meta")
    layouts = [integer.laid_out(module).to(device) for module in linears]
    before, linears = copy.deepcopy((before, linears))
    for module, planar in zip(linears, layouts):
        module.to(device).planar, module.taken_over = planar, (before.to(device).quantizer,)
    before.handed_over = True
    y = before(x.to(device))
    assert type(y) is Coded and y.shape == x.shape and y.dtype == x.dtype
    assert all(module(y).shape == (*x.shape[:-1], R) for module in linears)
    first = "quantize_kernel" if before.quantizer.mode == "static" or fused else "clusters_kernel"
    wanted = [first] + ["linear_kernel", "sum_kernel"] * len(linears)
    assert launches == ([(kernel, {"meta"}) for kernel in wanted] if x.numel() else [])


@needs_triton
@torch.no_grad()
def test_a_linear_takes_no_codes_of_another_s_quantizer(launches):
    before, (first, second) = behind(norm("rmsnorm", quantizer("static")), 4, 4)
    device, planar = torch.device("meta"), integer.laid_out(first)
    before.handed_over = True
    first.to(device).planar, first.taken_over = planar.to(device), (before.to(device).quantizer,)
    y = before(inputs(3).to(device))
    launches.clear()
    first.taken_over = (copy.deepcopy(before.quantizer),)
    assert first(y).is_meta and [kernel for kernel, _ in launches] == ["quantize_kernel", "linear_kernel", "sum_kernel"]
    launches.clear()
    first.planar = None
    assert first(y).is_meta and second.to(device)(y).is_meta and launches == []


def test_codes_are_not_made_where_a_gradient_is_asked(monkeypatch):
    monkeypatch.setitem(integer.KERNELS, "cpu", replace(integer.KERNELS["cuda"], run_on=lambda device: True))
    before = norm("rmsnorm", quantizer("static"))
    before.handed_over = True
    y = before(inputs(3).requires_grad_())
    assert type(y) is torch.Tensor and y.requires_grad


class OnGPU:
    """A machine with a GPU, as far as `integer` asks."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setitem(integer.KERNELS, "cuda", replace(integer.KERNELS["cuda"], run_on=lambda device: True))


@pytest.fixture
def launches(monkeypatch):
    """What would be launched on a device without numbers, "meta": (kernel, its tensors' devices)."""
    from lowbit.triton import planar_linear, quantize

    kernels = [
        (module, name) for module in (planar_linear, quantize) for name in dir(module) if name.endswith("_kernel")
    ]
    return launches_of(monkeypatch, kernels, planar_linear)


# Sinks are left out: whether a token is one decides what is launched.
@needs_triton
@pytest.mark.parametrize("name", [name for name, (*_, spared) in LINEARS.items() if spared is None])
@torch.no_grad()
def test_no_number_leaves_the_device_and_no_tensor_is_elsewhere(name, launches):
    module, x, _ = LINEARS[name]
    device, planar = torch.device("meta"), integer.laid_out(module)
    module = copy.deepcopy(module).to(device)
    module.planar = planar.to(device)
    y = module(x.to(device))
    assert y.device == device and y.dtype == x.dtype and y.shape == (*x.shape[:-1], R)
    quantizers = {"none": "exact", "token": "clusters", "tile": "clusters", "static": "quantize"}
    first = "quantize" if "a cluster a tile" in name else quantizers.get(name.split(",")[0], "quantize")
    wanted = [f"{first}_kernel", "linear_kernel", "sum_kernel"] if x.numel() else []
    # two codes a number, and tiles of fine groups once more, are made by PyTorch
    wanted = wanted[1:] if name == "none, fine" else wanted
    assert launches == [(kernel, {"meta"}) for kernel in wanted]


@torch.no_grad()
def test_a_model_beside_a_gpu_is_laid_out_to_move_there(monkeypatch):
    half = linear("tile")
    assert not integer.take([half], dtype=torch.float16)
    OnGPU(monkeypatch)
    expected = half(inputs(3).half())
    assert integer.take([half], dtype=torch.float16) and torch.equal(half(inputs(3).half()), expected)
    assert not integer.take([linear("tile")], dtype=torch.float64)


def test_the_layout_goes_where_the_weight_goes_and_keeps_its_dtypes(monkeypatch):
    OnGPU(monkeypatch)
    norm = Norm(C, kind="rmsnorm", eps=1e-5, quantizer=quantizer("tile"))
    module, seen = linear(fine=FINE, bits=2), []
    norm.weight = torch.ones(C)
    assert integer.take([module], norm)
    before = module.planar
    module.half()
    assert module.planar is before and before.scale.dtype == torch.float32
    moved = before.to(torch.device("meta"))
    tensors = (*moved.planes, moved.scale, moved.zero, moved.total, moved.repeats)
    assert all(t.is_meta for t in tensors) and [t.shape for t in moved.planes] == [t.shape for t in before.planes]
    monkeypatch.setattr(type(before), "to", lambda self, device: seen.append(device) or before)
    torch.nn.Sequential(norm, module).to("cpu")
    assert seen == [torch.device("cpu")]
    assert module.to("meta").planar is None


@torch.no_grad()
def test_a_weight_on_another_device_is_never_used(monkeypatch):
    OnGPU(monkeypatch)
    module, x = linear("static"), inputs(3)
    expected = module(x)
    assert integer.take([module])
    module.planar = module.planar.to(torch.device("meta"))
    assert not integer.runs(x, module.planar, module.input_quantizer) and torch.equal(module(x), expected)


@needs_triton
def test_tensors_of_several_devices_are_refused():
    from lowbit.triton import linear as kernels

    x, bits, weight = inputs(3), WIDTHS.to(torch.uint8), integer.laid_out(linear())
    with pytest.raises(ValueError, match="bits must be torch.uint8 \\[2\\] on meta, got torch.uint8 \\[2\\] on cpu"):
        kernels.quantize_tiles(x.to("meta"), bits, SIZES)
    with pytest.raises(ValueError, match="sizes must be torch.int64 \\[2\\] on cpu, got torch.int32"):
        kernels.quantize_tiles(x, bits, SIZES.int())
    a, grid = torch.zeros(3, 256, dtype=torch.int8), torch.zeros(3, 4)
    with pytest.raises(ValueError, match="a must be torch.int8 \\[3, 256\\] on cpu, got .* on meta"):
        kernels.planar_linear(a.to("meta"), grid, None, grid, weight)
    with pytest.raises(ValueError, match=r"step must be torch.float32 \[1, 4\] or \[3, 4\] on cpu"):
        kernels.planar_linear(a, grid[:2], None, grid, weight)
    with pytest.raises(ValueError, match="2 terms of 3 rows"):
        kernels.planar_linear(a, grid, None, grid, weight, terms=2)
    with pytest.raises(ValueError, match="activation bits 9"):
        kernels.quantize_token(x, 9)


def test_a_gpu_without_triton_says_so_once(monkeypatch, recwarn):
    integer._triton_runs_on.cache_clear()
    monkeypatch.setattr(integer, "find_spec", lambda name: None)
    for _ in range(2):
        assert not integer.KERNELS["cuda"].run_on(torch.device("cuda", 0))
    integer._triton_runs_on.cache_clear()
    assert [str(w.message) for w in recwarn] == [
        "lowbit.integer has no kernels for cuda:0 (triton is missing: install triton): slow PyTorch operations run"
    ]
