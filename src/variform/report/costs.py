"""What a form costs: parameters, arithmetic and cache, counted without weights."""

import copy
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..forms import from_config
from ..model.stacks import TransformerStack

# Beyond this, a length that a model allows says little about the texts that it is given
LONGEST_LENGTH = 2048


class Costs(NamedTuple):
    """The costs of a form with its language-model head; differences of two forms' costs take the same names."""

    parameters: int  # a tied matrix and a shared layer count once
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
    length = default_length(config) if length is None else length
    if length < 1:
        raise ValueError(f"`length={length}` must be at least 1 token.")
    model = build_on_meta(config)
    cache, later, source = cache_elements(config)
    size = (dtype or cache_dtype(config)).itemsize
    return Costs(
        sum(parameter.numel() for parameter in model.parameters()),
        (linear_flops(model) * length + attention_flops(config, length)) / length,
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


def cache_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype of the config's weights, or bfloat16, in which models mostly generate, where it names none."""
    dtype = config.dtype or torch.bfloat16
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The form's language model without memory for its weights; `config` stays as it is."""
    with torch.device("meta"):
        return from_config(copy.deepcopy(config))


def linear_flops(model: nn.Module) -> int:
    """FLOPs a token of all linear maps: two for each weight, as often as a token passes it.

    Biases, norms, activations and softmax are left out, as usual: they cost memory traffic rather than arithmetic.
    """
    weights = linear_weights(model)
    for stack in model.modules():
        if isinstance(stack, TransformerStack):
            further_runs = len(stack.layer_types) // len(stack.layers) - 1  # of layers that share weights
            weights += further_runs * linear_weights(stack.layers)
    return 2 * weights


def linear_weights(module: nn.Module) -> int:
    return sum(linear.weight.numel() for linear in module.modules() if isinstance(linear, nn.Linear))


def attention_flops(config: PreTrainedConfig, length: int) -> int:
    """FLOPs of all attention scores and weighted sums over a text of `length` tokens (a source of as many).

    Counts the keys that a query sees. A kernel that computes hidden scores as well does more.
    """
    flops = 0
    for stack in stacks_of(config).values():
        is_causal = stack.is_causal_stack
        windows = [stack.sliding_window if name == "sliding_attention" else None for name in stack.layer_types]
        pairs = sum(seen_pairs(length, window, is_causal) for window in windows)
        if config.is_encoder_decoder and is_causal:
            pairs += len(windows) * length * length  # cross-attention
        # A score is a product of head_dim terms, and its share of the sum as many again; each term is two operations
        flops += 4 * stack.num_attention_heads * stack.head_dim * pairs
    return flops


def seen_pairs(length: int, window: int | None, is_causal: bool) -> int:
    """How many (query, key) pairs of a text are seen, under the patterns of `attention_patterns`.

    Args:
        length: of the text in tokens.
        window: keys that a causal query sees, with itself, or that a query sees on each side; None for all.
    """
    if not is_causal:
        # The past and the future alike, each with the query itself, which is one pair and not two
        return 2 * seen_pairs(length, None if window is None else window + 1, is_causal=True) - length
    reach = length if window is None else min(window, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def cache_elements(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Numbers cached for one token: of the context, of the context beyond the window, of an encoder-decoder's source."""
    stack = stacks_of(config).get("decoder")
    if stack is None:
        return 0, 0, 0
    a_layer = 2 * stack.num_key_value_heads * stack.head_dim
    every_layer, full_layers = len(stack.layer_types), stack.layer_types.count("full_attention")
    return a_layer * every_layer, a_layer * full_layers, a_layer * every_layer * config.is_encoder_decoder
