"""What the engine must know about a model family: data, no code.

Paths are relative to a block, except `blocks`, which is relative to the model. The names follow the roles: the attention norm feeds
query, key and value (R1); value feeds the output projection (R3); the MLP norm feeds `up` (R4); `up` feeds `down` (R5).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FusedQKV:
    """Query, key and value in one linear. `layout` "parts" stacks [3, H, D] rows, "heads" interleaves [H, 3, D]."""

    module: str
    layout: str


@dataclass(frozen=True)
class Refusal:
    """A configuration of the family that would be wrong here: config attribute, the value that is refused, and why."""

    attribute: str
    value: object
    reason: str


@dataclass(frozen=True)
class ExpertsSpec:
    """The mixture of experts that stands in a block where `up` and `down` would. Paths are relative to the block.

    Args:
        module: the experts, called (hidden [T, C], expert index [T, k], weight [T, k]); transformers holds their weights fused,
            gate_up_proj [E, 2 F, C] and down_proj [E, C, F].
        router: the module that picks each token's experts; it stays in full precision.
        stored: what one expert's gate, up and down are called in checkpoints, which mostly hold each expert's tensors apart.
        shared: gate, up and down of an expert that every token passes, run before the router; if any.
    """

    module: str
    router: str
    stored: tuple[str, str, str]
    shared: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class Spec:
    """One model family.

    Args:
        model_type: the config's `model_type`.
        blocks: path of the decoder blocks' list.
        norm: "layernorm", "rmsnorm" or "rmsnorm_plus_one" (Gemma's 1 + weight).
        attention_norm, mlp_norm: the two norms; mlp_norm None where one norm feeds attention and MLP (parallel block).
        qkv: three linears, or one fused.
        output: the attention's output projection.
        up: the linears fed by the MLP norm whose product or activation feeds `down`.
        down: the MLP's last linear, the last linear that a block runs.
        experts: the mixture of experts; `up` and `down` are then those of the family's blocks without one.
        head_norms: norms of query and key heads between projection and rotary embedding, if any.
        rotary: None, "half" (channel i pairs with i + d/2) or "interleaved" (2i with 2i + 1). Under rotary embeddings query and
            key channels are never permuted; their grids are per channel, before the rotation.
        attention_interface: whether attention goes through transformers' pluggable functions (needed to quantize softmax).
        returns_tuple: whether a block returns a tuple whose first entry is the hidden state.
        renamed: (part of a name in the model, what checkpoints have instead) where transformers renamed a module.
        refuse: configurations that are refused.
    """

    model_type: str
    blocks: str
    norm: str
    attention_norm: str
    qkv: tuple[str, str, str] | FusedQKV
    output: str
    mlp_norm: str | None
    up: tuple[str, ...]
    down: str
    experts: ExpertsSpec | None = None
    head_norms: tuple[str, str] | None = None
    rotary: str | None = None
    attention_interface: bool = True
    returns_tuple: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    refuse: tuple[Refusal, ...] = ()

    @property
    def qkv_linears(self) -> tuple[str, ...]:
        """Paths of the linears that make query, key and value: three, or the fused one."""
        return (self.qkv.module,) if isinstance(self.qkv, FusedQKV) else self.qkv
