"""One attention for self and cross: projections, positions, cache, dispatch.

Legend: B batch, H heads, G key-value heads, Q queries, K keys, D head_dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .block_attention import block_attention
from .block_plan import BlockPlan
from .late_plan import LatePlan, attend_late
from .local_patterns import LocalGlobal, SlidingWindow
from .lsh import HashedTexts, OwnKeys, as_key, attend_in_chunks, see_by_hash
from .norms import make_norm, mark_residual_writer
from .positions import Distances, distance_scores, rotate
from .sparse_patterns import Lsh

# The backend of forms that sdpa cannot express: like sdpa, it gives no weights and leaves what pays to the block kernel.
# The number changes with what it computes, since two releases may be loaded at once.
SPELLED_OUT = "variform_spelled_out_1"


def is_hiding(attention_mask: torch.Tensor) -> torch.Tensor:
    """Where an additive mask hides a key: at -inf or about the lowest finite number of its dtype."""
    return attention_mask <= torch.finfo(attention_mask.dtype).min / 2


def merge(mask: Any, bias: torch.Tensor | None) -> tuple[Any, torch.Tensor | None]:
    """One additive mask from a mask and a score bias, and None; both where a mask is no tensor.

    The mask is boolean (True is seen) or additive. A query that sees no key has only -inf, for which every backend gives 0.
    """
    if bias is None or not isinstance(mask, torch.Tensor):
        return mask, bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(mask.logical_not(), float("-inf")), None
    return (bias + mask).masked_fill(is_hiding(mask), float("-inf")), None


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention spelled out: the definition that every other backend must equal.

    `softmax(cap(query @ key * scaling) + position_bias + attention_mask) @ value`; a query that sees no key gives 0.

    Args:
        query: `(B, H, Q, D)`. key, value: `(B, G, K, D)`, each shared by H / G heads.
        attention_mask: additive, broadcastable to `(B, H, Q, K)`; the lowest finite number, or -inf, hides a key.
        s_aux: `(H,)`, a logit a head that takes part in the softmax and contributes no value (attention sink).
        position_bias: `(B or 1, H, Q, K)`.

    Returns:
        The output `(B, Q, H, D)` and the weights `(B, H, Q, K)`.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    scores = scores.float()
    if attention_mask is not None:
        # Finite, so that a query without keys has a softmax, and gradients, to be set to 0 below
        scores = (scores + attention_mask).clamp(min=torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sinks = s_aux.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    if attention_mask is not None:
        weights = weights.masked_fill(is_hiding(attention_mask), 0.0)
    weights = nn.functional.dropout(weights.to(query.dtype), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def spelled_out_attention(*args, **kwargs) -> tuple[torch.Tensor, None]:
    """`eager_attention` without the weights."""
    return eager_attention(*args, **kwargs)[0], None


def attend_in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """`eager_attention` at the cost of what a plan shows: arguments and output `(B, Q, H, D)` as there, without weights.

    Args:
        position_bias: a table `(H, columns)`, to which the plan holds the columns.
    """
    query_rows, key_rows, value_rows = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    output = block_attention(
        query_rows,
        key_rows,
        value_rows,
        plan,
        scaling=scaling,
        bias=position_bias,
        softcap=softcap,
        dropout=dropout,
        sinks=s_aux,
    )
    return output.view(query.shape[0], query.shape[2], *output.shape[1:])


class GlobalRows(NamedTuple):
    """The queries of a call that see all of their text through projections of their own."""

    is_global: torch.Tensor  # (B, Q)
    places: torch.Tensor  # (B, R): their places among the queries, filled up with others where a row has fewer than R
    mask: torch.Tensor  # (B, 1, R, Q): additive
    # Makes their score bias (B, H, R, Q), where there is one. In the layer: reentrant checkpointing takes a tensor that is
    # nested in an argument for a constant
    bias: Callable[[], torch.Tensor] | None


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., arXiv:1706.03762, sec. 3.2) with shared key-value heads (GQA, arXiv:2305.13245).

    Args:
        config: reads the fields under "Attention" of `VariformStackConfig`.
        layer_idx: the layer's number, under which a cache keeps its keys and values.
        is_causal: whether a query sees only its past; cross-attention sees everything.
        key_value_size: width of the states that keys and values are projected from, when they are another stack's.
    """

    def __init__(self, config, layer_idx: int, is_causal: bool, key_value_size: int | None = None):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.head_dim
        pattern = None if key_value_size is not None else config.pattern_of(layer_idx)
        self.hashing: Any = pattern if isinstance(pattern, Lsh) else None
        # Where a key is its token's query, each head has its own, and with it a copy of the values that it shares
        sharing: int = config.num_attention_heads // config.num_key_value_heads
        self.num_key_value_groups: int = 1 if self.hashing else sharing
        self.num_value_copies: int = sharing if self.hashing else 1
        self.scaling = config.attention_scale if config.attention_scale is not None else config.head_dim**-0.5
        biased = config.biased_projections
        query_size, key_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        source_size = key_value_size or config.hidden_size
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias="q" in biased)
        self.k_proj = None if self.hashing else nn.Linear(source_size, key_size, bias="k" in biased)
        self.v_proj = nn.Linear(source_size, key_size, bias="v" in biased)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias="o" in biased)
        mark_residual_writer(self.o_proj)
        if isinstance(pattern, LocalGlobal) and pattern.global_projections:
            self.q_proj_global = nn.Linear(config.hidden_size, query_size, bias="q" in biased)
            self.k_proj_global = nn.Linear(config.hidden_size, key_size, bias="k" in biased)
            self.v_proj_global = nn.Linear(config.hidden_size, key_size, bias="v" in biased)
        self.norms_heads = config.qk_norm == "head"
        self.q_norm = self.k_norm = None
        if config.qk_norm is not None:
            self.q_norm = make_norm(config, self.head_dim if self.norms_heads else query_size)
            if self.k_proj is not None:
                self.k_norm = make_norm(config, self.head_dim if self.norms_heads else key_size)
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads)) if config.attention_sinks else None
        if config.position_embedding_type == "transformer_xl" and key_value_size is None:
            self.r_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        # Only what the form has: backends refuse options that they cannot express
        self.options = {}
        if config.attn_logit_softcapping is not None:
            self.options["softcap"] = config.attn_logit_softcapping
        if isinstance(pattern, SlidingWindow):
            # Read by flash kernels alone, which count the query itself both ways too
            self.options["sliding_window"] = pattern.window + (0 if is_causal else 1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        global_rows: GlobalRows | None = None,
        distances: Distances | None = None,
        query_biases: Any = None,
        memory: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends from `hidden_states` to themselves, or to `key_value_states`.

        Args:
            hidden_states: `(B, Q, hidden_size)`. key_value_states: `(B, K, key_value_size)`, for cross-attention.
            attention_mask: what the backend takes, as the stack lowered it, or a plan of the block kernel.
            rotation: cos and sin of the queries' positions, or of the keys' where there is a memory, for rotary schemes.
            global_rows: the queries that global projections serve, in layers that have them.
            distances, query_biases: from queries to keys, and `(2, H, D)`: u and v, for Transformer-XL's positions.
            memory: `(B, M, hidden_size)`, states of earlier calls to attend to as well, in place of a cache of keys and values.
            past_key_values: extended by this call's keys and values; cross-attention computes its own once.
            layer_idx: overrides the module's own where layers share weights.
            kwargs: passed to the attention function (`position_bias`, `position_ids`, flash arguments).

        Returns:
            `(B, Q, hidden_size)`, and the weights `(B, H, Q, K)` if the backend gives them.
        """
        layer_idx = self.layer_idx if layer_idx is None else layer_idx
        query = self._heads(self.q_proj(hidden_states), self.q_norm)  # (B, H, Q, D)
        if rotation is not None:
            own = rotation if memory is None else [part[..., -query.shape[2] :, :] for part in rotation]
            query = rotate(query, *own)
        if key_value_states is None:
            remembered = hidden_states if memory is None else torch.cat((memory, hidden_states), dim=1)
            key, value = self._keys_and_values(remembered, rotation, query if memory is None else None)
            if isinstance(past_key_values, EncoderDecoderCache):
                past_key_values = past_key_values.self_attention_cache
            if self.hashing is not None:
                own_keys = self._own_keys(key, memory, past_key_values, layer_idx)
            if past_key_values is not None and memory is None:
                key, value = past_key_values.update(key, value, layer_idx)
        else:
            key, value = self._cross_keys_and_values(key_value_states, past_key_values, layer_idx)

        if distances is not None:
            query, relation = self._relate(query, distances, query_biases)
            attention_mask, bias = merge(attention_mask, relation)
            kwargs |= {} if bias is None else {"position_bias": bias}
        if self.hashing is not None and not isinstance(attention_mask, HashedTexts):
            attention_mask = self._hide_by_hash(attention_mask, own_keys, key, layer_idx)
        if self.sinks is not None:
            kwargs["s_aux"] = self.sinks
        options = {"scaling": self.scaling, "dropout": self.config.attention_dropout if self.training else 0.0}
        options |= {**self.options, **kwargs}
        if isinstance(attention_mask, BlockPlan):
            output, weights = attend_in_blocks(query, key, value, attention_mask, **options), None
        elif isinstance(attention_mask, LatePlan):
            output, weights = attend_late(query, key, value, attention_mask, **options), None
        elif isinstance(attention_mask, HashedTexts):
            hashing = (self.hashing, layer_idx, self.is_causal)
            output, weights = attend_in_chunks(query, key, value, attention_mask, *hashing, **options), None
        else:
            attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
            output, weights = attend(self, query, key, value, attention_mask, **options)
        if global_rows is not None:
            related = (distances, query_biases)
            output = self._attend_globally(output, hidden_states, rotation, related, global_rows, options)
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()  # (B, Q, H * D)
        return self.o_proj(output), weights

    def _relate(
        self, query: torch.Tensor, distances: Distances, query_biases: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The query that meets the keys, and the score bias `(B, H, Q, K)`: the two terms of `TransformerXlPositions`."""
        u, v = query_biases[:, :, None].to(query.dtype)  # (H, 1, D) each
        waves = self.r_proj(distances.waves).view(-1, query.shape[1], self.head_dim)
        return query + u, distance_scores((query + v) * self.scaling, waves, distances.numbers)

    def _own_keys(self, key: torch.Tensor, memory, past_key_values, layer_idx: int) -> OwnKeys:
        """The keys of the queries' tokens. `key` holds those of a memory in front; a cache has not taken them in."""
        before: Any = 0
        if memory is not None:
            before = memory.shape[1]
            key = key[:, :, before:]
        elif past_key_values is not None:
            before = past_key_values.get_seq_length(layer_idx)
        return OwnKeys(key, torch.arange(key.shape[2], device=key.device) + before)

    def _hide_by_hash(self, attention_mask: Any, own_keys: OwnKeys, key: Any, layer_idx: int) -> torch.Tensor:
        """The mask `(B, H, Q, K)` that hides what does not hash like the query too. Arguments as in `see_by_hash`."""
        if not isinstance(attention_mask, torch.Tensor):
            raise ValueError(
                f"`attention_patterns` entry '{self.hashing}' hides keys of a mask that is a tensor, and was given "
                f"{type(attention_mask).__name__}; use `attn_implementation='sdpa'` or 'eager'."
            )
        is_boolean = attention_mask.dtype == torch.bool
        shown = attention_mask if is_boolean else is_hiding(attention_mask).logical_not()
        seen, repeats = see_by_hash(self.hashing, layer_idx, own_keys, key, shown)
        bias = None if is_boolean else attention_mask
        if repeats is not None:
            counted = repeats.to(key.dtype).log()
            bias = counted if bias is None else bias + counted
        return seen if bias is None else merge(seen, bias)[0]

    def _attend_globally(self, output, hidden_states, rotation, related, rows: GlobalRows, options) -> torch.Tensor:
        """`output` `(B, Q, H, D)` with the global queries' rows computed by the global projections, over all of the text
        (Longformer, arXiv:2004.05150, sec. 3.1)."""

        def pick(states: torch.Tensor) -> torch.Tensor:
            index = rows.places[..., None].expand(-1, -1, states.shape[-1])
            return states.expand(len(index), -1, -1).gather(1, index)

        query = self._heads(self.q_proj_global(pick(hidden_states)), self.q_norm)  # (B, H, R, D)
        key = self._heads(self.k_proj_global(hidden_states), self.k_norm)
        value = self._heads(self.v_proj_global(hidden_states), None)
        if rotation is not None:
            query = rotate(query, *(pick(part.squeeze(1)).unsqueeze(1) for part in rotation))
            key = rotate(key, *rotation)
        distances, query_biases = related
        bias = None if rows.bias is None else rows.bias().to(query.dtype)
        if distances is not None:
            query, bias = self._relate(query, distances._replace(numbers=pick(distances.numbers)), query_biases)
        found, _ = eager_attention(self, query, key, value, rows.mask, **{**options, "position_bias": bias})
        is_picked = rows.is_global.gather(1, rows.places)[..., None, None]
        index = rows.places[..., None, None].expand(-1, -1, *found.shape[2:])
        rebuilt = torch.zeros_like(output).scatter_add(1, index, (found * is_picked).to(output.dtype))
        return torch.where(rows.is_global[..., None, None], rebuilt, output)

    def _heads(self, states: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        """`(B, S, heads * D)` -> `(B, heads, S, D)`, normalised where the form asks for it."""
        if norm is not None and not self.norms_heads:
            states = norm(states)
        states = states.view(*states.shape[:-1], -1, self.head_dim)
        if norm is not None and self.norms_heads:
            states = norm(states)
        return states.transpose(1, 2)

    def _keys_and_values(
        self, states: torch.Tensor, rotation=None, query: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, G, K, D)` each. Args: query: of the same states, where a layer may take its keys from there."""
        value = self._heads(self.v_proj(states), None)
        if self.k_proj is not None:
            key = self._heads(self.k_proj(states), self.k_norm)
            return (rotate(key, *rotation) if rotation is not None else key), value
        if query is None:
            query = self._heads(self.q_proj(states), self.q_norm)
            query = rotate(query, *rotation) if rotation is not None else query
        return as_key(query), value.repeat_interleave(self.num_value_copies, dim=1)

    def _cross_keys_and_values(
        self, states: torch.Tensor, past_key_values: Cache | None, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the encoder's states: computed at the first step, then read back."""
        if not isinstance(past_key_values, EncoderDecoderCache):
            return self._keys_and_values(states)
        cache: Any = past_key_values.cross_attention_cache
        if past_key_values.is_updated.get(layer_idx):
            return cache.layers[layer_idx].keys, cache.layers[layer_idx].values
        key, value = cache.update(*self._keys_and_values(states), layer_idx)
        past_key_values.is_updated[layer_idx] = True
        return key, value


ALL_ATTENTION_FUNCTIONS.register(SPELLED_OUT, spelled_out_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(SPELLED_OUT, eager_mask)
