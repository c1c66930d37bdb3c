"""A mixture's experts, each with linears of its own, so that each can be packed or sparse on its own terms."""

from __future__ import annotations

import torch
from torch import nn

from lowbit.modules import Linear

ROLES = ("gate_proj", "up_proj", "down_proj")  # the linears of one expert, in the order in which they run


class Expert(nn.Module):
    """x -> down_proj(act_fn(gate_proj(x)) * up_proj(x)), [T, C] -> [T, C], over F intermediate channels."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, act_fn: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, C] -> [T, C]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """The experts of one block, called as transformers (5.x) calls its fused module, whose place it takes."""

    @classmethod
    def full_precision(cls, like: nn.Module) -> Experts:
        """The same function as the fused module `like` with gate_up_proj [E, 2 F, C] and down_proj [E, C, F].

        The weights are views of the fused ones: of a module on the meta device this lays out the experts without memory.
        """
        gate, up = like.gate_up_proj.detach().chunk(2, dim=1)  # [E, 2 F, C] -> 2 x [E, F, C]
        return cls(Expert(*weights, like.act_fn) for weights in zip(gate, up, like.down_proj.detach()))

    @property
    def num_experts(self) -> int:
        """E, under transformers' name."""
        return len(self)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum over each token's experts of weight * expert(token).

        Args:
            hidden_states: [T, C]; top_k_index: int64 [T, k], a token's experts, all different; top_k_weights: [T, k].

        Returns:
            [T, C] in the dtype of hidden_states. Experts run in ascending order; one that no token chose does not run.
        """
        out = torch.zeros_like(hidden_states)
        for e in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == e)
            y = self[e](hidden_states[token]) * top_k_weights[token, place, None]  # [T_e, C]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def _linear(weight: torch.Tensor) -> Linear:
    R, C = weight.shape
    linear = Linear(C, R, bias=False, dtype=weight.dtype)
    linear.weight = weight
    return linear
