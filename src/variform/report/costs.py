"""What a form costs: parameters, arithmetic and cache, counted without weights."""

import copy
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..forms import from_config
from ..model.moe import MixtureOfExperts
from ..model.pattern_base import Pattern
from ..model.sparse_patterns import Lsh
from ..model.stacks import TransformerStack
from .pairs import visible_pairs

# Beyond this, a length that a model allows says little about the texts that it is given
LONGEST_LENGTH = 2048


class Costs(NamedTuple):
    """The costs of a form with its language-model head; differences of two forms' costs take the same names."""

    parameters: int  # a tied matrix and a shared layer count once
    active_parameters: int  # the same without the experts that a token leaves idle
    flops: float  # of one forward pass, per token (a pair: per target token, with a source as long as the target)
    cache_bytes: int  # that one more token of context adds to the cache of generation; 0 for an encoder
    cache_bytes_past_window: int  # the same once the sliding layers are full and only the others grow
    source_cache_bytes: (
        int  # that one token of an encoder-decoder's source adds: the cross-attention's keys and values
    )


def count_costs(config: PreTrainedConfig, length: int | None = None, dtype: torch.dtype | None = None) -> Costs:
    """Counts what a form costs, from its modules' shapes; takes some 20 ms for BERT base.

    Args:
        config: any config of the family.
        length: of the text in tokens, for the FLOPs. Default: `default_length(config)`.
        dtype: of the cache. Default: `cache_dtype(config)`.

    Raises:
        ValueError: for a length below 1.
    """
    length = text_length(config, length)
    model = build_on_meta(config)
    cache, later, source = cache_elements(config)
    size = (dtype or cache_dtype(config)).itemsize
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Costs(
        parameters,
        parameters - idle_parameters(model),
        (linear_flops(model, length) + attention_flops(config, length)) / length,
        cache * size,
        later * size,
        source * size,
    )


def subtract(b: Costs, a: Costs) -> Costs:
    """`b - a`, figure by figure."""
    return Costs._make(after - before for after, before in zip(b, a))


