"""The planar layout, its integer linear in PyTorch, and every path of the kernels."""

import math
from dataclasses import replace
from functools import partial

import lowbit
import pytest
import torch
from lowbit import integer, planar
from lowbit import planar_reference as reference
from lowbit.cpu import native
from lowbit.cpu import planar as cpu
from lowbit.planar import EXACT, padded_codes, planar_weight, unplanar
from lowbit.reference import (
    dequantize_weight,
    quantize_activation_dynamic,
    quantize_activation_static,
    quantize_activation_tiles,
)

needs_library = pytest.mark.skipif(native.library() is None, reason="lowbit's C++ library is not built here")
BITS = [8, 4, 3, 2]
# (rows, channels): one of each, a ragged tile, a ragged unit, rows that fill no block, blocks and a rest, whole units.
SHAPES = [(1, 1), (1, 64), (7, 65), (16, 128), (33, 200), (50, 320), (40, 512)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def spans(channels, size):
    """Sizes of runs of `size` channels, the last one what is left."""
    whole, rest = divmod(channels, size)
    return torch.tensor([size] * whole + [rest] * (rest > 0))


def disk_weight(R, C, bits, *, group=64, symmetric=False, seed=0):
    """Tensors as `lowbit.Linear` stores them: packed codes, scale, packed zero points, sizes."""
    sizes, generator = spans(C, group), seeded(seed)
    codes = torch.randint(2**bits, (R, C), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(R, len(sizes), generator=generator) + 0.1).half()
    zero = torch.randint(2**bits, (R, len(sizes)), generator=generator, dtype=torch.uint8)
    zero = torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
    return codes, (lowbit.pack(codes, bits), scale, lowbit.pack(zero, bits), sizes)


def activations(T, C, seed=1):
    """Tokens of several magnitudes, off centre."""
    x = torch.randn(T, C, generator=seeded(seed)) + 0.3
    return x * torch.logspace(-2, 2, T)[:, None] if T else x


def static_grids(C, bits, sizes, seed=2):
    generator = seeded(seed)
    scale = torch.rand(len(sizes), generator=generator) * 0.05 + 0.01
    zero = torch.randint(-40, 300, (len(sizes),), generator=generator).float()
    return scale, zero, bits, sizes


def clusters(mode, C):
    """Sizes and bits, mixed or, in mode "low", all 7."""
    sizes = spans(C, 128 if mode == "static" else 64)
    return sizes, torch.full_like(sizes, 7).byte() if mode == "low" else (torch.arange(len(sizes)) % 7 + 2).byte()


def quantized(mode, x, *, run=reference):
    """(codes and grids, xhat) of x in tiles of mixed bits, on static grids, or on a token's own."""
    names = {n.removesuffix("_planar"): getattr(run, n) for n in dir(run) if n.startswith("quantize_")}
    C = x.shape[1]
    if mode == "token":
        return names["quantize_token"](x, 8), quantize_activation_dynamic(x, 8)
    sizes, bits = clusters(mode, C)
    if mode == "static":
        grids = static_grids(C, bits, sizes)
        return names["quantize_static"](x, *grids), quantize_activation_static(x, *grids)
    return names["quantize_tiles"](x, bits, sizes), quantize_activation_tiles(x, bits, sizes)


MODES = ["tiles", "low", "token", "static"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_planes_hold_the_centred_codes(shape, bits):
    codes, disk = disk_weight(*shape, bits)
    weight = planar_weight(*disk, bits=bits, channels=shape[1])
    assert torch.equal(unplanar(weight), (codes.int() - 2 ** (bits - 1)).to(torch.int8))
    assert not padded_codes(weight)[:, shape[1] :].any()
    assert sum(plane.numel() for plane in weight.planes) == shape[0] * weight.padded * bits // 8


@needs_library
@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("R, C", [(1, 128), (5, 384), (33, 512)])
def test_native_nibbles_are_the_same_bytes(R, C, fine, monkeypatch):
    _, stored = disk_weight(R, C, 4)
    rest = (
        torch.randint(256, (R, 64), generator=seeded(9), dtype=torch.uint8),
        torch.full((R, 1), 0x35, dtype=torch.uint8),
    )
    options = {"bits": 4, "channels": C, "fine": (*rest, torch.tensor([0, 1])) if fine else None}
    found = planar_weight(*stored, **options)
    monkeypatch.setattr(native, "library", lambda: None)
    wanted = planar_weight(*stored, **options)
    assert torch.equal(found.planes[0], wanted.planes[0])
    assert all(torch.equal(getattr(found, name), getattr(wanted, name)) for name in ("scale", "zero", "total"))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("fine", [False, True])
def test_rows_are_laid_out_some_at_a_time(bits, fine, monkeypatch):
    _, disk = disk_weight(33, 200, bits)
    rest = None
    if fine:
        low = [torch.randint(2**bits, (33, n), generator=seeded(n), dtype=torch.uint8) for n in (72, 2)]
        rest = (*(lowbit.pack(codes, bits) for codes in low), torch.tensor([1, 3]))
    whole = planar_weight(*disk, bits=bits, channels=200, fine=rest)
    monkeypatch.setattr(planar, "AT_ONCE", 1000)  # 5 rows
    parts = planar_weight(*disk, bits=bits, channels=200, fine=rest)
    assert all(torch.equal(a, b) for a, b in zip(parts.planes, whole.planes)) and torch.equal(parts.total, whole.total)


def test_bytes_are_where_the_layout_says():
    codes = torch.arange(128, dtype=torch.uint8).view(1, 128)
    grids = torch.ones(1, 1), lowbit.pack(torch.zeros(1, 1, dtype=torch.uint8), 2), torch.tensor([128])
    four = planar_weight(lowbit.pack(codes % 16, 4), *grids, bits=4, channels=128).planes[0][0]
    assert four[5] == (5 ^ 8) | (((64 + 5) % 16 ^ 8) << 4)
    low, sign = (plane[0] for plane in planar_weight(lowbit.pack(codes % 8, 3), *grids, bits=3, channels=128).planes)
    assert low[7] == sum((32 * k + 7) % 4 << 2 * k for k in range(4))
    assert sign[3] == sum(((16 * k + 3) % 8 < 4) << k for k in range(8))  # v = q - 4 is negative below 4


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [64, 128, 320])
def test_grids_give_back_the_weight(bits, group):
    _, disk = disk_weight(9, 320, bits, group=group)
    weight = planar_weight(*disk, bits=bits, channels=320)
    scale, zero = (t.t().repeat_interleave(64, 1)[:, :320] for t in (weight.scale, weight.zero))
    expected = dequantize_weight(*disk, bits=bits, channels=320)
    # Two products are rounded where the definition rounds one, of codes up to 2^bits.
    bound = 2**bits * torch.finfo(torch.float32).eps * scale
    assert ((scale * unplanar(weight) - zero - expected).abs() <= bound).all()
    total = expected.double().unflatten(1, (5, 64)).sum(2).t()
    assert ((weight.total[:5] - total).abs() <= 64 * bound[:, ::64].t()).all()
    assert weight.scale.shape == (6, 9) and not weight.total[5].any()


def test_zero_points_in_the_middle_need_no_table():
    _, disk = disk_weight(3, 130, 4, group=128, symmetric=True)
    assert planar_weight(*disk, bits=4, channels=130).zero is None


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("change", [None, "wide", "negative"])
def test_tables_hold_the_grids_in_blocks_of_rows(symmetric, change):
    """Whole numbers and scales of 16 bits say the same as the float32 grids, bit for bit."""
    _, (packed, scale, zero, sizes) = disk_weight(33, 200, 4, symmetric=symmetric)
    scale = scale.half().float()
    if change is not None:
        scale[5, 1] = scale[5, 1] * 1.0001 if change == "wide" else -scale[5, 1]
    weight = planar_weight(packed, scale, zero, sizes, bits=4, channels=200)
    cells, kind = 4 * 16, torch.float16 if change is None else torch.float32
    kinds = [kind, *([] if symmetric else [torch.int8]), torch.int16]
    assert weight.tables.shape == (3, sum(k.itemsize for k in kinds), cells) and weight.tables.is_contiguous()
    each = weight.tables.flatten(1).split([k.itemsize * cells for k in kinds], 1)
    tables = [t.contiguous().view(k).unflatten(1, (4, 16)).transpose(0, 1).flatten(1) for t, k in zip(each, kinds)]
    assert not any(table[:, 33:].any() for table in tables)  # [G, 48] each
    found = [table[:, :33].float() for table in tables]
    assert torch.equal(found[0], weight.scale) and torch.equal(found[0] * found[-1], weight.total)
    assert symmetric or torch.equal(found[0] * found[1], weight.zero)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("C", [1, 65, 200, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_reference_s(mode, C, dtype):
    x = activations(5, C).to(dtype)
    (a, step, shift, count), xhat = quantized(mode, x)
    assert (shift is None) == (
        mode == "low" or (mode == "tiles" and C < 6 * 64 and 8 not in range(2, 3 + (C - 1) // 64))
    )
    step_c, shift_c = (t if t is None else t.repeat_interleave(64, 1) for t in (step, shift))
    decoded = a * step_c if shift is None else a * step_c + shift_c
    # xhat is one code times its step; a step times two numbers of at most 300 + 256 is rounded twice. Half a step tells codes apart.
    assert (
        (decoded[:, :C] - xhat.float()).abs() <= 1e-3 * step_c[:, :C] + xhat.float().abs() * torch.finfo(dtype).eps
    ).all()
    assert not a[:, C:].any()
    assert torch.equal(count, step * a.unflatten(1, (-1, 64)).sum(2))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 1), (33, 200), (7, 65)])
def test_product_is_that_of_the_quantized(bits, mode, shape):
    R, C = shape
    _, disk = disk_weight(R, C, bits, group=128)
    weight, bias = planar_weight(*disk, bits=bits, channels=C), torch.randn(R, generator=seeded(3))
    x = activations(6, C)
    (a, step, shift, count), xhat = quantized(mode, x)
    y = reference.planar_linear(a, step, shift, count, weight, bias)
    W = dequantize_weight(*disk, bits=bits, channels=C).double()
    exact = xhat.double() @ W.t() + bias
    assert ((y - exact).abs() <= rounding(a, step, shift, count, weight, bias)).all()
    if mode == "static":
        folded = reference.planar_linear(a, step, None, count, weight, reference.folded_bias(shift, weight, bias))
        assert ((folded - exact).abs() <= rounding(a, step, shift, count, weight, bias)).all()


def rounding(a, step, shift, count, weight, bias):
    """What float32 may be off by: the sum of all terms' magnitudes, rounded once a term and a few times within each.

    The terms of a tile may be larger than its product: they are 3 for each of G tiles, and each is itself made of rounded grids.
    """
    G = weight.tiles
    dots = torch.einsum("tgc,rgc->tgr", *(t.double().abs().unflatten(1, (G, 64)) for t in (a, padded_codes(weight))))
    terms = step.double()[:, :, None] * weight.scale * dots
    if weight.zero is not None:
        terms = terms + (weight.zero.abs() * (step.abs() * a.double().abs().unflatten(1, (G, 64)).sum(2))[:, :, None])
    if shift is not None:
        terms = terms + shift.double().abs()[:, :, None] * (weight.total.abs() + 64 * weight.scale * 2**weight.bits)
    return (3 * G + 8) * torch.finfo(torch.float32).eps * (terms.sum(1) + (0 if bias is None else bias.abs()))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def on(path, run, *args):
    try:
        return run(*args, path=path)
    except ValueError as error:
        if "cannot run" in str(error):
            pytest.skip(f"this machine lacks the {path} path")
        raise


class Paths:
    """The native functions bound to a path, by the reference's names."""

    def __init__(self, path):
        quantizers = cpu.quantize_tiles, cpu.quantize_token, cpu.quantize_static, cpu.quantize_exactly
        for run in (*quantizers, cpu.planar_linear, cpu.quantized_linear):
            setattr(self, run.__name__, partial(on, path, run))


@pytest.fixture(params=["portable", "avx2"])
def paths(request):
    if native.library() is None:
        pytest.skip("lowbit's C++ library is not built here")
    return Paths(request.param)


def same(left, right):
    return (left is None and right is None) or torch.equal(left, right)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("T", [0, 1, 3])
@pytest.mark.parametrize("C", [1, 200, 448])
def test_native_codes_are_the_same_bytes(paths, mode, T, C):
    x = activations(T, C)
    for found, expected in zip(quantized(mode, x, run=paths)[0], quantized(mode, x)[0]):
        assert same(found, expected)


@pytest.mark.parametrize("mode", ["tiles", "static"])
def test_native_codes_at_the_edges(paths, mode):
    """Ties to even, both zeros, a range on one side, a constant, subnormals, the largest floats."""
    half = torch.arange(-64, 64) / 2
    huge = torch.full((128,), 3e38)
    rows = [
        half,
        -half.abs(),
        half.abs(),
        torch.zeros(128),
        -torch.zeros(128),
        torch.full((128,), 2.5),
        half * 1e-41,
        huge,
    ]
    x = torch.stack([*rows, torch.where(half > 0, huge, -huge / 2)])
    for found, expected in zip(quantized(mode, x, run=paths)[0], quantized(mode, x)[0]):
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7)) if found is not None else expected is None


