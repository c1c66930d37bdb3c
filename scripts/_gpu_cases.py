"""Every Triton kernel of lowbit as a list of cases: inputs, the kernel, what float64 says of its result, what else computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from lowbit import kv_planar
from lowbit.cache import KVGrid
from lowbit.group4 import compress, decompress
from lowbit.packing import pack
from lowbit.planar import TILE, padded_codes, planar_weight
from lowbit.sparse import nm_encode
from lowbit.sparse24 import dense_weight, sparse24
from lowbit.sweep_reference import sweep_reference

GROUP = 128
EPS = 2.0**-24  # of float32, half a step

# (in-channels, out-rows): LLaMA-7B's, a wide feed-forward's, and SmolLM2-135M's.
LAYERS = (
    (4096, 4096),
    (4096, 16384),
    (16384, 4096),
    (4096, 11008),
    (11008, 4096),
    (576, 576),
    (576, 1536),
    (1536, 576),
)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 2048)
FEW = (1, 16, 256, 2048)
# weight bits, activation grids -> tokens
LINEARS = {
    (4, "dynamic"): TOKENS,
    (4, "static"): FEW,
    (8, "dynamic"): FEW,
    (8, "one grid"): FEW,
    (3, "dynamic"): FEW,
    (2, "dynamic"): FEW,
}
# (query heads, KV heads, channels of a head): LLaMA-3-8B's and SmolLM2-135M's. (sequences, tokens held by each).
HEADS = ((32, 8, 128), (9, 3, 64))
HELD = ((1, 1024), (1, 32768), (16, 4096))


@dataclass(frozen=True)
class Job:
    """One problem on a device.

    run: the kernel. check: its result -> the largest error as a share of what is allowed. others: name -> what is timed beside it.
    moved: bytes that the kernel's inputs and outputs hold; 0 where the time of a call says nothing.
    """

    run: Callable
    check: Callable[..., float]
    others: dict[str, Callable] = field(default_factory=dict)
    moved: int = 0


@dataclass(frozen=True)
class Case:
    """`make(device)` is the `Job`; kernel and shape are words for the table."""

    kernel: str
    shape: str
    make: Callable[[torch.device], Job]


def share(found: torch.Tensor, wanted: torch.Tensor, allowed: torch.Tensor) -> float:
    """Largest |found - wanted| / allowed, infinite where one of them is no number."""
    ratio = (found.double() - wanted).abs() / allowed
    return float(ratio.nan_to_num(torch.inf).max())


def octets(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def random(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal, the same on every device."""
    make = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=make).to(device, dtype)


def random_codes(rows: int, columns: int, bits: int, device: torch.device) -> torch.Tensor:
    make = torch.Generator().manual_seed(rows + columns)
    return torch.randint(2**bits, (rows, columns), generator=make, dtype=torch.uint8).to(device)


