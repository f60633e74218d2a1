"""The Transformer layer: how attention, cross-attention and feed-forward are wired."""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Attention, GlobalRows
from .feed_forward import FeedForward
from .norms import Residual
from .positions import Distances


class TransformerLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention where there is a stack to attend to, feed-forward; a residual around each.

    Args:
        config: the stack's config.
        layer_idx: the layer's number.
        is_causal: whether self-attention sees only the past.
        encoder_size: width of the encoder's states to attend to; None for no cross-attention.
    """

    def __init__(self, config, layer_idx: int, is_causal: bool, encoder_size: int | None = None):
        super().__init__()
        skip_norm = config.skip_first_norm and layer_idx == 0
        self.attention_residual = Residual(config, skip_norm)
        self.self_attn = Attention(config, layer_idx, is_causal)
        self.cross_attn = None
        if encoder_size is not None:
            self.cross_residual = Residual(config)
            self.cross_attn = Attention(config, layer_idx, is_causal=False, key_value_size=encoder_size)
        self.mlp_residual = Residual(config)
        self.mlp: nn.Module = FeedForward(config)
        self.is_parallel = config.parallel_residual

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        position_bias: torch.Tensor | None = None,
        global_rows: GlobalRows | None = None,
        distances: Distances | None = None,
        query_biases: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """`(batch, seq, hidden_size)` -> `(batch, seq, hidden_size)`; masks and positions as the stack lowered them.

        `memory` `(batch, kept, hidden_size)` holds this layer's inputs of earlier calls.
        """
        inputs = hidden_states
        bias = {} if position_bias is None else {"position_bias": position_bias}
        branch, _ = self.self_attn(
            self.attention_residual.enter(hidden_states),
            attention_mask=attention_mask,
            rotation=rotation,
            global_rows=global_rows,
            distances=distances,
            query_biases=query_biases,
            memory=None if memory is None else self.attention_residual.enter(memory),
            past_key_values=past_key_values,
            **bias,
            **kwargs,
        )
        hidden_states = self.attention_residual.leave(hidden_states, branch)
        if self.cross_attn is not None:
            branch, _ = self.cross_attn(
                self.cross_residual.enter(hidden_states),
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            hidden_states = self.cross_residual.leave(hidden_states, branch)
        branch = self.mlp(self.mlp_residual.enter(inputs if self.is_parallel else hidden_states))
        return self.mlp_residual.leave(hidden_states, branch)