@pytest.mark.parametrize("T, C", [(0, 64), (1, 1), (3, 200), (40, 1024)])
def test_native_codes_without_a_grid_are_the_same_bytes(paths, T, C):
    x = activations(T, C)
    if T == 3:
        x[1, 70], x[2, :64] = math.nan, 0
    a, step, shift, count = paths.quantize_exactly(x)
    expected, steps = integer.exact_codes(x.nan_to_num(), EXACT)
    broken = torch.zeros(T, a.shape[1] // 64, dtype=torch.bool)
    if T == 3:
        broken[1, 1] = True
    for term in range(EXACT):
        rows = slice(term * T, (term + 1) * T)
        assert torch.equal(step[rows].isnan(), broken) and torch.equal(count[rows].isnan(), broken)
        assert torch.equal(step[rows][~broken], steps[term][~broken])
        tiles, wanted = (t.unflatten(1, (-1, 64))[~broken] for t in (a[rows], expected[term]))
        assert torch.equal(tiles, wanted)
        assert torch.equal(count[rows][~broken], steps[term][~broken] * wanted.sum(1))
    assert shift is None


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 5, 17])
def test_native_product_is_the_reference_s(paths, bits, T, threads):
    threads(1)
    runs = []
    cases = (
        ((1, 1), False, False, "token"),
        ((16, 128), True, False, "low"),
        ((50, 320), False, False, "tiles"),
        ((50, 320), False, True, "static"),
    )
    for (R, C), symmetric, wide, mode in cases:
        _, (packed, scale, *others) = disk_weight(R, C, bits, symmetric=symmetric)
        scale = scale.float() * (1.001 if wide else 1)  # no float16 holds these
        weight = planar_weight(packed, scale, *others, bits=bits, channels=C)
        bias = None if symmetric else torch.randn(R, generator=seeded(3))
        inputs, _ = quantized(mode, activations(T, C))
        y = paths.planar_linear(*inputs, weight, bias)
        expected = reference.planar_linear(*inputs, weight, bias)
        assert y.shape == (T, R) and ((y - expected).abs() <= rounding(*inputs, weight, bias)).all()
        runs.append((y, *inputs, weight, bias))
    threads(2)
    for y, *inputs in runs:
        assert torch.equal(paths.planar_linear(*inputs), y)


