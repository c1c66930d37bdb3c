"""The weight formats that Triton kernels decode and multiply, 2:4 and FlexGen's, under Triton's interpreter: against the stored weight."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpret, needs_triton
from lowbit import group4, sparse24
from lowbit.sparse import nm_encode
from safetensors.torch import load_file, save_file

# name -> tokens, channels, rows, parts, of what
CASES = {
    "numbers, a tail of three": (3, 135, 70, 1, "float16 bias"),
    "numbers, parts": (17, 386, 21, 2, "float16 bias"),
    "codes": (2, 300, 33, 2, "codes bias"),
    "FlexGen's, odd rows": (3, 150, 131, 1, "group4 float32"),
    "FlexGen's, parts": (17, 300, 65, 2, "group4 bias"),
}
CHILD = """
import sys, torch
from safetensors.torch import load_file, save_file
from lowbit.group4 import Group4
from lowbit.sparse24 import Sparse24
from lowbit.triton.group4 import group4_linear
from lowbit.triton.sparse24 import sparse24_linear
tensors, out = load_file(sys.argv[1]), {}
for case in sorted({key.split("/")[0] for key in tensors}):
    p = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith(case + "/")}
    channels, rows, parts = p["options"].tolist()
    if "packed" in p:
        weight, run = Group4(p["packed"], p["scale"], p["minimum"], (rows, channels), 0), group4_linear
    else:
        weight, run = Sparse24(channels, p["values"], p["places"], p.get("scale"), p.get("zero")), sparse24_linear
    out[case] = run(p["x"], weight, p.get("bias"), parts=parts)
save_file(out, sys.argv[2])
"""


def kept_mask(W: torch.Tensor) -> torch.Tensor:
    """The larger half of each group of four, rounded up in a tail."""
    parts = [part.abs() >= part.abs().topk(-(-part.shape[1] // 2), 1).values[:, -1:] for part in W.split(4, 1)]
    return torch.cat(parts, 1)


def problem(name: str):
    """(inputs, the stored weight as the kernel takes it, W float64 [R, C])."""
    T, C, R, parts, what = CASES[name]
    make = torch.Generator().manual_seed(C)
    dtype = torch.float32 if "float32" in what else torch.float16
    W = torch.randn(R, C, generator=make)
    p = {"x": torch.randn(T, C, generator=make).to(dtype), "options": torch.tensor([C, R, parts])}
    if "bias" in what:
        p["bias"] = torch.randn(R, generator=make)
    if "group4" in what:
        stored = group4.compress(W, dim=0)
        p |= {"packed": stored.packed, "scale": stored.scale, "minimum": stored.minimum}
        return p, stored, group4.decompress(stored, dtype).double()
    kept = kept_mask(W)
    if "codes" in what:
        sizes = torch.tensor([128, C - 128])
        zero = torch.randint(0, 256, (R, 2), generator=make, dtype=torch.uint8)
        scale = torch.rand(R, 2, generator=make)
        codes, of_all = (
            torch.randint(0, 256, (R, C), generator=make, dtype=torch.uint8),
            zero.repeat_interleave(sizes, 1),
        )
        values, indices = nm_encode(codes, kept, (2, 4), blank=of_all)
        weight = sparse24.sparse24(values, indices, channels=C, scale=scale, zero=zero, sizes=sizes)
        p |= {"scale": weight.scale, "zero": weight.zero}
        full = (codes.double() - of_all) * scale.double().repeat_interleave(sizes, 1) * kept
    else:
        weight = sparse24.sparse24(*nm_encode(W.half(), kept, (2, 4)), channels=C)
        full = W.half().double() * kept
    return p | {"values": weight.values, "places": weight.places}, weight, full


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Triton's interpreter must be asked for before triton is first imported."""
    folder = tmp_path_factory.mktemp("weights")
    save_file(
        {f"{name}/{key}": value.clone() for name in CASES for key, value in problem(name)[0].items()}, folder / "in"
    )
    interpret(CHILD, folder, "in", "out")
    return load_file(folder / "out")


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_kernel_is_the_product_with_the_stored_weight(name, interpreted):
    p, _, full = problem(name)
    y = p["x"].double() @ full.t() + p.get("bias", 0)
    size = p["x"].double().abs() @ full.abs().t() + 1
    # Products and sums are float32, the result is rounded to x's dtype: 2^-11 in float16.
    rounding = 2.0**-11 if interpreted[name].dtype == torch.float16 else 2.0**-24
    assert interpreted[name].dtype == p["x"].dtype
    assert ((interpreted[name].double() - y).abs() <= size * 16 * 2.0**-24 + y.abs() * rounding).all()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "group4" not in case[4]])
def test_layout_holds_the_weight(name):
    p, weight, full = problem(name)
    assert weight.values.shape[1] % 64 == 0 and weight.places.shape[1] * 4 == weight.values.shape[1]
    # Codes: (q - z) s is rounded once in float32.
    torch.testing.assert_close(sparse24.dense_weight(weight).double(), full, rtol=2.0**-24, atol=0)
    y = sparse24.sparse24_linear(p["x"].float(), weight, p["bias"]).double()
    torch.testing.assert_close(
        y, p["x"].double() @ full.t() + p["bias"], rtol=1e-4, atol=1e-3
    )  # float32 sums of 386 terms


def test_what_cannot_be_laid_out_is_refused():
    values, indices = nm_encode(torch.ones(1, 8), torch.tensor([[True, True, False, False] * 2]), (2, 4))
    with pytest.raises(ValueError, match="float32.*pass float16"):
        sparse24.sparse24(values, indices, channels=8)
    codes, grid = values.byte().repeat(1, 40), torch.ones(1, 2)
    with pytest.raises(ValueError, match="multiples of 128"):
        sparse24.sparse24(
            codes, indices.repeat(1, 40), channels=320, scale=grid, zero=grid, sizes=torch.tensor([64, 256])
        )
