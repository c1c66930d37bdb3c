"""The column sweep: every implementation against the formula, and what must not go wrong around it.

Sums run in step order everywhere, so an implementation equals the formula bit by bit once it is known whether it rounds each
product before subtracting it (PyTorch, the portable path, the interpreter) or fuses the two (AVX2).
"""

import os
import subprocess
import sys
import threading
import warnings
from functools import partial
from pathlib import Path

import lowbit
import numpy as np
import pytest
import torch
from interpreter import interpret, needs_triton
from lowbit.cpu import native
from lowbit.cpu.sweep import sweep as native_sweep
from lowbit.sweep_reference import sweep_reference
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
needs_library = pytest.mark.skipif(native.library() is None, reason="lowbit's C++ library is not built here")


def minus_product(w, a, b, fused):
    """w - a b in float32, rounded once (fused) or twice; float64 holds the product of two floats exactly."""
    if fused:
        return (w.astype(np.float64) - a.astype(np.float64) * b.astype(np.float64)).astype(np.float32)
    return w - a * b


def oracle(W1, steps, *, mask=None, keep=None, score=None, scale=None, low=None, high=None, fused=False):
    """Row by row of W, column by column, from the contract's words."""
    b, R = W1.shape
    inputs = {"mask": mask, "score": score, "scale": scale, "low": low, "high": high}
    x = {name: None if t is None else t.numpy() for name, t in inputs.items()}
    u, w = steps.numpy(), W1.clone().numpy()
    values, errors = np.zeros_like(w), np.zeros_like(w)
    kept = np.ones(w.shape, bool) if mask is None else x["mask"].copy()
    for r in range(R):
        for i in range(b):
            if keep and i % keep[1] == 0:
                group = range(i, min(i + keep[1], b))
                order = sorted(group, key=lambda j: (kept[j, r], w[j, r] * w[j, r] * x["score"][j], j))
                kept[order[: len(group) - -(-keep[0] * len(group) // keep[1])], r] = False
            now = value = w[i : i + 1, r]
            if scale is not None:
                value = np.clip(np.rint(value / x["scale"][i, r]), x["low"][i, r], x["high"][i, r])
            value = value if kept[i, r] else np.zeros_like(value)
            by = np.ones_like(value) if scale is None else x["scale"][i, r]
            error = minus_product(now, value, by, fused)
            values[i, r], errors[i, r] = value[0] + np.float32(0), error[0]
            w[i + 1 :, r] = minus_product(w[i + 1 :, r], u[i, i + 1 :], error, fused)
    has_mask = mask is not None or keep is not None
    return torch.from_numpy(values), torch.from_numpy(kept) if has_mask else None, torch.from_numpy(errors)


def problem(b, R, *, mask=False, keep=None, quantize=False, seed=0):
    """A block as the solver makes it: the factor of a real inverse Hessian, weights and grids of its scale."""
    gen = torch.Generator().manual_seed(seed)
    X = torch.randn(2 * b, b, generator=gen, dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(X.T @ X / b + torch.eye(b) * 0.01), upper=True)
    W1 = torch.randn(b, R, generator=gen)
    asked = {}
    if mask:
        asked["mask"] = torch.rand(b, R, generator=gen) > 0.4
    if keep:
        asked |= {"keep": keep, "score": U.diagonal().square().reciprocal().float()}
    if quantize:
        zero = torch.randint(0, 16, (b, R), generator=gen).float()
        asked |= {"scale": torch.rand(b, R, generator=gen) * 0.2 + 0.05, "low": -zero, "high": 15 - zero}
    return W1, (U / U.diagonal()[:, None]).triu(1).float().contiguous(), asked


# Widths: one row, less than a tile, whole tiles (8 and 16 rows), tiles and a tail. Lengths: one step, less than a panel (4),
# panels and a tail, a whole block; groups that fit panels, that straddle them, that are cut by the block's end or longer than it.
CASES = {
    "nothing": (6, 5, {}),
    "mask": (19, 37, {"mask": True}),
    "2 of 4": (24, 33, {"keep": (2, 4)}),
    "2 of 4, tail": (23, 33, {"keep": (2, 4)}),
    "2 of 4, mask": (22, 32, {"keep": (2, 4), "mask": True}),
    "1 of 2": (9, 16, {"keep": (1, 2)}),
    "2 of 3": (11, 18, {"keep": (2, 3)}),
    "3 of 7": (25, 17, {"keep": (3, 7), "mask": True}),
    "8 of 16": (40, 21, {"keep": (8, 16)}),
    "longer than the block": (5, 9, {"keep": (3, 8)}),
    "quantize": (19, 37, {"quantize": True}),
    "quantize, mask": (21, 24, {"quantize": True, "mask": True}),
    "quantize, 2 of 4": (18, 20, {"quantize": True, "keep": (2, 4)}),
    "quantize, 4 of 8, mask": (18, 20, {"quantize": True, "keep": (4, 8), "mask": True}),
    "one row": (13, 1, {"quantize": True, "keep": (2, 4)}),
    "one step": (1, 20, {"quantize": True, "mask": True}),
    "whole block": (128, 16, {"quantize": True, "keep": (2, 4)}),
    "over a whole block": (131, 16, {"mask": True}),
}
NAMES = list(CASES)


def make(name):
    b, R, options = CASES[name]
    return problem(b, R, **options, seed=NAMES.index(name))


def same(found, expected, tolerance=0):
    """Values, kept and errors, bit by bit unless told otherwise; no -0 among the values."""
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert not (found[0].signbit() & (found[0] == 0)).any()


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_the_formula(name):
    W1, steps, asked = make(name)
    same(sweep_reference(W1.clone(), steps, **asked), oracle(W1, steps, **asked))


@needs_library
@pytest.mark.parametrize("path", ["portable", "avx2"])
@pytest.mark.parametrize("name", NAMES)
def test_native_is_the_formula(name, path):
    W1, steps, asked = make(name)
    try:
        found = native_sweep(W1.clone(), steps, **asked, path=path)
    except ValueError as error:
        pytest.skip(str(error))
    same(found, oracle(W1, steps, **asked, fused=path == "avx2"))


# The interpreter is slow: what differs from case to case inside the Triton kernel, each once.
INTERPRETED = (
    "mask",
    "2 of 4, tail",
    "3 of 7",
    "quantize, 4 of 8, mask",
    "longer than the block",
    "one row",
    "one step",
)
INTERPRET = """
import sys
from safetensors.torch import load_file, save_file
import lowbit.triton.sweep as kernel
tensors, out = load_file(sys.argv[1]), {}
for case in sorted({key.split("/")[0] for key in tensors}):
    asked = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith(case + "/")}
    if "keep" in asked:
        asked["keep"] = tuple(asked["keep"].tolist())
    kernel.BLOCK_STEPS = int(asked.pop("block", 128))
    for name, value in zip(("values", "kept", "errors"), kernel.sweep(asked.pop("W1"), asked.pop("steps"), **asked)):
        if value is not None:
            out[f"{case}/{name}"] = value
save_file(out, sys.argv[2])
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Each case by the Triton kernel under its interpreter, which must be asked for before triton is first imported."""
    folder = tmp_path_factory.mktemp("interpreted")
    cases = {name: (name, {}) for name in INTERPRETED} | {"parts": ("8 of 16", {"block": 24})}
    tensors = {}
    for case, (name, more) in cases.items():
        W1, steps, asked = make(name)
        inputs = {"W1": W1, "steps": steps, **asked, **more}
        tensors |= {f"{case}/{key}": torch.as_tensor(value) for key, value in inputs.items()}
    save_file(tensors, folder / "in")
    interpret(INTERPRET, folder, "in", "out")
    found = load_file(folder / "out")
    return {case: [found.get(f"{case}/{key}") for key in ("values", "kept", "errors")] for case in cases}


@needs_triton
@pytest.mark.parametrize("name", INTERPRETED)
def test_triton_is_the_formula(name, interpreted):
    W1, steps, asked = make(name)
    same(interpreted[name], oracle(W1, steps, **asked))


@needs_triton
def test_triton_in_parts_is_the_formula(interpreted):
    W1, steps, asked = make("8 of 16")
    # Later parts take the errors of this one in a matrix product, which sums in an order of its own.
    same(interpreted["parts"], oracle(W1, steps, **asked), tolerance=1e-5)


@pytest.fixture(params=["reference", *(pytest.param(path, marks=needs_library) for path in ("portable", "fastest"))])
def run(request):
    """Each implementation that runs in this process."""
    return sweep_reference if request.param == "reference" else partial(native_sweep, path=request.param)


def test_edges(run):
    W1, steps, asked = problem(8, 0, mask=True, keep=(2, 4), quantize=True)
    assert [tuple(t.shape) for t in run(W1, steps, **asked)] == [(8, 0)] * 3  # no row at all

    W1, steps, _ = problem(12, 19)
    values, kept, errors = run(W1.clone(), steps, mask=torch.zeros(12, 19, dtype=torch.bool))
    assert not values.any() and not kept.any() and errors.all()  # all pruned: every weight becomes error

    score = torch.ones(8)
    for equal in (1.0, -1.0):  # ties keep the later steps
        kept = run(torch.full((8, 19), equal), torch.zeros(8, 8), keep=(2, 4), score=score)[1]
        assert kept.tolist() == [[False] * 19, [False] * 19, [True] * 19, [True] * 19] * 2
    mask = torch.ones(4, 19, dtype=torch.bool)
    mask[2:] = False  # what the mask prunes counts: nothing else goes
    assert torch.equal(run(torch.ones(4, 19), torch.zeros(4, 4), keep=(2, 4), score=torch.ones(4), mask=mask)[1], mask)

    zeros = run(torch.full((4, 19), -0.0), torch.zeros(4, 4))[0]
    assert not zeros.signbit().any()


@pytest.mark.parametrize("options", [{"mask": True}, {"keep": (2, 4)}, {"quantize": True}])
def test_a_bad_number_stays_in_its_row_of_W(options, run):
    W1, steps, asked = problem(16, 19, **options)
    asked.setdefault("mask", torch.ones(16, 19, dtype=torch.bool))[5, 3] = True
    asked["mask"][5, 17] = False
    W1[5, 3], W1[5, 17] = float("nan"), float("inf")
    clean = torch.ones(19, dtype=torch.bool)
    clean[[3, 17]] = False
    values, kept, errors = run(W1.clone(), steps, **asked)
    expected = run(W1.nan_to_num(), steps, **asked)
    assert values[5:, 3][kept[5:, 3]].isnan().all()
    assert errors[5:, 3].isnan().all() and not errors[5:, 17].isfinite().any()
    assert values[:, clean].isfinite().all()
    assert torch.equal(values[:, clean], expected[0][:, clean]) and torch.equal(kept[:, clean], expected[1][:, clean])
    if "keep" in asked:
        assert (kept.view(4, 4, 19).sum(1) <= 2).all()  # [16, R] -> [groups, 4, R]


@needs_library
def test_half_way_cases_round_to_even():
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.4999998, 8388609.0, -1e9, 4194303.5])[None].contiguous()
    grid = {
        "scale": torch.ones_like(halves),
        "low": torch.full_like(halves, -2e9),
        "high": torch.full_like(halves, 2e9),
    }
    for path in ("portable", "fastest"):
        levels = native_sweep(halves.clone(), torch.zeros(1, 1), **grid, path=path)[0]
        assert torch.equal(levels, torch.round(halves))


@needs_library
def test_a_long_block_does_not_overflow():
    W1, steps, asked = problem(1030, 40, keep=(2, 4), quantize=True)
    values, kept, _ = native_sweep(W1.clone(), steps, **asked)
    assert values.isfinite().all() and kept.sum(0).eq(515).all()


@needs_library
def test_threads_change_nothing():
    W1, steps, asked = problem(64, 131, keep=(2, 4), quantize=True)
    expected = native_sweep(W1.clone(), steps, **asked)
    try:
        for threads in (2, 3, 20):  # 20: more than there are tiles
            torch.set_num_threads(threads)
            same(native_sweep(W1.clone(), steps, **asked), expected)
    finally:
        torch.set_num_threads(1)


@needs_library
def test_two_callers_at_once():
    jobs = [problem(64, 300, keep=(2, 4), seed=seed) for seed in range(2)]
    expected = [native_sweep(W1.clone(), steps, **asked) for W1, steps, asked in jobs]
    found = [[], []]

    def caller(i):
        W1, steps, asked = jobs[i]
        found[i] = [native_sweep(W1.clone(), steps, **asked) for _ in range(20)]

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(2)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    for i in range(2):
        assert len(found[i]) == 20
        for result in found[i]:
            same(result, expected[i])


def test_the_public_function_runs_the_kernel_of_the_device():
    W1, steps, asked = problem(32, 40, keep=(2, 4), quantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if native.library() is None else "error")
        found = lowbit.sweep(W1.clone(), steps, **asked)
    run = sweep_reference if native.library() is None else native_sweep
    same(found, run(W1.clone(), steps, **asked))


WITHOUT_LIBRARY = """
import sys, warnings, torch
from pathlib import Path
from lowbit.cpu import native
native.FILE = Path("nowhere.so")
import lowbit
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        values, kept, errors = lowbit.sweep(torch.ones(2, 3), torch.zeros(2, 2))
print(len(said), said[0].message, values.tolist() == [[1.0] * 3] * 2, "triton" in sys.modules)
"""


def test_without_the_library_a_loop_runs_and_says_so_once():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}
    child = [sys.executable, "-c", WITHOUT_LIBRARY]
    done = subprocess.run(child, env=environment, capture_output=True, text=True, cwd=ROOT)
    said = "1 lowbit.sweep has no kernel for cpu (install with a C++ compiler): a slow PyTorch loop runs"
    assert done.stdout == f"{said} True False\n", done.stdout + done.stderr