def grids_of(mode, C):
    """What `quantized` rounds by."""
    if mode == "token":
        return cpu.token_grid(8, C)
    sizes, bits = clusters(mode, C)
    scale, zero = static_grids(C, bits, sizes)[:2] if mode == "static" else (None, None)
    return cpu.Grids(bits, sizes, scale, zero, brief=mode != "static")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("T", [0, 1, 2, 70])
@pytest.mark.parametrize(
    "bits, R, C, bias", [(4, 50, 200, True), (3, 7, 65, False), (8, 16, 320, False), (2, 1, 1, True)]
)
def test_one_call_rounds_and_multiplies_to_the_same_bits(paths, mode, T, bits, R, C, bias, threads):
    _, disk = disk_weight(R, C, bits)
    weight = planar_weight(*disk, bits=bits, channels=C)
    bias, x = torch.randn(R, generator=seeded(3)) if bias else None, activations(T, C)
    if T == 2:
        x[1, C // 2] = math.nan
    expected = paths.planar_linear(*quantized(mode, x, run=paths)[0], weight, bias)
    for count in (1, 3):
        threads(count)
        assert torch.equal(
            paths.quantized_linear(x, grids_of(mode, C), weight, bias).nan_to_num(7), expected.nan_to_num(7)
        )
    assert expected.isnan().any() == (T == 2)


@pytest.mark.parametrize("mode", MODES)
def test_one_call_repeats_tiles(paths, mode):
    _, disk = disk_weight(20, 200, 4)
    sizes, fine = disk[3], torch.tensor([1, 3], dtype=torch.int32)
    rest = [lowbit.pack(torch.randint(16, (20, n), generator=seeded(n), dtype=torch.uint8), 4) for n in (72, 2)]
    weight = planar_weight(*disk[:3], sizes, bits=4, channels=200, fine=(*rest, fine))
    assert weight.repeats.tolist() == [1, 3]
    x = activations(3, 200)
    codes = reference.repeat_tiles(quantized(mode, x)[0], 200, weight.repeats)
    assert torch.equal(paths.quantized_linear(x, grids_of(mode, 200), weight), paths.planar_linear(*codes, weight))


@pytest.mark.parametrize("bits", BITS)
def test_a_token_does_not_see_the_others(paths, bits):
    _, disk = disk_weight(35, 200, bits)
    weight = planar_weight(*disk, bits=bits, channels=200)
    a, step, shift, count = quantized("token", activations(70, 200))[0]
    y = paths.planar_linear(a, step, shift, count, weight)
    for some in (slice(0, 1), slice(5, 8), slice(60, 70)):
        alone = paths.planar_linear(a[some], step[some], shift[some], count[some], weight)
        if len(alone) > 1:
            assert torch.equal(alone, y[some])
        # One token has a kernel of its own, which adds in another order: float32 sums of 4 tiles, each of 8 parts.
        assert float((alone - y[some]).norm() / alone.norm()) < 32 * 2.0**-24


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize("T", [1, 5])
def test_extreme_codes_do_not_saturate(paths, bits, code, T):
    K, R = 512, 19
    sizes, top = torch.tensor([K]), 2**bits - 1
    for q in (0, top):
        codes = torch.full((R, K), q, dtype=torch.uint8)
        middle = lowbit.pack(torch.full((R, 1), 2 ** (bits - 1), dtype=torch.uint8), bits)
        weight = planar_weight(lowbit.pack(codes, bits), torch.ones(R, 1), middle, sizes, bits=bits, channels=K)
        a = torch.full((T, K), code, dtype=torch.int8)
        grids = torch.ones(T, 8), None, torch.full((T, 8), 64.0 * code)
        # Whole numbers below 2^24 throughout: float32 is exact.
        assert (paths.planar_linear(a, *grids, weight) == K * code * (q - 2 ** (bits - 1))).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_no_number_stays_in_its_token(paths, bad, mode, symmetric):
    x = activations(4, 200)
    _, disk = disk_weight(18, 200, 4, symmetric=symmetric)
    weight = planar_weight(*disk, bits=4, channels=200)
    clean = paths.planar_linear(*quantized(mode, x, run=paths)[0], weight)
    x[2, 150] = bad
    found, expected = quantized(mode, x, run=paths)[0], quantized(mode, x)[0]
    for one, other in zip(found, expected):
        assert same(one, other) or torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    y = paths.planar_linear(*found, weight)
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])
    saturates = mode == "static" and not math.isnan(bad)
    assert y[2].isfinite().all() if saturates else y[2].isnan().all()
    assert torch.equal(y.isnan(), reference.planar_linear(*expected, weight).isnan())
    if saturates:
        x[2, 150] = math.copysign(1e30, bad)
        assert torch.equal(paths.planar_linear(*quantized(mode, x, run=paths)[0], weight), y)


