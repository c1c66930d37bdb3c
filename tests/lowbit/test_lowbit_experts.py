"""Experts held apart against transformers' fused modules, and against the sum they stand for, token by token."""

from __future__ import annotations

import pytest
import torch
from lowbit import Linear
from lowbit.experts import ROLES, Experts
from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

C, F, E = 24, 40, 5
QWEN = dict(hidden_size=C, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=2)
BLOCKS = {
    "mixtral": (
        MixtralSparseMoeBlock,
        MixtralConfig(hidden_size=C, intermediate_size=F, num_local_experts=E, num_experts_per_tok=3),
    ),
    "qwen2_moe": (Qwen2MoeSparseMoeBlock, Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=16)),
    "qwen3_moe": (Qwen3MoeSparseMoeBlock, Qwen3MoeConfig(**QWEN, norm_topk_prob=True, hidden_act="gelu")),
}


def random_block(family, implementation="eager", seed=0):
    kind, config = BLOCKS[family]
    config._experts_implementation = implementation
    block, generator = kind(config).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return block


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", BLOCKS)
def test_experts_apart_equal_the_fused_ones(family, implementation):
    block, x = random_block(family, implementation), tokens(2, 17, C)
    with torch.no_grad():
        expected = block(x)
        block.experts = Experts.full_precision(block.experts)
        found = block(x)
    # the same products; the sum over a token's experts may take another order, which moves the last bits of float32
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6


def test_the_sum_token_by_token_and_in_the_dtype_of_the_input():
    experts = Experts.full_precision(random_block("mixtral").experts)
    x, index = tokens(4, C), torch.tensor([[0, 4], [4, 2], [2, 0], [4, 0]])
    weights = tokens(4, 2, seed=2).sigmoid()
    by_hand = []
    for t in range(4):
        y = torch.zeros(C)
        for k in range(2):
            gate, up, down = (getattr(experts[int(index[t, k])], role).weight for role in ROLES)
            y += weights[t, k] * (down @ (torch.nn.functional.silu(gate @ x[t]) * (up @ x[t])))
        by_hand.append(y)
    # float32 sums of 24 and 40 products in another order
    torch.testing.assert_close(experts(x, index, weights), torch.stack(by_hand), rtol=1e-5, atol=1e-5)
    assert experts.to(torch.bfloat16)(x.bfloat16(), index, weights).dtype == torch.bfloat16


def test_experts_run_once_each_in_order_on_their_own_tokens_and_the_others_not_at_all():
    experts = Experts.full_precision(random_block("mixtral").experts)
    seen = []
    for e, expert in enumerate(experts):
        for role in ROLES:
            hook = lambda _, args, e=e, role=role: seen.append((e, role, args[0].shape[0]))  # noqa: E731
            getattr(expert, role).register_forward_pre_hook(hook)
    index = torch.tensor([[3, 0], [3, 1], [0, 3]])
    experts(tokens(3, C), index, torch.ones(3, 2))
    assert seen == [(e, role, n) for e, n in ((0, 2), (1, 1), (3, 3)) for role in ROLES]
    seen.clear()
    assert torch.equal(experts(tokens(0, C), index[:0], torch.ones(0, 2)), torch.zeros(0, C)) and not seen


def test_every_expert_s_linears_are_packed_and_named_on_their_own():
    experts = Experts.full_precision(random_block("qwen3_moe").experts)
    assert sorted(experts.state_dict()) == sorted(f"{e}.{role}.weight" for e in range(E) for role in ROLES)
    assert all(isinstance(getattr(expert, role), Linear) for expert in experts for role in ROLES)
    down, before = experts[2].down_proj, experts.state_dict()
    codes = (tokens(C, F).sigmoid() * 15).round().to(torch.uint8)
    down.pack_(codes, torch.full((C, 1), 0.1), torch.full((C, 1), 7.0), torch.tensor([F]), 4)
    assert torch.equal(down.dequantized_weight(), (codes.float() - 7) * torch.tensor(0.1))
    assert set(experts.state_dict()) - set(before) == {
        f"2.down_proj.weight_{part}" for part in ("packed", "scale", "zero", "groups")
    }


def test_experts_of_a_module_without_memory_take_none():
    with torch.device("meta"):
        kind, config = BLOCKS["mixtral"]
        fused = kind(config).experts
    experts = Experts.full_precision(fused)
    assert experts.num_experts == E and all(t.is_meta for t in experts.state_dict().values())
    assert experts[0].gate_proj.weight.shape == (F, C) and experts[0].down_proj.weight.shape == (C, F)