# What is wrong, as changes to a good call, and what the message says of it.
BAD = {
    "W1 must be a matrix": {"W1": lambda W1: W1[0]},
    r"W1 must be torch.float32 \[8, 6\] for W1 \[8, 6\], got torch.float64 \[8, 6\]": {"W1": lambda W1: W1.double()},
    "W1 must be contiguous": {"W1": lambda W1: W1.t().contiguous().t()},
    r"steps must be torch.float32 \[8, 8\]": {"steps": lambda steps: steps[:7]},
    "steps is on meta, W1 on cpu": {"steps": lambda steps: steps.to("meta")},
    r"mask must be torch.bool \[8, 6\]": {"mask": lambda mask: mask.float()},
    "go together: high missing": {"high": lambda high: None},
    "scale must be contiguous": {"scale": lambda scale: scale[:1].expand(8, 6)},
    r"whole numbers \(n, m\) with 0 < n < m": {"keep": lambda keep: (4, 4)},
    "pass score": {"score": lambda score: None},
    r"score must be torch.float32 \[8\]": {"score": lambda score: score[:7]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_in_one_line(message):
    W1, steps, asked = problem(8, 6, mask=True, keep=(2, 4), quantize=True)
    asked |= {"W1": W1, "steps": steps}
    for name, spoil in BAD[message].items():
        asked[name] = spoil(asked[name])
    with pytest.raises(ValueError, match=message) as caught:
        lowbit.sweep(**asked)
    assert "\n" not in str(caught.value)
