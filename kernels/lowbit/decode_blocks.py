"""The modules of a decoder block as the structures that the native step reads (cpu/decode.h)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from lowbit.cpu import decode as cpu
from lowbit.hadamard import rotate
from lowbit.modules import ActivationQuantizer, Linear, Norm
from lowbit.planar import BLOCK, TILE, padded_channels

ACTIVATIONS = {"relu": 0, "silu": 1}
BASE = 8  # where a Hadamard matrix of a power of two is no longer split
WIDEST_BASE = 128


def block_of(module: nn.Module, roles, shape, keep: list[Tensor]) -> cpu.Block:
    """The structure of one block; `keep` gets the tensors that it points to, which must outlive it.

    roles: `lowbit.decode.Roles`. shape: `lowbit.decode.Shape`. What it leaves empty is the cache.

    Raises:
        ValueError: why this block cannot run natively.
    """
    attention = module.get_submodule(roles.output.rpartition(".")[0])
    softmax = getattr(attention, "softmax_bits", 16)
    block = cpu.Block(scaling=attention.scaling, softmax_levels=0 if softmax == 16 else 2**softmax - 1)
    block.activation = ACTIVATIONS[shape.activation]
    norms = [_norm_module(module, path, roles.norm) for path in (roles.attention_norm, roles.mlp_norm)]
    block.attention_norm, block.mlp_norm = (_norm(norm, keep) for norm in norms)
    _check_widths(module, roles, shape, norms)
    block.qkv = _site(module, roles.qkv, norms[0], keep)
    block.output = _site(module, (roles.output,), None, keep)
    block.up = _site(module, roles.up, norms[1], keep)
    block.down = _site(module, (roles.down,), None, keep)
    return block


def end_of(norm: nn.Module, kind: str, head: Linear, keep: list[Tensor]) -> cpu.End:
    """The structure of a model's last norm, which computes `kind` (`lowbit.reference.NORMS`), and its output head; `keep` as above.

    Raises:
        ValueError: why these cannot run natively.
    """
    norm = norm if isinstance(norm, Norm) else Norm.full_precision(norm, kind)
    if norm.channels != getattr(head, "in_features", None):
        raise ValueError(f"the output head, {head}, does not take the {norm.channels} channels of the last norm")
    return cpu.End(norm=_norm(norm, keep), head=_site_of(("the output head",), [head], norm, keep))


def _check_widths(module: nn.Module, roles, shape, norms: list[Norm]) -> None:
    """Channels in and out must be those that the native step takes for granted."""
    C, wide, narrow = norms[0].channels, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inner = module.get_submodule(roles.up[0]).out_features
    expected = dict(zip(roles.qkv, ((C, wide), (C, narrow), (C, narrow)), strict=True))
    expected |= {roles.output: (wide, C), roles.down: (inner, C)} | {path: (C, inner) for path in roles.up}
    for path, widths in expected.items():
        linear = module.get_submodule(path)
        if (linear.in_features, linear.out_features) != widths or norms[1].channels != C or len(roles.up) > 2:
            raise ValueError(
                f"{path} is {linear.in_features} -> {linear.out_features}, {shape} needs {widths[0]} -> {widths[1]}"
            )


def most_sinks(module: nn.Module) -> int:
    """How many tokens of a sequence the block's quantizers spare."""
    return max((m.sinks for m in module.modules() if isinstance(m, ActivationQuantizer)), default=0)


def _norm_module(module: nn.Module, path: str, kind: str) -> Norm:
    norm = module.get_submodule(path)
    return norm if isinstance(norm, Norm) else Norm.full_precision(norm, kind)


def _norm(norm: Norm, keep: list[Tensor]) -> cpu.Norm:
    weight = norm.weight
    if weight is not None:
        weight = weight.float() + (norm.kind == "rmsnorm_plus_one")
    return cpu.Norm(
        centred=norm.kind == "layernorm",
        eps=norm.eps,
        weight=_floats(weight, keep),
        bias=_floats(norm.bias, keep),
        permutation=cpu.address(norm.permutation, keep),
        rotation=_rotation(norm.rotation, keep),
    )


def _site(module: nn.Module, paths: tuple[str, ...], norm: Norm | None, keep: list[Tensor]) -> cpu.Site:
    return _site_of(paths, [module.get_submodule(path) for path in paths], norm, keep)


def _site_of(paths: tuple[str, ...], linears: list[Linear], norm: Norm | None, keep: list[Tensor]) -> cpu.Site:
    for path, linear in zip(paths, linears):
        if not isinstance(linear, Linear) or linear.planar is None:
            raise ValueError(f"{path} is not laid out for integer kernels (lowbit.integer.take)")
    quantizer = _shared_quantizer(paths, linears, norm)
    first, mode = linears[0], "none" if quantizer is None else quantizer.mode
    site = cpu.Site(rotation=_rotation(first.rotation, keep), channels=first.in_features, count=len(linears))
    site.tiles = padded_channels(first.in_features) // TILE
    site.exact = quantizer is None
    if quantizer is not None:
        site.clusters = _clusters(quantizer, first.in_features, keep)
        site.shifted = mode == "static" or 8 in _widths(quantizer)
    for i, (path, linear) in enumerate(zip(paths, linears)):
        site.linears[i] = _linear(path, linear, keep)
    return site


