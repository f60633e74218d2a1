"""A form on one screen."""

import io
import math
from itertools import groupby
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedConfig

from ..model.patterns import parse
from .arithmetic import count_closed
from .costs import cache_dtype, default_length, stacks_of

SHAPES = {
    "variform_encoder": "encoder: a token sees both ways",
    "variform_decoder": "decoder: a token sees itself and the past",
    "variform_encoder_decoder": "encoder-decoder: the decoder sees its past and the encoder's states",
}
PLACEMENTS = {
    "pre": "before each sublayer (pre)",
    "post": "after each residual sum (post)",
    "sandwich": "before and after each sublayer (sandwich)",
    "reordered": "after each sublayer, within the residual (reordered)",
}
POOLED = {"first": "the first token", "last": "the last token", "mean": "the mean of the tokens"}

LABEL_WIDTH = len("cross-attention")


def describe(config: PreTrainedConfig, name: str | None = None) -> RenderableType:
    """The form of `config` in words, with its costs, within 100 columns and 40 lines.

    Args:
        config: any config of the family.
        name: what to call it in the title. Default: its shape alone.
    """
    stacks = stacks_of(config)
    is_pair = len(stacks) > 1
    source = stacks["encoder"].output_size if is_pair else None
    columns = [describe_stack(stack, source if stack.is_causal_stack else None) for stack in stacks.values()]
    table = Table(box=None, show_header=is_pair, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", min_width=LABEL_WIDTH)
    for side in stacks:
        table.add_column(side, ratio=1)
    for label in columns[0]:
        if any(column[label] for column in columns):
            table.add_row(label, *(column[label] for column in columns))
    below = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    below.add_column(style="bold", min_width=LABEL_WIDTH)
    below.add_column()
    for label, words in {**describe_whole(config), **describe_costs(config)}.items():
        below.add_row(label, words)
    title = Text.assemble((f"{name}, " if name else "", "bold"), SHAPES[config.model_type])
    return Group(title, "", table, "", below)


def describe_stack(config: PreTrainedConfig, source_size: int | None = None) -> dict[str, str]:
    """What makes up one stack, in words, by topic; an empty text where it has nothing of a topic.

    Args:
        config: the stack's config.
        source_size: width of the encoder's states that it attends to; None for no cross-attention.
    """
    words = {
        "layers": f"{config.num_hidden_layers}, {config.hidden_size:,} wide" + shared_layers(config),
        "tokens": f"{config.vocab_size:,}; " + embeddings(config),
        "positions": positions(config),
        "norm": norm(config),
        "attention": attention(config),
        "patterns": patterns(config),
        "cross-attention": f"the same heads, to the encoder's states, {source_size:,} wide" if source_size else "",
    }
    words["feed-forward"] = feed_forward(config)
    words["experts"] = experts(config)
    words["residuals"] = joined(
        config.parallel_residual and "attention and feed-forward in parallel",
        config.residual_streams == 2 and "two streams: attention adds to one, the feed-forward to the other",
        config.layer_scale_init is not None and f"branches scaled, from {config.layer_scale_init:g}",
    )
    rates = [("hidden", config.hidden_dropout), ("attention", config.attention_dropout)]
    rates += [("activation", config.activation_dropout), ("classifier", config.classifier_dropout)]
    rates += [("whole layers", config.layerdrop)]
    words["dropout"] = ", ".join(f"{where} {rate:g}" for where, rate in rates if rate) or "none"
    return words


def describe_whole(config: PreTrainedConfig) -> dict[str, str]:
    """What stands on the last stack, in words: the heads and the loss."""
    last = list(stacks_of(config).values())[-1]
    has_one_table = config.is_encoder_decoder and config.tie_encoder_decoder_embeddings
    words = {
        "head": joined(
            "shares the token embeddings" if config.tie_word_embeddings else "weights of its own",
            has_one_table and "encoder and decoder share one table of embeddings",
            last.lm_head_transform and f"after {transform(last)}",
            last.lm_head_bias and "a bias a token",
            last.logit_scale != 1 and f"logits times {last.logit_scale:.4g}",
            last.final_logit_softcapping and f"logits capped at {last.final_logit_softcapping:g}",
        )
    }
    if not config.is_encoder_decoder:
        words["classifiers"] = joined(
            f"read {POOLED[last.classifier_pooling]}",
            last.pooler and f"after dense and {last.pooler_act} (pooler)",
            last.classifier_transform and f"after {transform(last)}",
            not last.classifier_bias and "no bias",
        )
    has_experts = any(stack.num_experts for stack in stacks_of(config).values())
    words["training"] = joined(
        f"initial weights of standard deviation {last.initializer_range:g}",
        config.label_smoothing and f"label smoothing {config.label_smoothing:g}",
        config.z_loss_coef and f"z-loss {config.z_loss_coef:g}",
        has_experts and config.router_aux_loss_coef and f"balance loss {config.router_aux_loss_coef:g}",
        has_experts and config.router_z_loss_coef and f"router z-loss {config.router_z_loss_coef:g}",
    )
    return words


def describe_costs(config: PreTrainedConfig) -> dict[str, str]:
    """What the form costs, in words."""
    costs, length = count_closed(config), default_length(config)
    text = f"a text of {length:,} tokens"
    is_sparse = costs.active_parameters < costs.parameters
    words = {
        "parameters": f"{units(costs.parameters)} ({costs.parameters:,})"
        + (f", of which a token uses {units(costs.active_parameters)}" if is_sparse else ""),
        "arithmetic": f"{units(costs.flops)}FLOP a token, one forward pass over {text}"
        + (" and a source as long" if config.is_encoder_decoder else ""),
    }
    decoder = stacks_of(config).get("decoder")
    if decoder is None:
        return words
    if decoder.sorts_texts:
        words["cache"] = "none: a layer sorts the whole text anew with each token"
        return words
    words["cache"] = joined(
        f"{units(costs.cache_bytes)}B a token of context, in {dtype_name(cache_dtype(config))}",
        decoder.sliding_window and f"{units(costs.cache_bytes_past_window)}B from token {full_from(decoder)}",
        config.is_encoder_decoder and f"{units(costs.source_cache_bytes)}B a token of the source",
    )
    return words


def full_from(decoder: PreTrainedConfig) -> str:
    """The token from which on the caches of sliding layers grow no more, and why that one."""
    if decoder.memory_length > 0:
        return f"{decoder.memory_length} on, where the memory is full"
    patterns = [decoder.pattern_of(layer_idx) for layer_idx in range(decoder.num_hidden_layers)]
    kept = {keys for pattern in patterns if (keys := pattern.retained(is_causal=True)) is not None}
    others = ", ".join(map(str, sorted(kept - {decoder.sliding_window})))
    # A stack's caches have one width; what a narrower layer no longer sees, its mask hides
    return f"{decoder.sliding_window} on, " + (
        f"the widest of the windows (others: {others})" if others else "where windows are full"
    )


def transform(config: PreTrainedConfig) -> str:
    has_bias = config.mlp_bias if config.head_bias is None else config.head_bias
    return f"dense{'' if has_bias else ' (no bias)'}, {config.head_act or config.hidden_act} and norm"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def joined(*parts: str | bool | float | None) -> str:
    """The parts that there are, with semicolons."""
    return "; ".join(str(part) for part in parts if part)


def shared_layers(config: PreTrainedConfig) -> str:
    groups = config.num_hidden_groups or config.num_hidden_layers
    if groups == config.num_hidden_layers:
        return ""
    return (
        f"; {groups} set{'s' if groups > 1 else ''} of weights, each for {config.num_hidden_layers // groups} layers"
    )


def embeddings(config: PreTrainedConfig) -> str:
    scale = config.embedding_scale
    return joined(
        f"embeddings {config.embedding_size:,} wide",
        scale != 1 and ("times the root of their width" if scale == "sqrt" else f"times {scale:.4g}"),
        config.type_vocab_size and f"{config.type_vocab_size} token type{'s' if config.type_vocab_size > 1 else ''}",
        config.embedding_norm and "normalised",
    )


def positions(config: PreTrainedConfig) -> str:
    longest = f"{config.max_position_embeddings:,}"
    words = {
        "none": "none",
        "learned": f"learned, one vector for each of {longest}",
        "axial": f"learned, of tables of {both(config.axial_shape)} vectors, {both(config.axial_dims)} wide",
        "sinusoidal": f"sinusoidal, {config.sinusoidal_layout}, {config.sinusoidal_exponent}",
        "relative_bias": f"a learned bias for each of {config.relative_attention_num_buckets} buckets of distances, up to "
        f"{config.relative_attention_max_distance} (T5)",
        "alibi": "a penalty in proportion to the distance (ALiBi)",
        "transformer_xl": "scores that read the distance's sines (Transformer-XL)",
    }.get(config.position_embedding_type)
    has_table = config.position_embedding_type in ("learned", "sinusoidal")
    offset = has_table and config.position_offset and f"from row {config.position_offset}"
    return joined(
        words or rope(config), offset, config.position_embedding_type != "learned" and f"made for {longest} tokens"
    )


def both(numbers: list[int] | None) -> str:
    return " and ".join(f"{number:,}" for number in numbers or [])


def rope(config: PreTrainedConfig) -> str:
    by_type = {name: config.rope_parameters_of(name) for name in dict.fromkeys(config.layer_types)}
    words = {name: rope_words(parameters) for name, parameters in by_type.items()}
    if len(set(words.values())) == 1:
        return "rotary, " + next(iter(words.values()))
    return "rotary, " + ", ".join(
        f"{text} in {name.removesuffix('_attention')} layers" for name, text in words.items()
    )


def rope_words(parameters: dict[str, Any]) -> str:
    """`{"rope_type": "linear", "rope_theta": 1e4, "factor": 2}` as "linear, base 10,000, factor 2"."""
    rest = {key: value for key, value in parameters.items() if key not in ("rope_type", "rope_theta")}
    kind = parameters.get("rope_type", "default")
    words = [] if kind == "default" else [kind]
    words += [f"base {parameters['rope_theta']:,.10g}"]
    words += [f"{key.replace('_', ' ')} {plain(value)}" for key, value in rest.items() if value is not None]
    return ", ".join(words)


def norm(config: PreTrainedConfig) -> str:
    is_layer_norm = config.norm_type == "layer_norm"
    return joined(
        f"{'layer norm' if is_layer_norm else 'RMS norm'} {PLACEMENTS[config.norm_placement]}",
        "and at the end" if config.final_norm else "none at the end",
        config.skip_first_norm and "none before the first attention",
        is_layer_norm and not config.norm_bias and "no bias",
        config.norm_unit_offset and "times 1 + weight",
        f"eps {config.norm_eps:g}",
    )


def attention(config: PreTrainedConfig) -> str:
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    heads = f"{queries} heads, " if keys == queries else f"{queries} heads of queries, {keys} of keys and values, "
    biased = [projection for projection in "qkvo" if projection in config.biased_projections]
    scale = config.attention_scale
    return joined(
        f"{heads}{config.head_dim} wide",
        bool(biased) and ("biases" if len(biased) == 4 else f"biases on {', '.join(biased)}"),
        config.qk_norm and f"queries and keys normalised, {'each head' if config.qk_norm == 'head' else 'whole'}",
        scale is not None and not math.isclose(scale, config.head_dim**-0.5) and f"scores times {scale:.4g}",
        config.attn_logit_softcapping and f"scores capped at {config.attn_logit_softcapping:g}",
        config.attention_sinks and "a sink a head",
        config.memory_length and f"also to the layer's last {config.memory_length:,} inputs of earlier calls",
    )


def feed_forward(config: PreTrainedConfig) -> str:
    sparse = sum(map(config.is_sparse_layer, range(config.num_hidden_layers)))
    if sparse == config.num_hidden_layers:
        return ""
    return joined(
        f"{'gated ' if config.gated_mlp else ''}{config.hidden_act}, {config.intermediate_size:,} wide",
        trim(config),
        config.mlp_bias and "biases",
        sparse and f"in {config.num_hidden_layers - sparse} of {config.num_hidden_layers} layers",
    )


def trim(config: PreTrainedConfig) -> str:
    """What is done to the two factors of a gated product."""
    return joined(
        config.glu_limit is not None and f"factors up to {config.glu_limit:g}",
        config.glu_offset != 0 and f"the second plus {config.glu_offset:g}",
    )


def experts(config: PreTrainedConfig) -> str:
    sparse = sum(map(config.is_sparse_layer, range(config.num_hidden_layers)))
    if not sparse:
        return ""
    several = config.num_experts_per_tok > 1
    each_takes = (
        f"each takes the tokens that score highest for it, {config.num_experts_per_tok} experts a token on average"
    )
    limit = config.expert_capacity_factor and f"{config.expert_capacity_factor:g} times an even share"
    return joined(
        f"{config.num_experts:,}, {'gated ' if config.gated_mlp else ''}{config.hidden_act}, "
        f"{config.moe_intermediate_size:,} wide" + (", biases" if config.mlp_bias else ""),
        trim(config),
        sparse < config.num_hidden_layers and f"in {sparse} of {config.num_hidden_layers} layers",
        {
            "softmax_topk": f"{config.num_experts_per_tok:,} a token, by softmax",
            "switch": "1 a token, by softmax",
            "sigmoid_bias": f"{config.num_experts_per_tok:,} a token, by sigmoid and a bias that evens the load",
            "expert_choice": each_takes,
        }[config.router_type],
        config.router_bias and "the router has a bias",
        several and config.norm_topk_prob and "weights add up to 1",
        config.routed_scaling_factor != 1 and f"times {config.routed_scaling_factor:g}",
        config.n_group > 1 and f"from the {config.topk_group} best of {config.n_group} groups",
        config.num_shared_experts
        and f"{config.num_shared_experts} shared by all tokens{', gated' if config.shared_expert_gate else ''}",
        limit and f"at most {limit}",
        config.expert_capacity and f"at most {config.expert_capacity:,} tokens an expert",
    )


def pattern_period(config: PreTrainedConfig) -> list[str]:
    """The shortest list of patterns that, tiled over the layers, gives each layer its own."""
    names = [str(parse(entry)) for entry in config.attention_patterns]
    layers = [names[i % len(names)] for i in range(config.num_hidden_layers)]
    lengths = range(1, len(layers) + 1)
    return next(layers[:n] for n in lengths if all(layers[i] == layers[i % n] for i in range(len(layers))))


def patterns(config: PreTrainedConfig) -> str:
    """The pattern of each layer from the first to the last, such as "(5 x sliding_window:512, full) x 4, full"."""
    period = pattern_period(config)
    times, rest = divmod(config.num_hidden_layers, len(period))
    if len(period) == 1:
        return f"{times} x {period[0]}"
    if times == 1:
        return runs(period + period[:rest])
    return f"({runs(period)}) x {times}" + (f", {runs(period[:rest])}" if rest else "")


def runs(names: list[str]) -> str:
    """`["full", "full", "none"]` as "2 x full, none"."""
    counted = [(name, len(list(run))) for name, run in groupby(names)]
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counted)


def units(number: float, signed: bool = False) -> str:
    """`1234567` as "1.23 M": three digits and a power of a thousand."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * size:
            digits = f"{number / size:{'+' if signed else ''}#.3g}".rstrip(".")
            return f"{digits} {unit}"
    return f"{number:{'+' if signed else ''}.0f} "


def plain(value: Any) -> str:
    """A field's value as one reads it."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return runs([plain(item) for item in value])
    if isinstance(value, dict):
        words = {key: f"({plain(item)})" if isinstance(item, dict) else plain(item) for key, item in value.items()}
        return ", ".join(f"{key} {words[key]}" for key, item in value.items() if item is not None)
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def as_text(renderable: RenderableType, width: int = 100) -> str:
    """What is shown, as plain lines of at most `width` columns, for a log."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
