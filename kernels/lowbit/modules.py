"""The modules of a compressed block: they hold packed tensors and dispatch to a backend.

Every module can say what it is (`spec()`, plain JSON) and be built empty from that (`from_spec`), so a checkpoint's config is enough
to lay out the model before the tensors are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowbit import integer
from lowbit.backend import operation
from lowbit.coded import Coded
from lowbit.group4 import Group4, decompress
from lowbit.group4 import compress as group4_compress
from lowbit.packing import pack, packed_length
from lowbit.planar import PlanarWeight
from lowbit.reference import fine_channels
from lowbit.sinks import sink_rows
from lowbit.sparse import bitmask_encode, index_bytes, nm_encode, slots_per_row
from lowbit.sparse_linear import SparseTiles, pays, sparse_linear, sparse_tiles

GROUP4 = 64
# Below, the product with the whole weight is faster than the one that skips zeros.
FEW_TOKENS = 16
SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class ActivationQuantizer(nn.Module):
    """Quantizes an activation to its grid and back.

    mode "static": one grid a cluster, buffers `scale`, `zero` float32 [G], `bits` uint8 [G], `sizes` int32 [G].
    mode "tile": each token's own range in each cluster, buffers `bits` and `sizes`.
    mode "token": each token's own range at `token_bits`. mode "group4": FlexGen's codec, groups of 64 channels.
    sinks: how many tokens of a sequence, the first, stay as they are (`lowbit.sinks`).
    """

    def __init__(self, mode: str, *, clusters: int = 0, token_bits: int = 0, sinks: int = 0):
        super().__init__()
        self.mode, self.clusters, self.token_bits, self.sinks = mode, clusters, token_bits, sinks
        if mode == "static":
            self.register_buffer("scale", torch.ones(clusters, dtype=torch.float32))
            self.register_buffer("zero", torch.zeros(clusters, dtype=torch.float32))
        if mode in ("static", "tile"):
            self.register_buffer("bits", torch.full((clusters,), 16, dtype=torch.uint8))
            self.register_buffer("sizes", torch.zeros(clusters, dtype=torch.int32))

    @classmethod
    def static(
        cls, scale: torch.Tensor, zero: torch.Tensor, bits: torch.Tensor, sizes: torch.Tensor, *, sinks: int = 0
    ) -> ActivationQuantizer:
        """From grids: scale, zero float [G], bits integer [G] (16: untouched), sizes integer [G]."""
        q = cls("static", clusters=scale.numel(), sinks=sinks)
        q.scale, q.zero = scale.float(), zero.float()
        q.bits, q.sizes = bits.to(torch.uint8), sizes.to(torch.int32)
        return q

    @classmethod
    def tiles(cls, bits: torch.Tensor, sizes: torch.Tensor, *, sinks: int = 0) -> ActivationQuantizer:
        """Dynamic: bits integer [G] (16: untouched), sizes integer [G]."""
        q = cls("tile", clusters=bits.numel(), sinks=sinks)
        q.bits, q.sizes = bits.to(torch.uint8), sizes.to(torch.int32)
        return q

    def spec(self) -> dict[str, Any]:
        """What `from_spec` makes an empty one like this of, as the config stores it (docs/format.md)."""
        return {"mode": self.mode, "clusters": self.clusters, "token_bits": self.token_bits, "sinks": self.sinks}

    @classmethod
    def from_spec(cls, spec: dict[str, Any] | None) -> ActivationQuantizer | None:
        if spec is None:
            return None
        return cls(spec["mode"], clusters=spec["clusters"], token_bits=spec["token_bits"], sinks=spec["sinks"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., C] -> [..., C], same dtype."""
        if not self.sinks:
            return self._rounded(x)
        return torch.where(sink_rows(x), x, self._rounded(x))

    def spared(self, x: torch.Tensor) -> torch.Tensor | None:
        """bool [..., 1]: the tokens of x that stay as they are, None if all are rounded (which a graph being compiled cannot know)."""
        rows = sink_rows(x) if self.sinks else None
        return rows if rows is not None and (torch.compiler.is_compiling() or rows.any()) else None

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        if self.mode == "static":
            run = operation("quantize_activation_static", x.device.type)
            return run(x, self.scale, self.zero, self.bits, self.sizes.long())
        if self.mode == "tile":
            return operation("quantize_activation_tiles", x.device.type)(x, self.bits, self.sizes.long())
        if self.mode == "token":
            return operation("quantize_activation_dynamic", x.device.type)(x, self.token_bits)
        return decompress(group4_compress(x, dim=-1, group=GROUP4), x.dtype)