def stacks_of(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """The config of each stack by its name, "encoder" or "decoder"."""
    if config.is_encoder_decoder:
        return {"encoder": config.encoder, "decoder": config.decoder}
    return {config.model_type.removeprefix("variform_"): config}


def default_length(config: PreTrainedConfig) -> int:
    """The longest sequence that every stack was made for, in tokens; at most 2048."""
    return min(LONGEST_LENGTH, *(stack.max_position_embeddings for stack in stacks_of(config).values()))


def text_length(config: PreTrainedConfig, length: int | None) -> int:
    """The length to count with: the given one, or `default_length(config)`.

    Raises:
        ValueError: for a length below 1.
    """
    length = default_length(config) if length is None else length
    if length < 1:
        raise ValueError(f"`length={length}` must be at least 1 token.")
    return length


def cache_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype of the config's weights, or bfloat16, in which models mostly generate, where it names none."""
    dtype = config.dtype or torch.bfloat16
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The form's language model without memory for its weights; `config` stays as it is."""
    with torch.device("meta"):
        return from_config(copy.deepcopy(config))


def linear_flops(model: PreTrainedModel, length: int) -> int:
    """FLOPs of all linear maps over a text of `length` tokens: two for each weight, as often as a token passes it.

    Biases, norms, activations and softmax are left out, as usual: they cost memory traffic rather than arithmetic.
    """
    terms = length * linear_weights(model)
    for stack in model.modules():
        if isinstance(stack, TransformerStack):
            further_runs = len(stack.layer_types) // len(stack.layers) - 1  # of layers that share weights
            terms += further_runs * length * linear_weights(stack.layers)
            terms += (further_runs + 1) * rare_terms(stack, length)
    return 2 * terms


def linear_weights(module: nn.Module) -> int:
    """The weights of the linear maps that a token passes; of experts, those that it uses (with capacity, at most)."""
    weights = sum(linear.weight.numel() for linear in module.modules() if isinstance(linear, nn.Linear))
    for block in blocks_with_experts(module):
        stored = sum(weight.numel() for name, weight in block.experts.named_parameters() if not name.endswith("bias"))
        # In the "modulelist" layout they are `nn.Linear`s, counted already
        counted = sum(linear.weight.numel() for linear in block.experts.modules() if isinstance(linear, nn.Linear))
        weights += block.gate.weight.numel() + stored * block.gate.top_k // block.gate.num_experts - counted
    return weights


def blocks_with_experts(module: nn.Module) -> list[MixtureOfExperts]:
    return [block for block in module.modules() if isinstance(block, MixtureOfExperts)]


def idle_parameters(model: nn.Module) -> int:
    """Parameters of the experts that a token does not use."""
    idle = 0
    for block in blocks_with_experts(model):
        stored = sum(parameter.numel() for parameter in block.experts.parameters())
        idle += stored * (block.gate.num_experts - block.gate.top_k) // block.gate.num_experts
    return idle


def rare_terms(stack: nn.Module, length: int) -> int:
    """What the linear maps that not every token passes once add to, or take off, `linear_weights` times `length`."""
    terms = 0
    for attention in (layer.self_attn for layer in stack.layers):
        if hasattr(attention, "q_proj_global"):
            # Of global tokens alone; in a text without one, of a token whose result is left out
            pattern = stack.config.pattern_of(attention.layer_idx)
            terms += (max(1, min(pattern.tokens, length)) - length) * attention.q_proj_global.weight.numel()
        if hasattr(attention, "r_proj") and not stack.is_causal:
            terms += (length - 1) * attention.r_proj.weight.numel()  # both ways, a distance has two signs
    return terms


def attention_flops(config: PreTrainedConfig, length: int) -> float:
    """FLOPs of all attention scores, weighted sums and hashes over a text of `length` tokens (a source of as many).

    Counts the keys that a query sees, of a text without marked tokens, prefix or memory. A kernel that computes hidden scores
    as well does more.
    """
    flops = 0.0
    for stack in stacks_of(config).values():
        is_causal, num_heads = stack.is_causal_stack, stack.num_attention_heads
        layers = Counter(stack.pattern_of(layer_idx) for layer_idx in range(stack.num_hidden_layers))
        pairs = sum(times * visible_pairs(of, length, is_causal, num_heads) for of, times in layers.items())
        # A score is a product of head_dim terms, and its share of the sum as many again; each term is two operations
        terms = 2 * pairs + length * sum(times * hash_products(of) for of, times in layers.items())
        if stack.position_embedding_type == "transformer_xl":
            terms += pairs  # the score's second product, with the distance
        if config.is_encoder_decoder and is_causal:
            terms += 2 * stack.num_hidden_layers * length * length  # cross-attention
        flops += 2 * num_heads * stack.head_dim * terms
    return flops


def hash_products(pattern: Pattern) -> int:
    """How many directions each key is multiplied with to be hashed."""
    return pattern.rounds * sum(pattern.factors) // 2 if isinstance(pattern, Lsh) else 0


def cache_elements(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Numbers cached for one token: of the context, of the context beyond the window, of an encoder-decoder's source."""
    stack = stacks_of(config).get("decoder")
    if stack is None:
        return 0, 0, 0
    if stack.sorts_texts:
        return 0, 0, 0  # no cache serves texts that are sorted anew with each token
    keys_and_values = 2 * stack.num_key_value_heads * stack.head_dim
    every_layer, full_layers = stack.num_hidden_layers, stack.layer_types.count("full_attention")
    source = keys_and_values * every_layer * config.is_encoder_decoder
    if stack.memory_length > 0:
        # A memory holds a layer's inputs in place of keys and values
        return stack.hidden_size * every_layer, stack.hidden_size * full_layers, source
    # Where a key is its token's query, each head has its own, and values beside it
    hashed = sum(isinstance(stack.pattern_of(layer_idx), Lsh) for layer_idx in range(every_layer))
    more = hashed * 2 * (stack.num_attention_heads - stack.num_key_value_heads) * stack.head_dim
    return keys_and_values * every_layer + more, keys_and_values * full_layers + more, source
