"""The families, a few lines each. docs/architectures.md says how to add one."""

from __future__ import annotations

from dataclasses import replace

from ptq.architectures.spec import ExpertsSpec, FusedQKV, Refusal, Spec

_SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")

OPT = Spec(
    model_type="opt",
    blocks="model.decoder.layers",
    norm="layernorm",
    attention_norm="self_attn_layer_norm",
    qkv=_SEPARATE,
    output="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    up=("fc1",),
    down="fc2",
    refuse=(
        Refusal(
            "do_layer_norm_before",
            False,
            "the norm's output is the residual stream (post-norm), so it cannot be permuted",
        ),
    ),
)

LLAMA = Spec(
    model_type="llama",
    blocks="model.layers",
    norm="rmsnorm",
    attention_norm="input_layernorm",
    qkv=_SEPARATE,
    output="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    up=_GATED,
    down="mlp.down_proj",
    rotary="half",
)

QWEN3 = replace(LLAMA, model_type="qwen3", head_norms=("self_attn.q_norm", "self_attn.k_norm"))

GPT2 = Spec(
    model_type="gpt2",
    blocks="transformer.h",
    norm="layernorm",
    attention_norm="ln_1",
    qkv=FusedQKV("attn.c_attn", "parts"),
    output="attn.c_proj",
    mlp_norm="ln_2",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    refuse=(
        Refusal("add_cross_attention", True, "cross-attention is not a decoder-only model"),
        Refusal("reorder_and_upcast_attn", True, "its attention bypasses the pluggable functions"),
    ),
)

BLOOM = Spec(
    model_type="bloom",
    blocks="transformer.h",
    norm="layernorm",
    attention_norm="input_layernorm",
    qkv=FusedQKV("self_attention.query_key_value", "heads"),
    output="self_attention.dense",
    mlp_norm="post_attention_layernorm",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    attention_interface=False,
    returns_tuple=True,
    refuse=(
        Refusal(
            "apply_residual_connection_post_layernorm",
            True,
            "the norm's output is the residual stream, so it cannot be permuted",
        ),
        Refusal("slow_but_exact", True, "it slices the projections' weights itself"),
    ),
)

GPT_NEOX = Spec(
    model_type="gpt_neox",
    blocks="gpt_neox.layers",
    norm="layernorm",
    attention_norm="input_layernorm",
    qkv=FusedQKV("attention.query_key_value", "heads"),
    output="attention.dense",
    mlp_norm="post_attention_layernorm",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    rotary="half",
    renamed=(("lm_head.", "embed_out."),),
)

GPTJ = Spec(
    model_type="gptj",
    blocks="transformer.h",
    norm="layernorm",
    attention_norm="ln_1",
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    output="attn.out_proj",
    mlp_norm=None,
    up=("mlp.fc_in",),
    down="mlp.fc_out",
    rotary="interleaved",
    attention_interface=False,
    returns_tuple=True,
)

PHI = Spec(
    model_type="phi",
    blocks="model.layers",
    norm="layernorm",
    attention_norm="input_layernorm",
    qkv=_SEPARATE,
    output="self_attn.dense",
    mlp_norm=None,
    up=("mlp.fc1",),
    down="mlp.fc2",
    rotary="half",
    refuse=(Refusal("qk_layernorm", True, "query and key LayerNorms are not described by the spec"),),
)

GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    norm="rmsnorm_plus_one",
    mlp_norm="pre_feedforward_layernorm",
    refuse=(Refusal("use_bidirectional_attention", True, "not a causal language model"),),
)

GEMMA3 = replace(GEMMA2, model_type="gemma3_text", head_norms=("self_attn.q_norm", "self_attn.k_norm"))

MIXTRAL = replace(
    LLAMA,
    model_type="mixtral",
    experts=ExpertsSpec("mlp.experts", router="mlp.gate", stored=("w1", "w3", "w2")),
    renamed=((".mlp.", ".block_sparse_moe."),),
)

QWEN2_MOE = replace(
    LLAMA,
    model_type="qwen2_moe",
    experts=ExpertsSpec(
        "mlp.experts",
        router="mlp.gate",
        stored=("gate_proj", "up_proj", "down_proj"),
        shared=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"),
    ),
)

QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    experts=ExpertsSpec("mlp.experts", router="mlp.gate", stored=("gate_proj", "up_proj", "down_proj")),
)

FAMILIES: dict[str, Spec] = {
    spec.model_type: spec
    for spec in (
        OPT,
        LLAMA,
        replace(LLAMA, model_type="mistral"),
        replace(LLAMA, model_type="qwen2"),
        QWEN3,
        GPT2,
        BLOOM,
        GPT_NEOX,
        GPTJ,
        PHI,
        GEMMA2,
        GEMMA3,
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
    )
}