def _spec_of(quantizer: ActivationQuantizer | None) -> dict[str, Any] | None:
    return None if quantizer is None else quantizer.spec()


class Linear(nn.Module):
    """y = quantize_out(quantize_in(rotate(x)) W^T + b), weight packed at 2, 3, 4 or 8 bits or kept (bits=16).

    Buffers at bits < 16: `weight_packed` uint8 [R, ceil(C bits/8)], `weight_scale` [R, G], `weight_zero` uint8 [R, ceil(G bits/8)],
    `weight_groups` int32 [G]. With codec "group4": `weight_packed`, `weight_scale`, `weight_minimum` of FlexGen's codec along R.
    Fine groups have twice the bits: what is above holds the high half of their codes and zero points, and `weight_rest` uint8
    [R, ceil(K bits/8)], `weight_rest_zero` uint8 [R, ceil(F bits/8)] the low one, of the K channels of the F groups that `weight_fine`
    int32 [F] names; `fine` is {"groups": F, "channels": K}, None for none.
    At 16 bits: `weight` [R, C]. `bias` [R] or None. `input_quantizer` acts on x, `output_quantizer` on y (queries, keys, values).
    `rotation` is the block of the Hadamard transform of x (`lowbit.hadamard`), 1 for none; the weight's columns are in its basis.
    `planar` is the weight once more, laid out for integer kernels (`lowbit.integer.take`), which follows it from device to device, and
    `taken_over` the quantizer of the norm before it, which acts here then.

    `sparse` says how zeros are left out (lowbit.sparse), None for not at all:
    {"kind": "bitmask", "kept": K}: `weight_mask` uint8 [R, ceil(C/8)], and the K kept entries as `weight_values` [K] at 16 bits, else
    `weight_packed` uint8 [ceil(K bits/8)].
    {"kind": "n:m", "keep": [n, m]}: `weight_indices` uint8 [R, ceil(S ceil(log2 m)/8)] of S slots a row, and `weight_values` [R, S] or
    `weight_packed` uint8 [R, ceil(S bits/8)].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int = 16,
        groups: int = 1,
        codec: str = "grid",
        bias: bool = True,
        scale_dtype: str = "float16",
        sparse: dict[str, Any] | None = None,
        fine: dict[str, int] | None = None,
        dtype: torch.dtype | None = None,
        input_quantizer: ActivationQuantizer | None = None,
        output_quantizer: ActivationQuantizer | None = None,
        rotation: int = 1,
    ):
        super().__init__()
        self.in_features, self.out_features, self.rotation = in_features, out_features, rotation
        self.bits, self.groups, self.codec, self.scale_dtype, self.sparse = bits, groups, codec, scale_dtype, sparse
        self.fine = fine
        self.input_quantizer, self.output_quantizer = input_quantizer, output_quantizer
        self.tiles: SparseTiles | None = None
        self.planar: PlanarWeight | None = None
        self.taken_over: tuple[ActivationQuantizer, ...] = ()
        for name, (shape, kind) in self._layout(dtype).items():
            self.register_buffer(name, torch.zeros(shape, dtype=kind))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)

    def _layout(self, dtype: torch.dtype | None) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        C, R, G, b = self.in_features, self.out_features, self.groups, self.bits
        entries, where = self._sparse_layout()
        if b == 16:
            return {"weight" if self.sparse is None else "weight_values": (entries, dtype), **where}
        if self.codec == "group4":
            groups = -(-R // GROUP4)
            return {
                "weight_packed": ((C, (R + 1) // 2), torch.uint8),
                "weight_scale": ((C, groups), torch.float16),
                "weight_minimum": ((C, groups), torch.float16),
            }
        return {
            "weight_packed": ((*entries[:-1], (entries[-1] * b + 7) // 8), torch.uint8),
            **where,
            "weight_scale": ((R, G), SCALE_DTYPES[self.scale_dtype]),
            "weight_zero": ((R, (G * b + 7) // 8), torch.uint8),
            "weight_groups": ((G,), torch.int32),
            **self._fine_layout(),
        }

    def _fine_layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        if self.fine is None:
            return {}
        F, K = self.fine["groups"], self.fine["channels"]
        return {
            "weight_rest": ((self.out_features, packed_length(K, self.bits)), torch.uint8),
            "weight_rest_zero": ((self.out_features, packed_length(F, self.bits)), torch.uint8),
            "weight_fine": ((F,), torch.int32),
        }

    def _sparse_layout(self) -> tuple[tuple[int, ...], dict[str, tuple[tuple[int, ...], torch.dtype]]]:
        """(shape of the stored entries, tensors that say where they belong)."""
        C, R = self.in_features, self.out_features
        if self.sparse is None:
            return (R, C), {}
        if self.sparse["kind"] == "bitmask":
            return (self.sparse["kept"],), {"weight_mask": ((R, (C + 7) // 8), torch.uint8)}
        if self.sparse["kind"] == "n:m":
            keep = tuple(self.sparse["keep"])
            return (R, slots_per_row(C, keep)), {"weight_indices": ((R, index_bytes(C, keep)), torch.uint8)}
        raise ValueError(f"unknown sparse storage {self.sparse['kind']!r}; this release knows 'bitmask' and 'n:m'")

    def spec(self) -> dict[str, Any]:
        """The entry of the config's `modules` that `build` makes an empty one like this of (docs/format.md)."""
        return {
            "kind": "linear",
            "bits": self.bits,
            "groups": self.groups,
            "codec": self.codec,
            "scale_dtype": self.scale_dtype,
            "sparse": self.sparse,
            "fine": self.fine,
            "rotation": self.rotation,
            "input": _spec_of(self.input_quantizer),
            "output": _spec_of(self.output_quantizer),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], like: nn.Module) -> Linear:
        """An empty module of `spec`'s layout with the shape, bias and dtype of `like` (nn.Linear or GPT-2's Conv1D)."""
        out_features, in_features = linear_shape(like)
        return cls(
            in_features,
            out_features,
            bits=spec["bits"],
            groups=spec["groups"],
            codec=spec["codec"],
            scale_dtype=spec["scale_dtype"],
            sparse=spec["sparse"],
            fine=spec["fine"],
            rotation=spec["rotation"],
            bias=like.bias is not None,
            dtype=like.weight.dtype,
            input_quantizer=ActivationQuantizer.from_spec(spec["input"]),
            output_quantizer=ActivationQuantizer.from_spec(spec["output"]),
        )

    @classmethod
    def full_precision(cls, like: nn.Module) -> Linear:
        """The same function as `like`, weights kept as they are (a Conv1D's transposed to [R, C])."""
        out_features, in_features = linear_shape(like)
        new = cls(in_features, out_features, bias=like.bias is not None, dtype=like.weight.dtype)
        new.weight = like.weight.detach() if isinstance(like, nn.Linear) else like.weight.detach().T.contiguous()
        new.bias = None if like.bias is None else like.bias.detach()
        return new

    def pack_(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        sizes: torch.Tensor,
        bits: int,
        *,
        fine: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
        keep: tuple[int, int] | None = None,
    ) -> None:
        """Replace the kept weight by codes uint8 [R, C] on grids scale [R, G], zero [R, G], sizes [G].

        fine: bool [G], groups whose codes and zero points have twice the bits, and steps of scale / 2^bits.
        kept: bool [R, C], None to store every code. With it only codes that are kept and differ from their zero point are stored:
            under a bitmask, or with `keep` (n, m) in n slots for each m channels.

        Raises:
            ValueError: codes that do not fit, a mask of another shape, or a group that keeps more than n.
        """
        zero, sizes = zero.to(torch.uint8), sizes.to(codes.device)
        if fine is not None and fine.any():
            codes, zero = self._part(codes, zero, sizes, bits, fine.to(codes.device), kept)
        if kept is not None:
            z_c = zero.repeat_interleave(sizes, dim=1)  # [R, G] -> [R, C]
            codes = self._leave_out(codes, kept, keep, blank=z_c)
        del self.weight
        self.bits, self.groups, self.codec = bits, sizes.numel(), "grid"
        self.scale_dtype = str(scale.dtype).removeprefix("torch.")
        self.register_buffer("weight_packed", pack(codes, bits))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", pack(zero, bits))
        self.register_buffer("weight_groups", sizes.to(torch.int32))

    def _part(self, codes, zero, sizes, bits, fine, kept) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [R, C] and zero points [R, G] without the low bits of fine groups, which become buffers."""
        channels = fine_channels(sizes, fine.nonzero()[:, 0])
        rest, rest_zero = codes[:, channels] % 2**bits, zero[:, fine] % 2**bits  # [R, K], [R, F]
        if kept is not None:
            blank = rest_zero.repeat_interleave(sizes[fine], dim=1)  # [R, F] -> [R, K]
            rest = torch.where(kept[:, channels], rest, blank)
        self.fine = {"groups": rest_zero.shape[1], "channels": rest.shape[1]}
        self.register_buffer("weight_rest", pack(rest, bits))
        self.register_buffer("weight_rest_zero", pack(rest_zero, bits))
        self.register_buffer("weight_fine", fine.nonzero()[:, 0].to(torch.int32))
        refined = fine.repeat_interleave(sizes)  # [G] -> [C]
        return torch.where(refined, codes >> bits, codes), torch.where(fine, zero >> bits, zero)

    def pack_sparse_(self, kept: torch.Tensor, keep: tuple[int, int] | None = None) -> None:
        """Replace the kept weight by its entries where `kept` bool [R, C], in its own dtype; all others are 0 from now on.

        keep: None for a bitmask; (n, m) for n slots in each m channels.

        Raises:
            ValueError: a mask of another shape, or a group that keeps more than n.
        """
        values = self._leave_out(self.weight, kept, keep, blank=0)
        del self.weight
        self.register_buffer("weight_values", values)

    def _leave_out(
        self, values: torch.Tensor, kept: torch.Tensor, keep: tuple[int, int] | None, *, blank: torch.Tensor | int
    ) -> torch.Tensor:
        """The entries of values [R, C] that stay; where they belong becomes a buffer, and how, `sparse`."""
        if keep is None:
            stored, mask = bitmask_encode(values, kept, blank=blank)
            self.sparse = {"kind": "bitmask", "kept": stored.numel()}
            self.register_buffer("weight_mask", mask)
        else:
            stored, indices = nm_encode(values, kept, keep, blank=blank)
            self.sparse = {"kind": "n:m", "keep": list(keep)}
            self.register_buffer("weight_indices", indices)
        return stored

    def pack_group4_(self) -> None:
        """Replace the kept weight by FlexGen's codec, groups of 64 along the rows."""
        stored = group4_compress(self.weight, dim=0, group=GROUP4)
        del self.weight
        self.bits, self.groups, self.codec = 4, stored.scale.shape[1], "group4"
        self.register_buffer("weight_packed", stored.packed)
        self.register_buffer("weight_scale", stored.scale)
        self.register_buffer("weight_minimum", stored.minimum)

    def skip_zeros_(self) -> None:
        """Leave zeros out of the product from now on, where that is faster; not stored. Call again when the weight has changed."""
        self.tiles = None
        weight = self.dequantized_weight()
        if pays(weight):
            self.tiles = sparse_tiles(weight)

    def stored_bytes(self) -> int:
        """Bytes of the weight as stored: codes or values, mask or indices, scales, zero points, group sizes."""
        return sum(
            t.numel() * t.element_size() for name, t in self.named_buffers(recurse=False) if name.startswith("weight")
        )

    def dequantized_weight(self) -> torch.Tensor:
        """[R, C]: float32 from codes, or the kept weight in its own dtype; a weight that was left out is exactly 0.0.

        Raises:
            ValueError: a mask or indices that do not fit the stored entries.
        """
        if self.codec == "group4":
            shape = (self.out_features, self.in_features)
            stored = Group4(self.weight_packed, self.weight_scale, self.weight_minimum, shape, 0, GROUP4)
            return decompress(stored, torch.float32)
        if self.bits == 16:
            return self.weight if self.sparse is None else self._decoded()
        coarse = self._on_grids() if self.sparse is None else self._decoded()
        if self.fine is None:
            return coarse
        rest = self.weight_rest, self.weight_rest_zero, self.weight_scale, self.weight_groups.long()
        return operation("refine_weight", coarse.device.type)(coarse, *rest, self.weight_fine.long(), bits=self.bits)

    def _on_grids(self) -> torch.Tensor:
        run = operation("dequantize_weight", self.weight_packed.device.type)
        stored = self.weight_packed, self.weight_scale, self.weight_zero, self.weight_groups.long()
        return run(*stored, bits=self.bits, channels=self.in_features)

    def _decoded(self) -> torch.Tensor:
        options: dict[str, Any] = {"channels": self.in_features}
        if self.sparse["kind"] == "bitmask":
            name, where = "bitmask", self.weight_mask
            count = {"kept": self.sparse["kept"]}  # packed codes do not tell how many they are
        else:
            options["keep"] = tuple(self.sparse["keep"])
            name, where, count = "nm", self.weight_indices, {}
        if self.bits == 16:
            return operation(f"decode_{name}", where.device.type)(self.weight_values, where, **options)
        run = operation(f"dequantize_{name}", where.device.type)
        grids = self.weight_scale, self.weight_zero, self.weight_groups.long()
        return run(self.weight_packed, where, *grids, bits=self.bits, **options, **count)

    def kept(self) -> torch.Tensor:
        """bool [R, C]: the weights that are not exactly zero, whatever the layout."""
        return self.dequantized_weight() != 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., C] -> [..., R], same dtype."""
        y = self._product(x)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """What `forward` returns before it is rounded."""
        if isinstance(x, Coded):
            if self._multiplies_codes(x):
                return integer.product_of_codes(x, self.planar, self.bias)
            x = x.made()
        quantizer = self._quantizer()
        if self.planar is not None and integer.runs(x, self.planar, quantizer):
            return integer.product(self._turned(x), self.planar, self.bias, quantizer)
        x = self.multiplied(x)
        if self._skips_zeros_of(x):
            return sparse_linear(x, self.tiles, None if self.bias is None else self.bias.to(x.dtype))
        return operation("linear", x.device.type)(x, self.dequantized_weight(), self.bias)

    def _apply(self, fn, recurse=True):
        """`to` and its like: the layout for the kernels, which is no buffer, goes where the weight goes, in its own dtypes."""
        super()._apply(fn, recurse)
        if self.planar is not None:
            device = self.weight_packed.device
            self.planar = None if device.type == "meta" else self.planar.to(device)
        return self

    def multiplied(self, x: torch.Tensor) -> torch.Tensor:
        """What the weight multiplies of an input x [..., C]: rotated and quantized."""
        quantizer = self._quantizer()
        x = self._turned(x)
        return x if quantizer is None else quantizer(x)

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.rotation == 1 else operation("rotate", x.device.type)(x, self.rotation)

    def _quantizer(self) -> ActivationQuantizer | None:
        """What rounds the input here: its own, or one taken over from the norm that makes it."""
        return self.taken_over[0] if self.taken_over else self.input_quantizer

    def _multiplies_codes(self, x: Coded) -> bool:
        """Whether the codes are of what this weight multiplies, and the kernels have both."""
        mine = bool(self.taken_over) and self.taken_over[0] is x.quantizer and self.rotation == 1
        return mine and self.planar is not None and self.planar.scale.device == x.device

    def _skips_zeros_of(self, x: torch.Tensor) -> bool:
        plain = self.bits == 16 and self.sparse is None  # else the whole weight would have to be decoded first
        if self.tiles is None or (plain and x.numel() < FEW_TOKENS * self.in_features):
            return False
        # The kernel has no gradient, and `to` does not take the layout along.
        same_kind = x.dtype == self.tiles.values.dtype and x.device == self.tiles.values.device
        return same_kind and not (torch.is_grad_enabled() and x.requires_grad)

    def extra_repr(self) -> str:
        layout = "" if self.sparse is None else f", {self.sparse['kind']}"
        return f"{self.in_features} -> {self.out_features}, {self.bits} bits, {self.groups} groups{layout}"


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of an nn.Linear, a lowbit Linear or a Conv1D, whose weight is [in, out]."""
    if isinstance(module, (nn.Linear, Linear)):
        return module.out_features, module.in_features
    return module.weight.shape[1], module.weight.shape[0]