def _shared_quantizer(paths, linears: list[Linear], norm: Norm | None) -> ActivationQuantizer | None:
    """What rounds the input of all these linears."""
    if norm is not None and norm.quantizer is not None and not norm.handed_over:
        raise ValueError(
            f"the norm before {paths[0]} rounds its output itself: take its linears together (lowbit.integer.take)"
        )
    each = [linear.taken_over[0] if linear.taken_over else linear.input_quantizer for linear in linears]
    if any(linear.rotation != linears[0].rotation for linear in linears) or any(not _alike(q, each[0]) for q in each):
        raise ValueError(f"{', '.join(paths)} do not rotate and round their input alike")
    return each[0]


def _alike(a: ActivationQuantizer | None, b: ActivationQuantizer | None) -> bool:
    if a is None or b is None or a is b:
        return a is b
    same = a.spec() == b.spec()
    return same and all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers()))


def _widths(quantizer: ActivationQuantizer) -> list[int]:
    return [quantizer.token_bits] if quantizer.mode == "token" else quantizer.bits.tolist()


def _clusters(quantizer: ActivationQuantizer, channels: int, keep: list[Tensor]) -> cpu.Clusters:
    static, token = quantizer.mode == "static", quantizer.mode == "token"
    bits = torch.tensor([quantizer.token_bits], dtype=torch.uint8) if token else quantizer.bits
    sizes = torch.tensor([channels]) if token else quantizer.sizes.long()
    return cpu.Clusters(
        count=sizes.numel(),
        scale=_floats(quantizer.scale, keep) if static else None,
        zero=_floats(quantizer.zero, keep) if static else None,
        bits=cpu.address(bits.contiguous(), keep),
        sizes=cpu.address(sizes.contiguous(), keep),
        brief=quantizer.mode == "tile",
    )


def _linear(path: str, linear: Linear, keep: list[Tensor]) -> cpu.Linear:
    planar, bias = linear.planar, None if linear.bias is None else linear.bias.float()
    first, second = (*planar.planes, None)[:2]
    full = planar.rows // BLOCK * BLOCK
    tails = [None if t is None or full == planar.rows else _padded_rows(t[full:]) for t in (first, second, bias)]
    weight = cpu.Weight(bits=planar.bits, units=planar.tiles // 2, rows=planar.rows, octets=planar.tables.shape[1])
    weight.first, weight.second = cpu.address(first, keep), cpu.address(second, keep)
    weight.tables, weight.bias = cpu.address(planar.tables, keep), _floats(bias, keep)
    out = cpu.Linear(weight=weight)
    out.tail_first, out.tail_second, out.tail_bias = (cpu.address(t, keep) for t in tails)
    out.reads = cpu.address(_reads(linear), keep)
    if linear.output_quantizer is not None:
        out.scale, out.zero, out.top = (_floats(t, keep) for t in _output_grid(path, linear.output_quantizer))
    return out


def _reads(linear: Linear) -> Tensor | None:
    """int32 [tiles of the weight]: the activation's tile that each multiplies; None where each multiplies its own."""
    planar, tiles = linear.planar, -(-linear.in_features // TILE)
    if planar.repeats is None:
        return None
    reads = torch.zeros(planar.tiles, dtype=torch.int32)  # tiles of padding may read any
    reads[:tiles] = torch.arange(tiles)
    reads[tiles : tiles + planar.repeats.numel()] = planar.repeats
    return reads


def _padded_rows(rows: Tensor) -> Tensor:
    """Filled up to BLOCK rows with zeros."""
    return torch.cat([rows, rows.new_zeros(BLOCK - len(rows), *rows.shape[1:])])


def _output_grid(path: str, quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero and largest code of each output [R], the last -1 where there is no grid."""
    if quantizer.mode != "static":
        raise ValueError(f"the output of {path} is rounded in mode {quantizer.mode!r}, not on a static grid")
    bits = quantizer.bits.float()
    top = torch.where(bits >= 16, -1.0, torch.exp2(bits) - 1)
    return tuple(
        t.repeat_interleave(quantizer.sizes.long()) for t in (quantizer.scale, quantizer.zero, top)
    )  # [G] -> [R]


def _rotation(block: int, keep: list[Tensor]) -> cpu.Rotation:
    if block == 1:
        return cpu.Rotation(block=1, base=1)
    base = hadamard_base(block)
    return cpu.Rotation(block=block, base=len(base), matrix=cpu.address(base, keep))


@lru_cache(maxsize=32)
def hadamard_base(block: int) -> Tensor:
    """P / sqrt(block) float32 [m, m] of the block's Hadamard matrix: a Sylvester matrix (x) P."""
    m = block
    while m > WIDEST_BASE:
        m //= 2  # beyond, `lowbit.hadamard` always doubles
    base = rotate(torch.eye(m, block), block)[:, :m]
    while m > BASE and m % 2 == 0:
        m //= 2
        corner = base[:m, :m]
        if not torch.equal(torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), corner), base):
            break
        base = corner
    return base.contiguous()


def _floats(tensor: Tensor | None, keep: list[Tensor]) -> int | None:
    return cpu.address(None if tensor is None else tensor.float().contiguous(), keep)