def linear(bits: int, grids: str, T: int, C: int, R: int, device: torch.device) -> Job:
    """The integer linear; its activations are quantized before, and in the call for "with quantizer"."""
    from lowbit.triton.planar_linear import planar_linear
    from lowbit.triton.quantize import quantize_tiles

    groups = -(-C // GROUP)
    sizes = torch.tensor([GROUP] * (groups - 1) + [C - GROUP * (groups - 1)])
    codes, zero = random_codes(R, C, bits, device), random_codes(R, groups, bits, device)
    scale = (random(R, groups, device=device).abs() + 0.5) / 2**bits / C**0.5
    w = planar_weight(pack(codes, bits), scale, pack(zero, bits), sizes.to(device), bits=bits, channels=C)
    x = random(T, C, device=device, dtype=torch.float16)
    tile_bits = torch.full((-(-C // TILE),), 8, dtype=torch.uint8, device=device)
    a, step, shift, count = quantize_tiles(x, tile_bits)
    w_scale, w_zero, total, brief = w.scale, w.zero, w.total, True
    if grids == "static":
        step = shift = total = None
        count = a.double().unflatten(1, (-1, TILE)).sum(2).float()  # [T, Kp] -> [T, G]
    if grids == "one grid":
        step, shift, w_zero, total = step[:, :1], None, None, None
        w_scale, count = w_scale[:1].contiguous(), count[:, :1]

    def multiply(a, step, shift, count):
        return planar_linear(a, step, shift, count, w.planes, w_scale, w_zero, total, bits=bits, brief=brief)

    def check(y):
        spread = partial(torch.repeat_interleave, repeats=a.shape[1] // len(w_scale), dim=1)  # [T, G] -> [T, Kp]
        steps = a.double() if step is None else a.double() * spread(step)
        shifts = torch.zeros_like(steps) if shift is None else spread(shift).double()
        levels = padded_codes(w).double() * spread(w_scale.t())  # [R, Kp]
        zeros = torch.zeros_like(levels) if w_zero is None else spread(w_zero.t()).double()
        xhat, what = (steps + shifts)[:, :C], (levels - zeros)[:, :C]
        size = (steps.abs() + shifts.abs())[:, :C] @ (levels.abs() + zeros.abs())[:, :C].t()  # [T, R]
        # The sum has 3 G terms, added up in parts: an error grows with their number at most, here with its square root.
        return share(y, xhat @ what.t(), size * EPS * (8 + (3 * len(w_scale)) ** 0.5) + 1e-30)

    full = (
        (codes - zero.repeat_interleave(sizes.to(device), 1).float()) * scale.repeat_interleave(sizes.to(device), 1)
    ).half()
    others = {"torch float16": lambda: F.linear(x, full)}
    if grids == "dynamic":
        others["with quantizer"] = lambda: multiply(*quantize_tiles(x, tile_bits))
    if T > 16 and C % 8 == 0 and R % 8 == 0:  # what torch._int_mm takes
        others["torch._int_mm"] = partial(torch._int_mm, a[:, :C].contiguous(), padded_codes(w)[:, :C].t())
    others |= foreign(codes, scale, zero, x, bits)
    moved = octets(a, step, shift, count, *w.planes, w_scale, w_zero, total) + 4 * T * R
    return Job(lambda: multiply(a, step, shift, count), check, others, moved)


def foreign(codes, scale, zero, x, bits: int) -> dict[str, Callable]:
    """The same codes with float16 activations in gemlite and conch, where they are installed: codes [R, C], grids [R, C / 128].

    Their layouts are made at the first call, so that what a package does not take fails there.
    """
    found = {}
    if bits not in (2, 4, 8) or codes.shape[1] % GROUP:
        return found
    if find_spec("gemlite"):

        @cache
        def of_gemlite():
            from gemlite.helper import A16Wn

            grids = (t.reshape(-1, 1).half() for t in (scale, zero))  # [R, G] -> [R G, 1]
            return A16Wn(codes.device).from_weights(codes, *grids, bits, GROUP)

        found["gemlite float16"] = lambda: of_gemlite()(x)
    if find_spec("conch"):

        @cache
        def of_conch():
            words = codes.t().int().unflatten(0, (-1, 32 // bits))  # [C, R] -> [C bits/32, 32 / bits, R]
            shifts = torch.arange(0, 32, bits, device=codes.device, dtype=torch.int32)[:, None]
            # Its zero points are one number for all.
            return (
                (words << shifts).sum(1, dtype=torch.int32),
                scale.t().half().contiguous(),
                None,
                bits,
                2 ** (bits - 1),
            )

        def multiply_by_conch():
            from conch.ops.quantization.gemm import mixed_precision_gemm

            return mixed_precision_gemm(x, *of_conch(), GROUP)

        found["conch float16"] = multiply_by_conch
    return found


def quantizer(T: int, C: int, device: torch.device) -> Job:
    """float16 to int8 codes on each token's own grids of 64 channels."""
    from lowbit.triton.quantize import quantize_tiles

    x = random(T, C, device=device, dtype=torch.float16)
    bits = torch.tensor([8, 4, 3, 6], dtype=torch.uint8).repeat(-(-C // 256))[: -(-C // TILE)].to(device)
    return Job(
        lambda: quantize_tiles(x, bits), lambda found: on_grid(found, x.double(), bits, 0), moved=octets(x) + T * C
    )


def on_grid(found, x: torch.Tensor, bits: torch.Tensor, slack: float) -> float:
    """How far codes of x float64 [T, C] are off: steps from what the range asks for, values from x. slack: of x, relative."""
    a, step, shift, _ = found
    tiles = F.pad(x, (0, a.shape[1] - x.shape[1])).unflatten(1, (-1, TILE))[:, : len(bits)]  # [T, C] -> [T, G, 64]
    top = torch.exp2(bits.double()) - 1
    span = tiles.amax(2).clamp(min=0) - tiles.amin(2).clamp(max=0)  # [T, G]
    s, m = (t[:, : len(bits)].double() for t in (step, shift))
    # A step is rounded to a bfloat16, by 2^-8 at most: so many steps may be missing at the ends of the range, and one more, where value
    # and zero point are both rounded up.
    off = share(s, span / top, span / top * 2.0**-8 + 2 * slack * span + 1e-30)
    xhat = s[..., None] * a.double().unflatten(1, (-1, TILE))[:, : len(bits)] + m[..., None]
    allowed = s * (1.001 + top * (2.0**-8 + 2 * slack))
    return max(off, share(xhat, tiles, allowed[..., None] + slack * tiles.abs() + 1e-30))


def norm(T: int, C: int, device: torch.device) -> Job:
    """Residual sum, RMSNorm, gather and codes in one."""
    from lowbit.triton.quantize import norm_quantize

    x, residual = (random(T, C + i, device=device, dtype=torch.float16)[:, :C].contiguous() for i in range(2))
    weight = random(C, device=device, dtype=torch.float16).abs() + 0.5
    permutation = torch.randperm(C, generator=torch.Generator().manual_seed(0)).int().to(device)
    bits = torch.full((-(-C // TILE),), 8, dtype=torch.uint8, device=device)

    def run():
        options = {"kind": "rmsnorm", "eps": 1e-5, "weight": weight, "permutation": permutation, "residual": residual}
        return norm_quantize(x, bits, **options)

    def check(found):
        summed = (x + residual).double()  # as the models add: rounded to float16
        y = summed / (summed.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight
        # The kernel rounds to float16 twice, as the module does.
        return on_grid(found[0], y[:, permutation.long()], bits, 2.0**-10)

    return Job(run, check, moved=3 * octets(x) + T * C)


def column_sweep(b: int, R: int, keep: tuple[int, int] | None, quantize: bool, device: torch.device) -> Job:
    """The fused inner loop of GPTQ and SparseGPT over one block."""
    from lowbit.triton.sweep import sweep

    X = random(2 * b, b, device=device).double()
    U = torch.linalg.cholesky(torch.linalg.inv(X.t() @ X / b + 0.01 * torch.eye(b, device=device)), upper=True)
    W = random(b, R, device=device)
    steps = (U / U.diagonal()[:, None]).triu(1).float().contiguous()
    options = {"keep": keep, "score": U.diagonal().square().reciprocal().float()} if keep else {}
    if quantize:
        grids = torch.full_like(W, 0.3), torch.full_like(W, -8), torch.full_like(W, 7)
        options |= dict(zip(("scale", "low", "high"), grids))
    if not options:
        options["mask"] = random(b, R + 1, device=device)[:, :R].contiguous() > 0
    moved = octets(W) * 3 + octets(steps, *(t for t in options.values() if isinstance(t, torch.Tensor)))
    return Job(
        lambda: sweep(W.clone(), steps, **options),
        lambda found: replayed(W, steps, found, **options),
        {"PyTorch loop": lambda: sweep_reference(W.clone(), steps, **options)},
        moved,
    )


def replayed(W, steps, found, *, mask=None, keep=None, score=None, scale=None, low=None, high=None) -> float:
    """The kernel's decisions replayed in float64: its errors are those of its values, and each decision is the best of its moment."""
    values, kept, errors = found
    w, allowed, off = W.double(), W.abs().max().double() * len(W) * EPS * 4, 0.0
    if mask is not None and not torch.equal(kept, mask):
        return torch.inf
    for i in range(len(W)):
        now = w[i]
        if keep and i % keep[1] == 0:
            group = slice(i, i + keep[1])
            ranks = w[group].square() * score[group, None].double()
            least = ranks.masked_fill(~kept[group], torch.inf).amin(0)
            most = ranks.masked_fill(kept[group], 0).amax(0)
            off = max(off, float(((most - least) / (most * 1e-3)).nan_to_num(0).max()))
            off = off if bool((kept[group].sum(0) == keep[0]).all()) else torch.inf
        alive = torch.ones_like(now, dtype=torch.bool) if kept is None else kept[i]
        if scale is None:
            off = max(off, share(values[i], now.where(alive, 0), allowed))
            value = values[i].double()
        else:
            level = (now / scale[i]).clamp(low[i].double(), high[i].double())
            off = max(
                off,
                float(
                    ((values[i] - level).abs() / 0.501).where(alive, values[i].abs() * torch.inf).nan_to_num(0).max()
                ),
            )
            value = values[i].double() * scale[i]
        error = now - value
        off = max(off, share(errors[i], error, allowed))
        w[i + 1 :] -= steps[i, i + 1 :, None].double() * error
    return off


def held_tokens(bits: int, rotary: bool, heads: tuple[int, int, int], B: int, T: int, device: torch.device):
    """(grid, keys, values, cosines and sines): full-precision inputs on static grids that hold them."""
    _, H, D = heads
    scale = torch.full((H, D), 8 / 2**bits)
    zero = torch.full((H, D), 2.0 ** (bits - 1))
    grid = KVGrid(scale, zero, scale, zero, bits, "half" if rotary else None, D if rotary else 0)
    keys, values = (random(B, H, T + i, D, device=device, dtype=torch.float16)[:, :, :T] for i in range(2))
    if not rotary:
        return grid, keys, values, ()
    angle = torch.arange(T)[:, None] * 10000.0 ** -(torch.arange(D // 2) * 2 / D)  # [T, D/2]
    return grid, keys, values, tuple(t[None].to(device) for t in (angle.cos(), angle.sin()))


def append(bits: int, rotary: bool, heads: tuple[int, int, int], B: int, T: int, device: torch.device) -> Job:
    """New tokens of keys and values to codes, behind 100 that are there."""
    from lowbit.triton.kv import kv_append

    grid, keys, values, angles = held_tokens(bits, rotary, heads, B, T, device)
    kv = kv_planar.PlanarKV.empty(grid, B, device, 100 + T)

    def run():
        kv.length = 100
        kv_append(kv, keys, values, *angles)

    def check(_):
        held = kv_planar.decoded(kv, torch.float64)
        before = (keys.double(), values.double())
        if rotary:
            before = kv_planar.rotate(before[0], angles[0], -angles[1], "half"), before[1]
        # Half a step, and what float32 angles leave of a turn: the square of their size is 1 to 2^-23.
        ends = -(2.0 ** (bits - 1)) * grid.key_scale[0, 0], (2.0 ** (bits - 1) - 1) * grid.key_scale[0, 0]
        wanted = (t.clamp(*map(float, ends)) for t in before)
        allowed = grid.key_scale[0, 0].double().to(device) * 0.5001
        return max(share(x[:, :, 100:], y, allowed) for x, y in zip(held, wanted))

    return Job(run, check, moved=octets(keys, values) + sum(p.numel() // kv.capacity * T * 2 for p in kv.keys))


def attention(
    bits: int, rotary: bool, heads: tuple[int, int, int], B: int, T: int, device: torch.device, softmax_bits: int = 16
) -> Job:
    """One query a sequence over T packed tokens, beside PyTorch's attention over float16 keys and values, turned already."""
    from lowbit.triton.kv import attention_decode

    grid, keys, values, angles = held_tokens(bits, rotary, heads, B, T, device)
    kv = kv_planar.PlanarKV.empty(grid, B, device, T)
    kv_planar.append(kv, keys, values, *angles)
    query = random(B, heads[0], heads[2], device=device, dtype=torch.float16)
    options = {"softmax_bits": softmax_bits}

    def check(y):
        wanted = kv_planar.attention_decode(query.double(), kv, *(t.double() for t in angles), **options)
        held, turned = kv_planar.decoded(kv, torch.float64), tuple(t.double() for t in angles)
        keys = kv_planar.rotate(held[0], *turned, "half") if turned else held[0]
        q = query.double().unflatten(1, (heads[1], -1)) * heads[2] ** -0.5  # [B, Hq, D] -> [B, H, group, D]
        p = (q @ keys.transpose(2, 3)).softmax(-1)
        size = 1 + (q.square().sum(-1) * keys.square().sum(-1).amax(-1, keepdim=True)).sqrt()[..., None]
        # Query, keys and probabilities are float16: each probability is off by 2^-11 times a few scores, independently of the others.
        spread = (p.square() @ held[1].square()).sqrt()  # [B, H, group, D]
        allowed = (2.0**-8 * size * spread).flatten(1, 2) + 2.0**-10 * wanted.abs()
        if softmax_bits < 16:  # one or two may be rounded to the other side
            allowed = allowed + 2 * held[1].abs().amax() / (2**softmax_bits - 1)
        return share(y, wanted, allowed)

    others = {}
    if device.type == "cuda":
        attend = partial(F.scaled_dot_product_attention, enable_gqa=True)
        others["torch float16"] = partial(attend, query[:, :, None], keys.contiguous(), values.contiguous())
    moved = octets(query) * 2 + sum(octets(t[:, :, :T]) for t in (*kv.keys, *kv.values)) + octets(*angles)
    return Job(lambda: attention_decode(query, kv, *angles, **options), check, others, moved)


def two_of_four(coded: bool, T: int, C: int, R: int, device: torch.device) -> Job:
    """A weight that keeps 2 of 4: of float16, or of 8-bit codes; beside the whole weight in float16."""
    from lowbit.triton.sparse24 import sparse24_linear

    x = random(T, C, device=device, dtype=torch.float16)
    W = random(R, C, device=device).half()
    groups = F.pad(W.abs(), (0, -C % 4), value=-1.0).unflatten(1, (-1, 4))  # [R, C] -> [R, C/4, 4]
    kept = (groups.argsort(2).argsort(2) >= 2).flatten(1)[:, :C]
    if coded:
        n = -(-C // GROUP)
        sizes = torch.tensor([GROUP] * (n - 1) + [C - GROUP * (n - 1)], device=device)
        codes, zero = random_codes(R, C, 8, device), random_codes(R, n, 8, device)
        values, indices = nm_encode(codes, kept, (2, 4), blank=zero.repeat_interleave(sizes, 1))
        scale = (random(R, n, device=device).abs() + 0.5) / 256
        weight = sparse24(values, indices, channels=C, scale=scale, zero=zero, sizes=sizes)
    else:
        weight = sparse24(*nm_encode(W, kept, (2, 4)), channels=C)
    moved = octets(x, weight.values, weight.places, weight.scale, weight.zero) + 2 * T * R
    full = dense_weight(weight)
    return Job(
        lambda: sparse24_linear(x, weight),
        partial(near_product, x, full),
        {"torch float16": partial(F.linear, x, full.half())},
        moved,
    )


def flexgen(T: int, C: int, R: int, device: torch.device) -> Job:
    """FlexGen's codec, decoded and multiplied in one."""
    from lowbit.triton.group4 import group4_linear

    x = random(T, C, device=device, dtype=torch.float16)
    weight = compress(random(R, C, device=device), dim=0)
    full = decompress(weight, torch.float16)
    moved = octets(x, weight.packed, weight.scale, weight.minimum) + 2 * T * R
    others = {
        "torch float16": partial(F.linear, x, full),
        "decoded in the call": lambda: F.linear(x, decompress(weight, torch.float16)),
    }
    return Job(lambda: group4_linear(x, weight), partial(near_product, x, full), others, moved)


def near_product(x: torch.Tensor, full: torch.Tensor, y: torch.Tensor) -> float:
    """Float32 sums of float16 products, rounded to float16."""
    wanted, size = x.double() @ full.double().t(), x.double().abs() @ full.double().abs().t()
    return share(y, wanted, size * EPS * (8 + x.shape[1] ** 0.5) + wanted.abs() * 2.0**-11 + 1e-7)


def every_case() -> list[Case]:
    """What is checked and timed on a GPU."""
    cases = []
    for (bits, grids), tokens in LINEARS.items():
        for C, R in LAYERS:
            for T in tokens:
                shape = f"{T} x {C} -> {R}"
                cases.append(Case(f"linear W{bits}A8, {grids}", shape, partial(linear, bits, grids, T, C, R)))
    for C in (4096, 11008, 576):
        for T in FEW:
            cases.append(Case("quantize", f"{T} x {C}", partial(quantizer, T, C)))
            cases.append(Case("residual, RMSNorm, gather, quantize", f"{T} x {C}", partial(norm, T, C)))
    for bits in (8, 4, 3, 2):
        for heads in HEADS:
            words = f"heads {heads[0]}/{heads[1]} of {heads[2]}"
            for B, T in ((1, 1), (16, 1), (1, 2048)):
                cases.append(
                    Case(f"kv_append KV{bits}", f"{B} x {T}, {words}", partial(append, bits, True, heads, B, T))
                )
            for B, T in HELD:
                shape = f"{B} x {T}, {words}"
                cases.append(
                    Case(f"attention_decode KV{bits}, rotary", shape, partial(attention, bits, True, heads, B, T))
                )
                cases.append(Case(f"attention_decode KV{bits}", shape, partial(attention, bits, False, heads, B, T)))
    for B, T in HELD:
        rounded = partial(attention, 4, True, HEADS[0], B, T, softmax_bits=8)
        cases.append(Case("attention_decode KV4, rotary, 8-bit softmax", f"{B} x {T}, heads 32/8 of 128", rounded))
    for C, R in LAYERS:
        for T in FEW[:2]:
            shape = f"{T} x {C} -> {R}"
            cases.append(Case("sparse_linear 2:4 float16", shape, partial(two_of_four, False, T, C, R)))
            cases.append(Case("sparse_linear 2:4 of 8 bits", shape, partial(two_of_four, True, T, C, R)))
            cases.append(Case("FlexGen's codec", shape, partial(flexgen, T, C, R)))
    for name, keep, quantize in (
        ("prune", None, False),
        ("choose 2:4", (2, 4), False),
        ("both", (2, 4), True),
        ("quantize", None, True),
    ):
        for R in (4096, 16384):
            cases.append(Case(f"solve_block, {name}", f"128 x {R}", partial(column_sweep, 128, R, keep, quantize)))
    return cases + whole_models("W4A8", "rptq+ W4A4KV4")


def whole_models(*presets: str) -> list[Case]:
    """Logits of tiny packed models, of a prompt and of decoding steps."""
    from _gpu_model import model

    return [Case(f"model, {preset}", "2 x 4 tokens and 2 steps, two blocks", partial(model, preset)) for preset in presets]


def tiny_cases() -> list[Case]:
    """One of each kernel, small enough for Triton's interpreter."""
    cases = [
        Case(f"linear W{bits}A8, {grids}", "3 x 200 -> 18", partial(linear, bits, grids, 3, 200, 18))
        for bits, grids in LINEARS
    ]
    return cases + [
        Case("quantize", "3 x 200", partial(quantizer, 3, 200)),
        Case("residual, RMSNorm, gather, quantize", "2 x 192", partial(norm, 2, 192)),
        Case("solve_block, prune", "8 x 17", partial(column_sweep, 8, 17, None, False)),
        Case("solve_block, both", "8 x 17", partial(column_sweep, 8, 17, (2, 4), True)),
        Case("kv_append KV3", "1 x 3, heads 2/1 of 16", partial(append, 3, True, (2, 1, 16), 1, 3)),
        Case("attention_decode KV3, rotary", "1 x 9, heads 2/1 of 16", partial(attention, 3, True, (2, 1, 16), 1, 9)),
        Case("sparse_linear 2:4 float16", "2 x 132 -> 9", partial(two_of_four, False, 2, 132, 9)),
        Case("sparse_linear 2:4 of 8 bits", "2 x 132 -> 9", partial(two_of_four, True, 2, 132, 9)),
        Case("FlexGen's codec", "2 x 70 -> 9", partial(flexgen, 2, 70, 9)),
        *whole_models("W4A8"),
    ]