class Norm(nn.Module):
    """One module that normalizes, permutes, rotates and quantizes: quantize(rotate(norm(x)[..., permutation])).

    `handed_over`: the linears behind it round its output themselves (`lowbit.integer.take`).
    Buffers: `weight` [C] and `bias` [C] as in the model (in the *unpermuted* order), `permutation` int32 [C] or None.
    """

    def __init__(
        self,
        channels: int,
        *,
        kind: str,
        eps: float,
        weight: bool = True,
        bias: bool = False,
        permuted: bool = False,
        dtype: torch.dtype | None = None,
        quantizer: ActivationQuantizer | None = None,
        rotation: int = 1,
    ):
        super().__init__()
        self.channels, self.kind, self.eps, self.quantizer, self.rotation = channels, kind, eps, quantizer, rotation
        self.register_buffer("weight", torch.zeros(channels, dtype=dtype) if weight else None)
        self.register_buffer("bias", torch.zeros(channels, dtype=dtype) if bias else None)
        self.register_buffer("permutation", torch.zeros(channels, dtype=torch.int32) if permuted else None)
        self.handed_over = False

    def spec(self) -> dict[str, Any]:
        """The entry of the config's `modules` that `build` makes an empty one like this of (docs/format.md)."""
        return {
            "kind": "norm",
            "norm": self.kind,
            "permuted": self.permutation is not None,
            "rotation": self.rotation,
            "quantizer": _spec_of(self.quantizer),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], like: nn.Module) -> Norm:
        """An empty module of `spec`'s layout with the shape and epsilon of the norm `like`."""
        weight, bias = getattr(like, "weight", None), getattr(like, "bias", None)
        channels = like.normalized_shape[0] if weight is None else weight.shape[0]
        return cls(
            channels,
            kind=spec["norm"],
            eps=norm_epsilon(like),
            weight=weight is not None,
            bias=bias is not None,
            permuted=spec["permuted"],
            rotation=spec["rotation"],
            dtype=None if weight is None else weight.dtype,
            quantizer=ActivationQuantizer.from_spec(spec["quantizer"]),
        )

    @classmethod
    def full_precision(cls, like: nn.Module, kind: str) -> Norm:
        """The same function as the model's norm `like`."""
        new = cls.from_spec({"norm": kind, "permuted": False, "rotation": 1, "quantizer": None}, like)
        for name in ("weight", "bias"):
            if getattr(new, name) is not None:
                setattr(new, name, getattr(like, name).detach())
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., C] -> [..., C], same dtype; with its codes for the linears behind, where they can be made once (`lowbit.coded`)."""
        codes = integer.coded(self, x) if self.handed_over else None
        if codes is not None:
            return codes
        y = self.normalized(x)
        return y if self.quantizer is None or self.handed_over else self.quantizer(y)

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., C] normalized, permuted and rotated, before it is rounded."""
        run = operation("norm", x.device.type)
        return run(x, self.weight, self.bias, self.permutation, kind=self.kind, eps=self.eps, rotation=self.rotation)

    def extra_repr(self) -> str:
        return f"{self.kind}, permuted={self.permutation is not None}"


def norm_epsilon(norm: nn.Module) -> float:
    """The epsilon of a LayerNorm (`eps`) or of one of transformers' RMSNorms (`variance_epsilon` or `eps`)."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


KINDS: dict[str, type[Linear] | type[Norm]] = {"linear": Linear, "norm": Norm}


def build(spec: dict[str, Any], like: nn.Module) -> nn.Module:
    """The empty module that `spec` describes, shaped like the model's own module `like`.

    spec: an entry of the config's `modules` (docs/format.md). KeyError for a spec that lacks a key, or of another kind.
    """
    return KINDS[spec["kind"]].from_spec(spec, like)
