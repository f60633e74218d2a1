"""The Transformer layer: how attention, cross-attention and feed-forward are wired."""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Attention, GlobalRows
from .feed_forward import FeedForward
from .moe import MixtureOfExperts
from .norms import Residual
from .positions import Distances


class TransformerLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention where there is a stack to attend to, feed-forward or experts; a residual around each.

    With two residual streams, side by side, attention reads the second and adds to the first, and the feed-forward reads the
    first and adds to the second (Reformer, arXiv:2001.04451, sec. 3). One stream is both.

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
        self.has_experts = config.is_sparse_layer(layer_idx)
        self.mlp: nn.Module = MixtureOfExperts(config, is_causal) if self.has_experts else FeedForward(config)
        self.is_parallel = config.parallel_residual
        self.has_two_streams = config.residual_streams == 2

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
        is_real: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, seq, output_size)` -> as many, and in training the losses of a router `(batch, 2)`.

        Masks and positions as the stack lowered them; `memory` `(batch, kept, hidden_size)` holds this layer's inputs of
        earlier calls; `is_real` `(batch, seq)` is False for padding.
        """
        first, second = hidden_states.chunk(2, dim=-1) if self.has_two_streams else (hidden_states, hidden_states)
        bias = {} if position_bias is None else {"position_bias": position_bias}
        branch, _ = self.self_attn(
            self.attention_residual.enter(second),
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
        first = self.attention_residual.leave(first, branch)
        if self.cross_attn is not None:
            branch, _ = self.cross_attn(
                self.cross_residual.enter(first),
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            first = self.cross_residual.leave(first, branch)
        inputs = self.mlp_residual.enter(second if self.is_parallel else first)
        branch, router_losses = self.mlp(inputs, is_real) if self.has_experts else (self.mlp(inputs), None)
        if self.has_two_streams:
            return torch.cat((first, self.mlp_residual.leave(second, branch)), dim=-1), router_losses
        return self.mlp_residual.leave(first, branch), router_losses