def test_clusters_inside_tiles_are_refused():
    x, bits = torch.zeros(2, 192), torch.full((2,), 8, dtype=torch.uint8)
    _, disk = disk_weight(4, 192, 4, group=96)
    with pytest.raises(ValueError, match="channel 96 lies inside a tile"):
        planar_weight(*disk, bits=4, channels=192)
    runs = [reference.quantize_tiles_planar] + ([cpu.quantize_tiles] if native.library() else [])
    for run in runs:
        for sizes, said in (
            ((96, 96), "channel 96 lies inside"),
            ((64, 64), "must cover 192"),
            ((-64, 256), "must cover"),
        ):
            with pytest.raises(ValueError, match=said):
                run(x, bits, torch.tensor(sizes))
        for wrong in (1, 16):
            with pytest.raises(ValueError, match="take 2 to 8"):
                run(x, torch.tensor([8, wrong], dtype=torch.uint8), torch.tensor([64, 128]))


@needs_library
def test_what_does_not_fit_is_refused():
    _, disk = disk_weight(4, 192, 4)
    weight = planar_weight(*disk, bits=4, channels=192)
    a, step, _, count = quantized("low", activations(3, 192))[0]
    good = {"a": a, "step": step, "shift": None, "count": count, "weight": weight, "bias": None}
    assert cpu.planar_linear(**good).shape == (3, 4)
    for name, wrong in (
        ("a", a.float()),
        ("a", a[:, :192]),
        ("a", a.t().contiguous().t()),
        ("step", step[:2]),
        ("step", step.double()),
        ("shift", step[:1]),
        ("count", count[:1]),
        ("count", count[:, ::2]),
        ("bias", torch.zeros(5)),
        ("bias", torch.zeros(4, dtype=torch.float16)),
        ("a", torch.tensor(1, dtype=torch.int8)),
        ("step", torch.tensor(1.0)),
    ):
        with pytest.raises(ValueError, match=f"{name} must be a contiguous"):
            cpu.planar_linear(**{**good, name: wrong})
    for wrong in (torch.zeros(2, 192).double(), torch.zeros(192), torch.zeros(192, 2).t()):
        with pytest.raises(ValueError, match="x must be a contiguous"):
            cpu.quantize_token(wrong, 8)
    with pytest.raises(ValueError, match="sizes must be a contiguous"):
        cpu.quantize_tiles(torch.zeros(2, 64), torch.tensor([8], dtype=torch.uint8), torch.tensor([64]).int())


