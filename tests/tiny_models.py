"""Tiny random models of every supported family, built from configs; weights are drawn so that no symmetry hides a mistake."""

from __future__ import annotations

import copy

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 300
TEXT = (
    "The channels of an activation differ wildly in range. A few of them are a hundred times wider than the rest, "
    "so one grid for all of them wastes its codes on silence. Sort them, cut them into clusters, and give each its own scale; "
    "then fold the order into the weights around them, and nothing is left to pay when the model runs.\n\n"
)

_COMMON = dict(
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2
)
_LLAMA = dict(_COMMON, intermediate_size=96, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)
_GEMMA = dict(_LLAMA, head_dim=16, query_pre_attn_scalar=16, sliding_window=8)
_OLD = dict(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)

FAMILIES = {
    "opt": OPTConfig(**_COMMON, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64, pad_token_id=0),
    "llama": LlamaConfig(**_LLAMA),
    "mistral": MistralConfig(**_LLAMA, sliding_window=8),
    "qwen2": Qwen2Config(**_LLAMA, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_LLAMA, head_dim=16),
    "gpt2": GPT2Config(**_OLD),
    "bloom": BloomConfig(
        vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "gpt_neox": GPTNeoXConfig(**_COMMON, intermediate_size=96, max_position_embeddings=64, rotary_pct=0.25),
    "gptj": GPTJConfig(**_OLD, rotary_dim=8),
    "phi": PhiConfig(**_COMMON, intermediate_size=96, max_position_embeddings=64, partial_rotary_factor=0.5),
    "gemma2": Gemma2Config(**_GEMMA),
    "gemma3_text": Gemma3TextConfig(**_GEMMA, layer_types=["sliding_attention", "full_attention"]),
}

_EXPERTS = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    num_experts_per_tok=2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_QWEN_EXPERTS = dict(_EXPERTS, intermediate_size=80, moe_intermediate_size=48, num_experts=4)

# Families with experts: not in FAMILIES, because reordering and activation quantization are refused for them.
MOE = {
    "mixtral": MixtralConfig(**_EXPERTS, intermediate_size=48, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(**_QWEN_EXPERTS, shared_expert_intermediate_size=56, mlp_only_layers=[1]),
    "qwen3_moe": Qwen3MoeConfig(**_QWEN_EXPERTS, head_dim=16, norm_topk_prob=True),
}


def build_model(family: str, seed: int = 0):
    """A random float32 model; norms, biases and weights all get spread, and some channels are made wide."""
    torch.manual_seed(seed)
    config = copy.deepcopy({**FAMILIES, **MOE}[family])  # saving a model in half precision writes its dtype into the config
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                wide = torch.exp(0.7 * torch.randn(p.shape, generator=generator))
                p.copy_(0.1 * noise if name.endswith("bias") else p * wide + 0.1 * noise)
            else:
                p.copy_(noise * 0.12)
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB entries trained on TEXT."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
