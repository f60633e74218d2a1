"""The position-wise feed-forward network, plain and gated."""

from typing import NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN

from .norms import make_dropout, mark_residual_writer, saturate


class Trim(NamedTuple):
    """What is done to the factors of a gated product before it: both kept within a limit, and the second shifted (gpt-oss)."""

    limit: float | None
    offset: float

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(..., inner)` twice -> the same. What activations make of a gate far below 0 is small already."""
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate, up + self.offset if self.offset else up


def make_trim(config) -> Trim | None:
    """The trim that `config` asks for (`glu_limit glu_offset`), or None where it does nothing."""
    is_needed = config.glu_limit is not None or config.glu_offset != 0
    return Trim(config.glu_limit, config.glu_offset) if is_needed else None


class FeedForward(nn.Module):
    """Two-layer network applied to each position (Vaswani et al., arXiv:1706.03762, sec. 3.3).

    With `config.gated_mlp`, `down(act(gate(h)) * up(h))` (GLU variants, arXiv:2002.05202); else `down(act(up(h)))`.

    Args:
        config: reads `hidden_size intermediate_size hidden_act gated_mlp glu_limit glu_offset mlp_bias activation_dropout`.
        inner_size: in place of `intermediate_size`, for an expert.
    """

    def __init__(self, config, inner_size: int | None = None):
        super().__init__()
        hidden_size, inner_size = config.hidden_size, inner_size or config.intermediate_size
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=config.mlp_bias)
        mark_residual_writer(self.down_proj)
        self.act_fn = ACT2FN[config.hidden_act]
        self.trim = make_trim(config)
        self.dropout = make_dropout(config.activation_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, seq, hidden_size)` -> `(batch, seq, hidden_size)`."""
        if self.gate_proj is None:
            inner = self.act_fn(self.up_proj(hidden_states))  # (batch, seq, intermediate_size)
        elif self.trim is None:
            inner = saturate(self.act_fn(self.gate_proj(hidden_states))) * saturate(self.up_proj(hidden_states))
        else:
            gate, up = self.trim(self.gate_proj(hidden_states), self.up_proj(hidden_states))
            inner = saturate(self.act_fn(gate)) * saturate(up)
        inner = saturate(inner)
        if self.dropout is not None:
            inner = self.dropout(inner)
        return self.down_proj(inner)
