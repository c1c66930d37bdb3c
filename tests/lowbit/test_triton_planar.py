"""The Triton kernels over the planar layout under Triton's interpreter: the formula in float64, and the reference's decisions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interpreter import interpret, needs_triton
from lowbit import reference
from lowbit.hadamard import rotate
from safetensors.torch import load_file, save_file

# name -> tokens, rows, channels, weight bits, channels that share a grid (0: all), parts of K, what else there is
LINEARS = {
    "W8": (3, 21, 200, 8, 64, 1, "step zero shift bias"),
    "W4": (7, 33, 300, 4, 64, 2, "step zero shift bias"),
    "W3": (5, 18, 330, 3, 64, 3, "step zero bias"),
    "W2": (2, 17, 129, 2, 64, 1, "step"),
    "W4, static": (9, 40, 256, 4, 64, 1, "bias"),
    "W3, static, zero points": (16, 16, 128, 3, 64, 1, "zero bias"),
    "W4, brief steps": (16, 35, 257, 4, 64, 2, "step brief zero bias"),
    "W8, tiles of 128": (4, 20, 300, 8, 128, 2, "step shift bias"),
    "W4, one grid": (8, 31, 500, 4, 0, 3, "step zero shift bias"),
    "W4, fewer rows than a tile": (3, 5, 130, 4, 64, 1, "step bias"),
    "one token, one row": (1, 1, 1, 4, 64, 1, "step"),
    "larger tiles": (20, 70, 260, 4, 64, 2, "step zero shift bias"),
    "larger tiles, W3": (37, 66, 140, 3, 64, 1, "step"),
    "largest tiles": (260, 131, 128, 4, 64, 1, "step zero bias"),
    "largest tiles, W8, one grid": (257, 5, 128, 8, 0, 1, "bias"),
    "parts without channels": (2, 16, 384, 4, 64, 2, "step bias"),
    "half precision": (4, 24, 128, 4, 64, 2, "step bias half"),
}


def planes(v: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """The layout in words: fields of a unit's channels, from the low bits of each byte up."""
    if bits == 8:
        return [v]
    u = v.view(torch.uint8) & (2**bits - 1)
    parts = {4: [(u, 4)], 3: [(u & 3, 2), (u >> 2, 1)], 2: [(u, 2)]}[bits]
    return [
        sum(field << (i * width) for i, field in enumerate(codes.unflatten(1, (-1, 8 // width, 16 * width)).unbind(2)))
        .flatten(1)
        .contiguous()
        for codes, width in parts
    ]


def problem(name: str) -> dict[str, torch.Tensor]:
    """Codes and grids as the contract has them; absent ones are None."""
    T, R, C, bits, tile, parts, more = LINEARS[name]
    make = torch.Generator().manual_seed(T + R + C)
    Kp = -(-C // 128) * 128
    G = Kp // tile if tile else 1

    def random(*shape):
        return torch.rand(*shape, generator=make) + 0.01

    a = torch.randint(-128, 128, (T, Kp), generator=make, dtype=torch.int8)
    a[:, C:] = 0
    half = 2 ** (bits - 1)
    v = torch.randint(-half, half, (R, Kp), generator=make, dtype=torch.int8)
    a[0], v[0] = -128, -half  # the largest sums
    a[0, C:] = 0
    step = random(T, G).bfloat16().float() if "brief" in more else random(T, G)
    step = step if "step" in more else None
    count = a.double().unflatten(1, (G, -1)).sum(2) * (1 if step is None else step.double())  # [T, Kp] -> [T, G]
    found = {"a": a, "step": step, "count": count.float(), "v": v, "scale": random(G, R)}
    found["zero"] = random(G, R) * half - half / 2 if "zero" in more else None
    found["shift"] = random(T, G) if "shift" in more else None
    found["total"] = random(G, R) - 0.5 if "shift" in more else None
    found["bias"] = random(R) if "bias" in more else None
    return found


def oracle(p: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, the sum of the sizes of its terms) [T, R], sums in float64, from the formula."""
    G = len(p["scale"])
    y = torch.zeros(len(p["a"]), len(p["v"]), dtype=torch.float64)
    size = y.clone()
    if p["bias"] is not None:
        y += p["bias"]
    tiles = p["a"].double().unflatten(1, (G, -1)), p["v"].double().unflatten(1, (G, -1))
    for g in range(G):
        step = 1 if p["step"] is None else p["step"][:, g, None].double()
        terms = [step * p["scale"][g] * (tiles[0][:, g] @ tiles[1][:, g].t())]
        if p["zero"] is not None:
            terms.append(-p["zero"][g].double() * p["count"][:, g, None])
        if p["shift"] is not None:
            terms.append(p["shift"][:, g, None].double() * p["total"][g])
        y += sum(terms)
        size += sum(t.abs() for t in terms)
    return y, size


LINEAR = """
import sys, torch
from safetensors.torch import load_file, save_file
from lowbit.triton.planar_linear import planar_linear
tensors, out = load_file(sys.argv[1]), {}
for case in sorted({key.split("/")[0] for key in tensors}):
    p = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith(case + "/")}
    bits, parts, brief, half = p.pop("options").tolist()
    planes = [p.pop(key) for key in ("plane0", "plane1") if key in p]
    grids = [p.get(key) for key in ("step", "shift", "count")], [p.get(key) for key in ("scale", "zero", "total", "bias")]
    dtype = torch.float16 if half else torch.float32
    out[case] = planar_linear(
        p["a"], *grids[0], planes, *grids[1], bits=bits, parts=parts, brief=bool(brief), dtype=dtype
    )
save_file(out, sys.argv[2])
"""
QUANTIZE = """
import sys
from safetensors.torch import load_file, save_file
from lowbit.triton.planar_linear import _by_grid, _whole_blocks, planar_linear
from lowbit.triton.quantize import norm_quantize
tensors, out = load_file(sys.argv[1]), {}
kinds = (None, "layernorm", "rmsnorm", "rmsnorm_plus_one")
for case in sorted({key.split("/")[0] for key in tensors}):
    p = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith(case + "/")}
    kind, rotation = p.pop("options").tolist() if "options" in p else (0, 1)
    codes, grid = p.pop("codes", None), p.pop("grid", None)
    found, summed = norm_quantize(p.pop("x"), p.pop("bits"), kind=kinds[kind], eps=1e-5, rotation=rotation, **p)
    for name, value in zip(("a", "step", "shift", "count", "summed"), (*found, summed)):
        if value is not None:
            out[f"{case}/{name}"] = value.contiguous().clone()
    if codes is not None:
        a, step, _, count = found
        assert _whole_blocks(a) is a and all(_by_grid(grid, len(a)) is grid for grid in (step, count))
        out[f"{case}/y"] = planar_linear(a, step, None, count, [codes], grid, bits=8, brief=True)
save_file(out, sys.argv[2])
"""


def interpreted(code: str, tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Run by the interpreter, which must be asked for before triton is first imported."""
    save_file({key: value.clone() for key, value in tensors.items() if value is not None}, folder / "in")
    interpret(code, folder, "in", "out")
    return load_file(folder / "out")


@pytest.fixture(scope="module")
def linears(tmp_path_factory):
    tensors = {}
    for name, (*_, bits, _, parts, more) in LINEARS.items():
        p = problem(name)
        p |= {f"plane{i}": plane for i, plane in enumerate(planes(p.pop("v"), bits))}
        p["options"] = torch.tensor([bits, parts, "brief" in more, "half" in more])
        tensors |= {f"{name}/{key}": value for key, value in p.items() if value is not None}
    broken = {key: value.clone() for key, value in tensors.items() if key.startswith(("W4/", "W4, static/"))}
    for key, value in broken.items():
        if key.endswith("/count"):
            value[1, 2] = torch.nan
        tensors[f"broken {key}"] = value
    return interpreted(LINEAR, tensors, tmp_path_factory.mktemp("linears"))


@needs_triton
@pytest.mark.parametrize("name", LINEARS)
def test_linear_is_the_formula(name, linears):
    y, size = oracle(problem(name))
    found = linears[name]
    half = found.dtype == torch.float16
    assert half == ("half" in LINEARS[name][-1])
    # Whole-number dots are exact; a float32 sum of n terms is off by n 2^-24 of their sizes at most, and there are 3 G and the bias.
    tolerance = size * 40 * 2.0**-24 + 1e-6 + (y.abs() * 2.0**-11 if half else 0)
    assert ((found.double() - y).abs() <= tolerance).all()


@needs_triton
@pytest.mark.parametrize("name", ["W4", "W4, static"])
def test_a_broken_token_breaks_itself_alone(name, linears):
    found, clean = linears[f"broken {name}"], linears[name]
    assert found[1].isnan().all()
    others = torch.arange(len(clean)) != 1
    assert torch.equal(found[others], clean[others])


def quantized(x: torch.Tensor, bits: torch.Tensor, grid=None) -> dict[str, torch.Tensor]:
    """The contract's codes of x [T, C], tile by tile; grid: (scale, zero) of static tiles, else each token's own."""
    (T, C), G = x.shape, -(-x.shape[1] // 128) * 2
    found = {"a": torch.zeros(T, G * 64, dtype=torch.int8), "count": torch.zeros(T, G)}
    found |= {} if grid else {"step": torch.ones(T, G), "shift": torch.zeros(T, G)}
    for g, b in enumerate(bits.tolist()):
        part, top = x[:, 64 * g : min(C, 64 * g + 64)].float(), 2**b - 1
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        s = ((high - low) / top).clamp(min=torch.finfo(torch.float32).tiny).bfloat16().float()
        z = torch.round(-low / s)
        o = z if b < 8 else torch.full_like(z, 128)
        if grid:
            s, z, o = (torch.full((T,), float(value)) for value in (grid[0][g], grid[1][g], 2 ** (b - 1)))
        codes = (torch.round(part / s[:, None]) + z[:, None]).clamp(0, top) - o[:, None]
        broken = part.isnan().any(1) | ~s.isfinite()
        codes = codes.masked_fill(codes.isnan() | ~s.isfinite()[:, None], 0)
        s = s.masked_fill(broken, torch.nan)
        found["a"][:, 64 * g : 64 * g + part.shape[1]] = codes.to(torch.int8)
        found["count"][:, g] = s * codes.sum(1)
        if not grid:
            found["step"][:, g] = s
            found["shift"][:, g] = s * (128 - z) if b == 8 else 0
    return found


def activation(T: int, C: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    make = torch.Generator().manual_seed(seed)
    return (torch.randn(T, C, generator=make) * torch.linspace(0.1, 9, C) + torch.linspace(-3, 3, C)).to(dtype)


# bfloat16 is left out: the interpreter truncates to it, where a GPU rounds.
NORMS = {
    "layernorm": (1, 1, torch.float32, 200),
    "layernorm, rotated": (1, 64, torch.float16, 128),
    "rmsnorm": (2, 1, torch.float16, 192),
    "rmsnorm, rotated": (2, 64, torch.float32, 192),
    "rmsnorm_plus_one": (3, 1, torch.float16, 70),
}
BITS = torch.tensor([8, 4, 3, 6], dtype=torch.uint8)


def norm_inputs(name: str) -> dict[str, torch.Tensor]:
    kind, _, dtype, C = NORMS[name]
    make = torch.Generator().manual_seed(C)
    p = {"x": activation(5, C, dtype, 1), "residual": activation(5, C, dtype, 2), "bits": BITS[: -(-C // 64)]}
    p["weight"] = (torch.randn(C, generator=make) + 1).to(dtype)
    p["bias"] = torch.randn(C, generator=make).to(dtype) if kind == 1 else None
    return p | {"permutation": torch.randperm(C, generator=make).int()}


def tile_inputs(name: str) -> dict[str, torch.Tensor]:
    C = 200 if "short" in name else 128
    x = activation(6, C, torch.float16 if "half" in name else torch.float32, 3)
    x[1] = 0
    x[2] = x[2].abs()
    if "broken" in name:
        x[3, 70], x[4, 3], x[5, 5] = torch.nan, torch.inf, -torch.inf
    p = {"x": x, "bits": BITS[: -(-C // 64)]}
    if "static" in name:
        p |= {
            "scale": torch.linspace(0.01, 0.4, len(p["bits"])),
            "zero": torch.tensor([7.0, -300.0, 2.0, 900.0])[: len(p["bits"])],
        }
    return p


TILES = ("tiles, short", "tiles, half", "tiles, broken, short", "static, short", "static, half", "static, broken")


@pytest.fixture(scope="module")
def quantizers(tmp_path_factory):
    tensors = {}
    for name in TILES:
        tensors |= {f"{name}/{key}": value for key, value in tile_inputs(name).items()}
    for name, (kind, rotation, *_) in NORMS.items():
        inputs = norm_inputs(name) | {"options": torch.tensor([kind, rotation])}
        tensors |= {f"{name}/{key}": value for key, value in inputs.items()}
    make = torch.Generator().manual_seed(5)
    tensors["tiles, short/codes"] = torch.randint(-128, 128, (19, 256), generator=make, dtype=torch.int8)
    tensors["tiles, short/grid"] = torch.rand(4, 19, generator=make)
    found = interpreted(QUANTIZE, tensors, tmp_path_factory.mktemp("quantizers"))
    return found | {key: value for key, value in tensors.items() if key.endswith(("/codes", "/grid"))}


@needs_triton
@pytest.mark.parametrize("name", TILES)
def test_quantizer_decides_as_the_formula(name, quantizers):
    p = tile_inputs(name)
    grid = (p["scale"], p["zero"]) if "static" in name else None
    for key, value in quantized(p["x"], p["bits"], grid).items():
        torch.testing.assert_close(quantizers[f"{name}/{key}"], value, rtol=0, atol=0, equal_nan=True)


@needs_triton
def test_quantizer_equals_the_reference(quantizers):
    p, name = tile_inputs("tiles, half"), "tiles, half"
    a, step = quantizers[f"{name}/a"].unflatten(1, (-1, 64)), quantizers[f"{name}/step"]
    xhat = a.float() * step[:, :, None] + quantizers[f"{name}/shift"][:, :, None]
    wanted = reference.quantize_activation_tiles(p["x"].float(), p["bits"], torch.tensor([64, 64]))
    # step * 128 - step * z + step * a is rounded up to three times on its way, where the reference rounds (a + 128 - z) step once.
    torch.testing.assert_close(xhat.flatten(1), wanted, rtol=0, atol=256 * 2.0**-23 * float(step.max()))


@needs_triton
def test_quantized_activations_need_no_copy_on_their_way_to_the_linear(quantizers):
    name = "tiles, short"
    p = {key: quantizers[f"{name}/{key}"] for key in ("a", "step", "shift", "count")}
    p |= {
        "v": quantizers[f"{name}/codes"],
        "scale": quantizers[f"{name}/grid"],
        "zero": None,
        "bias": None,
        "shift": None,
    }
    y, size = oracle(p)
    assert ((quantizers[f"{name}/y"].double() - y).abs() <= size * 40 * 2.0**-24).all()  # as above


@needs_triton
@pytest.mark.parametrize("name", NORMS)
def test_norm_and_quantizer_are_the_modules(name, quantizers):
    kind, rotation, *_ = NORMS[name]
    p = norm_inputs(name)
    x = p["x"] + p["residual"]
    assert torch.equal(quantizers[f"{name}/summed"], x)
    word = ("layernorm", "rmsnorm", "rmsnorm_plus_one")[kind - 1]
    y = reference.norm(x, p["weight"], p["bias"], p["permutation"], kind=word, eps=1e-5, rotation=1)
    y = rotate(y, rotation)
    wanted = quantized(y, p["bits"])
    difference = (quantizers[f"{name}/a"].int() - wanted["a"].int()).abs()
    # Sums over the channels are taken in another order, which moves what lies at the edge between two codes, and no more.
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01
    torch.testing.assert_close(quantizers[f"{name}/step"], wanted["step"], rtol=2.0**-7, atol=0)  # one bfloat16 apart