@needs_library
def test_what_does_not_fit_one_call_is_refused():
    _, disk = disk_weight(4, 192, 4)
    weight, x = planar_weight(*disk, bits=4, channels=192), torch.zeros(2, 192)
    grids = grids_of("static", 192)
    assert cpu.quantized_linear(x, grids, weight).shape == (2, 4)
    for wrong in ({"x": x.double()}, {"x": x[0]}, {"x": x[:, ::2]}, {"bias": torch.zeros(3)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a contiguous"):
            cpu.quantized_linear(**{"x": x, "grids": grids, "weight": weight, **wrong})
    for name in ("bits", "sizes", "scale", "zero"):
        with pytest.raises(ValueError, match=f"{name} must be a contiguous"):
            cpu.quantized_linear(x, grids._replace(**{name: getattr(grids, name).half()}), weight)
    with pytest.raises(ValueError, match="weight.scale must be a contiguous"):
        cpu.quantized_linear(torch.zeros(2, 64), cpu.token_grid(8, 64), weight)
    for sizes, said in (((96, 96), "channel 96 lies inside"), ((64, 64), "must cover 192")):
        with pytest.raises(ValueError, match=said):
            cpu.quantized_linear(x, grids._replace(sizes=torch.tensor(sizes)), weight)


def test_a_weight_of_other_shapes_is_refused():
    _, disk = disk_weight(4, 192, 3)
    weight = planar_weight(*disk, bits=3, channels=192)
    for change in (
        {"rows": 5},
        {"channels": 300},
        {"scale": weight.scale.double()},
        {"total": weight.total.t().contiguous().t()},
        {"planes": weight.planes[:1]},
        {"planes": (weight.planes[0], weight.planes[1].view(torch.int8))},
        {"bits": 5},
    ):
        with pytest.raises(ValueError, match="must be contiguous|use planar_weight"):
            replace(weight, **change)


def test_the_worked_examples_of_the_format():
    def laid_out(bits, zero, **codes):
        row = torch.full((1, 66), 2 ** (bits - 1), dtype=torch.uint8)
        for channel, values in codes.items():
            start = int(channel[1:])
            row[0, start : start + len(values)] = torch.tensor(values, dtype=torch.uint8)
        grid = torch.tensor([[0.5]]), lowbit.pack(torch.tensor([[zero]], dtype=torch.uint8), bits), torch.tensor([66])
        return planar_weight(lowbit.pack(row, bits), *grid, bits=bits, channels=66)

    four = laid_out(4, 7, c0=[11, 4, 15], c64=[9, 0])
    assert bytes(four.planes[0][0, :4].tolist()).hex(" ") == "13 8c 07 00"
    assert four.zero.flatten().tolist() == [-0.5, -0.5] and four.total.flatten().tolist() == [35.0, -2.5]
    three = laid_out(3, 4, c0=[5, 1, 7], c32=[2, 0], c64=[3, 6])
    assert [bytes(plane[0, :4].tolist()).hex(" ") for plane in three.planes] == ["39 21 03 00", "14 05 00 00"]
