"""What the compilers say of the Triton kernels, ahead of time and without a GPU; and the inline assembly, carried out in numpy."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import compile_kernels

FAMILIES = ("sm_80", "sm_90")
# Instructions of a warp for 128 channels of its 16 rows, a tile of 16 tokens x 64 rows being four warps side by side.
DECODE = {
    "linear W4: 16 tokens, static": 90,
    "linear W4: 16 tokens, dynamic, tiles of 128": 90,
    "linear W4: 8 tokens, dynamic": 90,
    # Two more products for each sum of a tile than 90 leave room for.
    "linear W4: 16 tokens, dynamic": 115,
    "linear W3: 16 tokens, static": 120,
}
# Instructions for each tensor-core instruction on sm_80: 4 without grids to scale, and a product keeps its unit busy for about 8.
PREFILL = {
    "linear W4: 2048 tokens, dynamic, one grid": 4,
    "linear W4: 2048 tokens, static, tiles of 128": 6,
    "linear W4: 2048 tokens, static": 8.5,
}
OTHERS = (
    "linear W3: 64 tokens, dynamic, zero points, shifts",
    "linear W4: 2048 tokens, dynamic, zero points, shifts",
    "quantize: clusters",
    "quantize: two codes a number",
    "quantize: residual, RMSNorm, gather, rotate, tiles",
)
BYTE_WIDE = re.compile(r"(LDG|LDGSTS|LDS|STS)(\.\w+)*\.[US]8")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """One report for each kernel and family, compiled when first asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("TRITON_INTERPRET", raising=False)
        made = {}

        def report(name, family):
            if (name, family) not in made:
                made[name, family] = compile_kernels.report(compile_kernels.KERNELS[name], family)
            return made[name, family]

        yield report


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [*DECODE, *PREFILL, *OTHERS])
def test_nothing_is_spilled_and_little_is_shared(name, family, reports):
    found = reports(name, family)
    assert found["stack_bytes"] == 0 and found["shared_bytes"] <= 64 * 1024
    assert not [load for load in found.get("loads", ()) if BYTE_WIDE.match(load)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [name for name in (*DECODE, *PREFILL, *OTHERS) if name.startswith("linear")])
def test_products_are_of_int8_on_tensor_cores(name, family, reports):
    wide = family == "sm_90" and re.search(r" (64|2048) tokens", name)
    assert [kind.split(".")[0] for kind in reports(name, family)["mma"]] == ["IGMMA" if wide else "IMMA"]
    assert all("S8.S8" in kind for kind in reports(name, family)["mma"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", DECODE)
def test_few_tokens_cost_few_instructions(name, family, reports):
    found = reports(name, family)
    assert found["instructions_per_unit"] <= DECODE[name]
    assert not [load for load in found["loads"] if not load.startswith("LDG.")]  # nothing goes through shared memory


@pytest.mark.parametrize("name", PREFILL)
def test_tensor_cores_are_not_kept_waiting(name, reports):
    assert reports(name, "sm_80")["instructions_per_mma"] <= PREFILL[name]


def carry_out(text: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """Inline PTX over uint32 words: $0.. are the outputs, the inputs follow. Only what our strings use is known."""
    known = {f"${outputs + i}": word for i, word in enumerate(inputs)}

    def value(name):
        return known[name] if name in known else np.uint32(int(name, 0))

    def turned(low, high, by):
        assert low is high  # a rotation; shf.wrap takes its distance modulo 32
        by = by & np.uint32(31)
        return (low << by) | np.where(by == 0, 0, low >> (np.uint32(32) - np.maximum(by, 1))).astype(np.uint32)

    def looked_up(a, b, c, table):
        found = np.zeros_like(a)
        for i in range(8):  # bit i of the table: for bits (a, b, c) = i, a the highest
            if int(table) >> i & 1:
                found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return found

    run = {
        "shl.b32": lambda a, n: a << n,
        "and.b32": lambda a, b: a & b,
        "shf.l.wrap.b32": turned,
        "lop3.b32": looked_up,
    }
    for name, arguments in re.findall(r"([a-z][\w.]*) ([^;{}]+);", text.replace(".reg .b32", "")):
        if name in run:
            target, *rest = [word.strip() for word in arguments.split(",")]
            known[target] = run[name](*map(value, rest)).astype(np.uint32)
        else:
            assert all(re.fullmatch(r"\w", word.strip()) for word in f"{name},{arguments}".split(",")), name
    return [known[f"${i}"] for i in range(outputs)]


def words(octets: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(octets.astype(np.uint8)).view(np.uint32)


def signed(words_: np.ndarray) -> np.ndarray:
    return words_.view(np.int8).astype(np.int64)


ANY = np.random.default_rng(0).integers(0, 256, (2, 64 * 64))  # two planes: each of 64 channels, 64 times
CHANNEL = np.tile(np.arange(64), 64)


def test_four_bits():
    from lowbit.triton.planar_linear import FOUR_BITS

    even, odd = carry_out(FOUR_BITS.value, [words(ANY[0])], 2)
    nibble = np.stack([ANY[0] & 15, ANY[0] >> 4])
    v = nibble - 16 * (nibble > 7)
    assert np.array_equal(signed(even), v[0] * 16) and np.array_equal(signed(odd), v[1] * 16)


def test_three_bits():
    from lowbit.triton.planar_linear import THREE_BITS

    turns, sign_turns = np.where(CHANNEL < 32, 1, 31), 3 - CHANNEL // 16
    found = carry_out(THREE_BITS.value, [words(ANY[0]), words(ANY[1]), words(turns), words(sign_turns)], 2)
    for tile in (0, 1):
        channel = CHANNEL + 64 * tile  # of the unit, in fields of 32 and of 16
        v = (ANY[0] >> channel // 32 * 2 & 3) - 4 * (ANY[1] >> channel // 16 & 1)
        assert np.array_equal(signed(found[tile]), v * 32)


def test_two_bits():
    from lowbit.triton.planar_linear import TWO_BITS

    found = carry_out(TWO_BITS.value, [words(ANY[0]), words(np.where(CHANNEL < 32, 2, 0))], 2)
    for tile in (0, 1):
        field = ANY[0] >> (CHANNEL + 64 * tile) // 32 * 2 & 3
        assert np.array_equal(signed(found[tile]), (field - 4 * (field > 1)) * 64)


def test_a_sum_that_starts_at_the_magic_word_is_exact():
    from lowbit.triton.planar_linear import MAGIC, MAGIC_BITS

    largest = 128 * 128 * 128  # of a tile of 128 channels
    dots = np.concatenate([np.arange(-4096, 4096), np.linspace(-largest, largest, 4097).round().astype(np.int64)])
    found = (MAGIC_BITS.value + dots).astype(np.int32).view(np.float32) - np.float32(MAGIC.value)
    assert np.array_equal(found, dots)
